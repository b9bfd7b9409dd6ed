"""Groups of parameters that train at rates of their own, as an optimizer takes them and a checkpoint names them."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from .. import VideoAlignError

Patterns = Sequence[str]
"""Patterns of parameter names, as a shell matches file names: ``*`` stands for any characters, dots included."""
UNDECAYED = "_undecayed"
"""Ending of the name of a group's tensors that do not decay."""
TOKEN_ROWS = "*.rows"
"""Embeddings of reward tokens, which do not decay: few batches move them away from where they start."""


@dataclass(frozen=True)
class ParameterGroup:
    """Rates of the parameters of one group; what is not given is the optimizer's."""

    lr: float | None = None
    """Learning rate of the group; the optimizer's if not given."""
    weight_decay: float | None = None
    """Weight decay of the group's matrices; the optimizer's if not given. Norms, biases and token rows never decay."""
    match: str | list[str] | None = None
    """Pattern of parameter names, or several of them; ``*`` stands for any characters. The module's own groups need
    none."""

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise VideoAlignError(f"model.groups: {name} must be a number of at least 0, got {value}")

    @property
    def patterns(self) -> Patterns:
        """The patterns as a list."""
        return [self.match] if isinstance(self.match, str) else self.match or []

    def rates(self) -> dict[str, float]:
        """What is given, under torch's names."""
        given = {"lr": self.lr, "weight_decay": self.weight_decay}
        return {name: value for name, value in given.items() if value is not None}


Groups = Mapping[str, float | ParameterGroup]
"""Groups by name, as ``model.groups`` gives them: a learning rate, or all that a group has."""


def assign(names: Iterable[str], own: Mapping[str, Patterns], groups: Groups) -> dict[str, list[str]]:
    """Put every parameter into one group.

    A configured group takes what its patterns match, before the module's own groups do; among those the first match
    decides.

    Args:
        names: Names of the parameters that train.
        own: Patterns of the module's own groups.
        groups: Groups of the configuration.

    Returns:
        Names by group, the module's own groups first; no group is empty.

    Raises:
        VideoAlignError: Where a group is unknown, a pattern matches nothing, or two groups match one parameter.
    """
    names = list(names)
    given = {name: _group(value) for name, value in groups.items()}
    patterned = [name for name, group in given.items() if group.match is not None]
    owners: dict[str, str] = {}
    for group in patterned:
        if group in own:
            raise VideoAlignError(
                f"model.groups.{group}: {group} is one of this module's own groups, which take no match; give the "
                "group another name"
            )
        for name in _matched(group, given[group].patterns, names):
            if owners.setdefault(name, group) != group:
                raise VideoAlignError(
                    f"model.groups.{owners[name]} and model.groups.{group} both match {name}; a parameter has one "
                    "group, so make one of the patterns narrower"
                )
    for name in names:
        if name not in owners:
            owners[name] = next(group for group, patterns in own.items() if matches(name, patterns))
    found = {group: [name for name in names if owners[name] == group] for group in (*own, *patterned)}
    found = {group: members for group, members in found.items() if members}
    for group in given:
        if group not in found:
            _refuse(group, list(own), [group for group in own if group in found])
    return found


def matches(name: str, patterns: Patterns) -> bool:
    """Whether one of the patterns matches a parameter's name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _group(value: float | ParameterGroup) -> ParameterGroup:
    return value if isinstance(value, ParameterGroup) else ParameterGroup(lr=value)


def _matched(group: str, patterns: Patterns, names: list[str]) -> list[str]:
    """Names that a group's patterns match; each of them must match one at least."""
    if not patterns:
        raise VideoAlignError(f"model.groups.{group}.match is empty; give a pattern of parameter names")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.replace("*", ""), names, 1, 0.0)
            some = list(dict.fromkeys([*near, names[0], names[len(names) // 2], names[-1]]))
            raise VideoAlignError(
                f"model.groups.{group}.match: {pattern!r} matches none of the {len(names)} parameters that train, such "
                f"as {', '.join(some)}. A pattern matches the whole name; * stands for any characters"
            )
    return [name for name in names if matches(name, patterns)]


def _refuse(group: str, own: list[str], there: list[str]) -> NoReturn:
    """Refuse a configured group without patterns that holds nothing."""
    listed = f"this module has {', '.join(there)}" if there else "other groups match all that trains"
    if group in own:
        raise VideoAlignError(f"model.groups.{group} holds no parameter that trains; {listed}")
    near = difflib.get_close_matches(group, there, 1)
    guess = f" Did you mean {near[0]}?" if near else ""
    raise VideoAlignError(
        f"model.groups.{group}: there is no such group; {listed}, and a group of another name needs match, a pattern "
        f"of parameter names.{guess}"
    )


def build_optimizer(
    factory: OptimizerCallable, trained: Mapping[str, Tensor], members: Mapping[str, list[str]], groups: Groups
) -> tuple[Optimizer, list[dict[str, Any]]]:
    """Make an optimizer with a named group of parameters for each group.

    Where a group decays, its norms, biases and token rows are a group of their own that does not.

    Args:
        factory: Makes an optimizer of torch's groups.
        trained: Parameters that train, by name.
        members: Names of each group's parameters, from :func:`assign`.
        groups: Groups that the configuration gives.

    Returns:
        The optimizer, and what a checkpoint says of its groups: name and names of the parameters, in order.

    Raises:
        VideoAlignError: Where a group is given a weight decay and holds nothing that decays, or the learning rate is
            infinite.
    """
    rates = {group: _group(value).rates() for group, value in groups.items()}
    rows = [{"name": group, "names": names, **rates.get(group, {})} for group, names in members.items()]
    optimizer = factory(_of_tensors(rows, trained))
    if decaying := {group.get("name") for group in optimizer.param_groups if group.get("weight_decay")}:
        rows = [part for row in rows for part in (_split(row, trained) if row["name"] in decaying else [row])]
        optimizer = factory(_of_tensors(rows, trained))
    for name in ("lr", "weight_decay"):
        for value in (group.get(name, 0.0) for group in optimizer.param_groups):
            if isinstance(value, float) and not math.isfinite(value):
                raise VideoAlignError(f"model.optimizer.init_args.{name} is {value}; it must be a finite number")
    return optimizer, [{"name": row["name"], "parameters": row["names"]} for row in rows]


def _of_tensors(rows: list[dict[str, Any]], trained: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Groups as torch takes them; torch keeps what else a group holds, such as its name."""
    return [
        {"params": [trained[name] for name in row["names"]], **{k: v for k, v in row.items() if k != "names"}}
        for row in rows
    ]


def _split(row: dict[str, Any], trained: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A group as those of its tensors that decay, and the others."""
    decays = [name for name in row["names"] if trained[name].ndim > 1 and not fnmatchcase(name, TOKEN_ROWS)]
    rest = [name for name in row["names"] if name not in set(decays)]
    if row.get("weight_decay") and not decays:
        raise VideoAlignError(
            f"model.groups.{row['name']}.weight_decay is {row['weight_decay']}, but norms, biases and token rows do "
            "not decay, and the group holds nothing else; remove it"
        )
    if not rest:
        return [row]
    undecayed = {**row, "name": row["name"] + UNDECAYED * bool(decays), "names": rest, "weight_decay": 0.0}
    return [{**row, "names": decays}, undecayed] if decays else [undecayed]


def check_same(stored: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> None:
    """Refuse to give an optimizer the state of one whose parameters were grouped in another way.

    Args:
        stored: What a checkpoint says of its groups; None where it is of a release that had one group of all.
        now: What this run's checkpoints say.

    Raises:
        VideoAlignError: Where groups, their order or their parameters differ.
    """
    if stored == now or (stored is None and len(now) == 1):
        return
    if stored is None:
        why = "is of a release in which all parameters were one group"
    else:
        a, b = ({group["name"]: group["parameters"] for group in groups} for groups in (stored, now))
        if a.keys() != b.keys():
            why = f"has the parameter groups {', '.join(a)}, and this run {', '.join(b)}"
        elif moved := [name for name in a if set(a[name]) != set(b[name])]:
            odd = sorted(set(a[moved[0]]) ^ set(b[moved[0]]))
            why = f"has other parameters in the group {moved[0]}, such as {odd[0]}"
        else:
            why = "has its parameter groups, or the parameters of one, in another order"
    raise VideoAlignError(
        f"this checkpoint cannot be continued: it {why}. Resume with the model.groups, and with the weight decay, that "
        "it was trained with"
    )

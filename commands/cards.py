"""Cards of what is published: front matter that the hub reads, and a text for people."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..callbacks.plots import markdown_table
from ..models.hub import address_of
from .card_metrics import Measured
from .config_files import configs_in
from .publication import INDEX, Subject

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # Markdown
)
"""Templates of cards; a name that a template lacks is an error."""
_SEAL = re.compile(r"<!-- written by videoalign push, sha256 of the text above: ([0-9a-f]{64}) -->\n\Z")
_TAGS = {
    "reward": ["reward-model", "video-generation", "human-feedback"],
    "noisy reward": ["reward-model", "video-generation", "guidance"],
    "lora": ["lora", "text-to-video", "diffusers"],
    "generator": ["text-to-video", "diffusers"],
    "transformer": ["text-to-video", "diffusers"],
    "data": ["video", "human-feedback", "preference", "webdataset"],
}


def card_of(
    subject: Subject,
    name: str,
    revision: str | None,
    licences: tuple[str | None, str | None],
    metrics: Sequence[Measured],
) -> str:
    """The card of a folder, whole.

    Args:
        subject: The folder.
        name: Repository that it goes to, ``ORG/NAME``.
        revision: Branch that it goes to; None for the default one.
        licences: Licence of what is published, and of the model that it is built on; None where not given.
        metrics: Measured numbers to show.
    """
    base = address_of(subject.base) if subject.base else None
    data = _data_metadata(subject, licences[0]) if subject.is_data else _metadata(subject, name, licences[0], metrics)
    text = TEMPLATES.get_template("data.md.j2" if subject.is_data else "model.md.j2").render(
        kind=subject.kind,
        facts=subject.facts,
        name=name,
        title=name.partition("/")[2],
        at=f"@{revision}" if revision else "",
        revision=revision,
        base=base,
        licence=licences[0],
        base_licence=licences[1],
        metrics=metrics,
        table=markdown_table,
        size=_size,
        **_TABLES,
    )
    return sealed(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


def sealed(text: str) -> str:
    """A text with a last line by which :func:`untouched` knows it again."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- written by videoalign push, sha256 of the text above: {digest} -->\n"


def untouched(card: str) -> bool:
    """Whether a card is as :func:`card_of` wrote it: nothing that somebody typed is lost if it is replaced."""
    found = _SEAL.search(card)
    return bool(found) and hashlib.sha256(card[: found.start() - 1].encode()).hexdigest() == found[1]


def _licence(licence: str | None) -> dict[str, str]:
    return {"license": licence} if licence else {"license": "other", "license_name": "not-stated"}


def _metadata(subject: Subject, name: str, licence: str | None, metrics: Sequence[Measured]) -> ModelCardData:
    base = address_of(subject.base) if subject.base else None
    sets = [one["hub"] for one in subject.facts.get("training", {}).get("sets", ()) if one.get("hub")]
    ours = subject.kind in ("reward", "noisy reward")
    relation = {"lora": "adapter", "noisy reward": None}.get(subject.kind, "finetune") if base else None
    return ModelCardData(
        **_licence(licence),
        base_model=base.id if base else None,
        base_model_relation=relation,
        datasets=sets or None,
        library_name="videoalign" if ours else "diffusers",
        pipeline_tag=None if ours else "text-to-video",
        tags=["videoalign", *_TAGS[subject.kind]],
        model_name=name.partition("/")[2] if metrics else None,
        eval_results=[
            EvalResult(
                task_type="reward-model" if ours else "text-to-video",
                dataset_name=one.dataset[0],
                dataset_type=one.dataset[1],
                metric_type="accuracy" if "accuracy" in metric else "win-rate",
                metric_name=metric,
                metric_value=value,
            )
            for one in metrics
            for metric, value in one.results
        ]
        or None,
    )


def _data_metadata(subject: Subject, licence: str | None) -> DatasetCardData:
    sets: Mapping[str, dict[str, Any]] = subject.facts["sets"]
    total = sum(one["samples"] for one in sets.values())
    files = [{"split": name or "train", "path": f"{name}/*.tar".lstrip("/")} for name in sets]
    return DatasetCardData(
        **_licence(licence),
        tags=["videoalign", *_TAGS["data"]],
        size_categories=_size_category(total),
        configs=[{"config_name": "default", "data_files": files}],
    )


def _size_category(count: int) -> str:
    """The hub's word for a number of samples."""
    steps = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M"]
    return next((word for power, word in enumerate(steps, 3) if count < 10**power), "100M<n<1B")


def _size(count: int) -> str:
    """A number of bytes for people."""
    for unit, step in (("GB", 1e9), ("MB", 1e6)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _labels(one: Mapping[str, Any]) -> list[list[str]]:
    words = ("A", "B", "same", "invalid")
    return [[column, *(str(counts.get(word, 0)) for word in words)] for column, counts in one["labels"].items()]


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


_TABLES = {
    "labels_of": _labels,
    "rows_of": lambda counts: [[name, str(count)] for name, count in counts.items()],
    "agreement_of": lambda found: [
        [c, *(_share(row.get(k)) for k in ("alpha", "raw", "ties")), str(row.get("votes", "-"))]
        for c, row in found.items()
    ],
    "raw_of": lambda found: [[c, _share(row["raw"]), str(row["compared"])] for c, row in found.items()],
}
"""Rows of the tables of a data set's card."""


# --- training ---------------------------------------------------------------------------------------------------------


def training_of(folder: Path, data: Sequence[str]) -> dict[str, Any]:
    """What is known of a model's training: from the latest configuration of the run that it lies in, and what is named.

    No path of this machine is in it: a set is called by its folder's name.

    Args:
        folder: Exported model.
        data: Sets or hub data sets that the user named, in place of those of the run.

    Returns:
        ``sets``: name, hub id, kind and number of samples of each set. ``settings``: rows of a table. ``generator``:
        folder or hub id of the generator that was trained.
    """
    try:
        config = yaml.safe_load(configs_in(folder.resolve().parent)[-1].read_text(encoding="utf-8"))
    except (OSError, IndexError, ValueError, yaml.YAMLError):
        config = None
    config = config if isinstance(config, dict) else {}
    model, trainer = _init(config, "model"), config.get("trainer") or {}
    places = list(data)
    if not places and (train := _init(config, "data").get("train")):
        places = [train] if isinstance(train, str) else [one for one in train if isinstance(one, str)]
    optimizer = _init(model, "optimizer")
    rows = {
        "algorithm": str((config.get("model") or {}).get("class_path", "")).rpartition(".")[2],
        "loss": model.get("loss"),
        "theta": model.get("theta") if model.get("loss") == "btt" else None,
        "beta": model.get("beta"),
        "optimizer": str((model.get("optimizer") or {}).get("class_path", "")).rpartition(".")[2],
        "learning rate": optimizer.get("lr"),
        "batch size": _init(config, "data").get("batch_size"),
        "accumulated batches": trainer.get("accumulate_grad_batches"),
        "epochs": trainer.get("max_epochs"),
        "steps": trainer.get("max_steps") if trainer.get("max_steps") != -1 else None,
    }
    settings = [[name, str(value)] for name, value in rows.items() if value not in (None, "")]
    return {"sets": [_named(place) for place in places], "settings": settings, "generator": model.get("generator")}


def _init(config: Any, name: str) -> dict[str, Any]:
    """Arguments of an object in a configuration; empty where there are none."""
    node = config.get(name) if isinstance(config, dict) else None
    node = node.get("init_args", node) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _named(place: str) -> dict[str, Any]:
    """A set by its name and numbers; one on the hub is named, not fetched."""
    if address := address_of(place, "dataset"):
        return {"name": address.id, "hub": address.id, "kind": None, "samples": None}
    found: dict[str, Any] = {"name": Path(place).name, "hub": None, "kind": None, "samples": None}
    try:
        index = yaml.safe_load((Path(place) / INDEX).read_text(encoding="utf-8"))
        found |= {"kind": index["kind"], "samples": sum(shard["samples"] for shard in index["shards"])}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass  # the set was moved since; its name alone is known
    return found

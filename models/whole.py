"""Loading a model whole: every tensor of its files is in the model, and every tensor of the model is in its files.

diffusers and transformers load the tensors that fit, and only warn about the others (huggingface/transformers#4557):
tensors under foreign names leave the model random or on the meta device, scales of fp8 files are dropped, and fp8
numbers without their scales are cast as if they were weights. :func:`load_whole` is the one place that prevents this.

Files and model may differ in two ways, both by the libraries' own rules: tensors that are tied to others (``lm_head``
to the token embedding, a T5 encoder's ``embed_tokens`` to ``shared``) are in the files once, and tensors that a model
class declares as unused (a T5 decoder beside the encoder) are left out.

Under :func:`shapes_only` a model is made of its configuration alone, for computations with shapes (`videoalign plan`).
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import VideoAlignError
from .checksums import check_seal
from .finite import require_finite

STEMS = ("diffusion_pytorch_model", "model")
"""Beginnings of the names of weights files in diffusers and transformers."""
DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights in files. Numbers in fp8, fp4 or int8 mean nothing without scales, but torch would cast them."""

_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Let models be loaded on the meta device during a block, from their ``config.json`` alone."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def only_shapes() -> bool:
    """Whether models are made of their configuration now, without weights."""
    return _shapes_only.get()


def refuse_plan(who: str) -> None:
    """Refuse to be made of shapes alone, as `videoalign plan` asks for, where training is more than one pass.

    Args:
        who: Class of the module.
    """
    if only_shapes():
        raise VideoAlignError(
            f"plan counts one pass of the generator and its gradient, and {who} samples before it and has a reward "
            "beside it: run a few steps instead (--trainer.max_steps 2)"
        )


def load_whole(kind: type, source: str | Path, where: str, part: str = "", **options: Any) -> nn.Module:
    """Load a model of diffusers or transformers in eval mode, with every tensor accounted for and finite.

    Args:
        kind: Class of the model, with ``from_pretrained``.
        source: Folder of the model, or of the pipeline that it is a part of.
        where: Name of the model, for messages, such as "backbone runs/tiny".
        part: Folder inside ``source`` that holds the model; empty for ``source`` itself.
        options: Further arguments of ``from_pretrained``.

    Raises:
        VideoAlignError: Where files are missing or damaged, or a tensor is missing, unexpected, misshapen, quantised,
            or not finite.
    """
    if only_shapes():
        return _shapes(kind, Path(source, part), where, options.get("dtype") or torch.float32)
    check_files(Path(source, part), where)
    try:
        with _silence():
            model, found = kind.from_pretrained(
                source, subfolder=part, output_loading_info=True, use_safetensors=True, **options
            )
    except Exception as error:  # libraries raise errors of many kinds for files that they cannot load
        raise VideoAlignError(f"{where}: {_first_line(error)}") from error
    _account(found, where)
    if meta := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise VideoAlignError(f"{where}: {len(meta)} of the model's tensors are not in its files, such as {meta[0]!r}")
    remedy = "take the files from their source again, or an earlier checkpoint"
    require_finite(f"the weights of {where}", model.state_dict(), remedy)
    return model


def _shapes(kind: type, folder: Path, where: str, dtype: torch.dtype) -> nn.Module:
    """A model on the meta device, its parameters in the dtypes that they would be loaded in."""
    try:
        with _silence(), torch.device("meta"):
            if hasattr(kind, "load_config"):  # diffusers
                model = kind.from_config(kind.load_config(folder))
            else:
                model = kind(kind.config_class.from_pretrained(folder))
    except Exception as error:  # libraries raise errors of many kinds for a configuration that they cannot use
        raise VideoAlignError(f"{where}: {_first_line(error)}") from error
    keep = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep & set(name.split(".")) else dtype)
    return model.eval()


def check_files(folder: Path, where: str) -> None:
    """Refuse a folder whose weights files are missing, contradict their index, or are quantised.

    Args:
        folder: Folder with ``config.json`` and weights.
        where: Name of the model, for messages.

    Raises:
        VideoAlignError: Where something is wrong; names the first such thing.
    """
    if (folder / "adapter_config.json").exists():
        raise VideoAlignError(
            f"{where}: {folder} holds adapters (adapter_config.json), which would be loaded along unseen; merge them "
            "first"
        )
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        shards = {path.name for path in folder.glob(f"{stem}-?????-of-?????.safetensors")}
        if single.exists() and (index.exists() or shards):
            other = "shards" if shards else "an index"
            raise VideoAlignError(
                f"{where}: {folder} holds both {single.name} and {other}, so which weights are meant is open; remove "
                "those of the earlier save"
            )
        if index.exists():
            _check_shards(folder, index, shards, where)
        elif single.exists():
            _names(single, where)


def _check_shards(folder: Path, index: Path, there: set[str], where: str) -> None:
    try:
        listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VideoAlignError(f"{where}: {index} is no index of shards ({type(error).__name__}: {error})") from None
    want = set(map(str, listed.values()))
    if missing := sorted(name for name in want if not (folder / name).is_file()):
        raise VideoAlignError(
            f"{where}: {len(missing)} of its {len(want)} weights files are missing, such as {missing[0]}"
        )
    if stray := sorted(there - want):
        raise VideoAlignError(
            f"{where}: {folder / stray[0]} is a shard that {index.name} does not list; remove the older save"
        )
    held = {tensor: name for name in sorted(want) for tensor in _names(folder / name, where)}
    if wrong := sorted(name for name in {*held, *listed} if held.get(name) != listed.get(name)):
        raise VideoAlignError(
            f"{where}: {index.name} and the shards differ in {len(wrong)} tensors, such as {wrong[0]!r} (listed in "
            f"{listed.get(wrong[0])}, held by {held.get(wrong[0])}); the shards are of different saves"
        )


def _names(path: Path, where: str) -> list[str]:
    """Names of the tensors in a file; refuses dtypes that this package does not read, and files that were changed."""
    check_seal(path)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
    except (OSError, SafetensorError) as error:
        why = f"is damaged or no safetensors file ({error})"
        raise VideoAlignError(f"{where}: {path} {why}. Download it again.") from None
    if foreign := [name for name in names if kinds[name] not in DTYPES]:
        raise VideoAlignError(
            f"{where}: {len(foreign)} of the {len(names)} tensors in {path.name} are quantised or no weights, such as "
            f"{foreign[0]!r} ({kinds[foreign[0]]}); this package reads float32, bfloat16 and float16"
        )
    return names


def _account(found: dict[str, Any], where: str) -> None:
    """Refuse a model if the library's loading info reports missing, unexpected or misshapen tensors."""
    said = []
    reports = {
        "unexpected_keys": "in its files are not the model's",
        "missing_keys": "of the model are not in its files",
    }
    for key, words in reports.items():
        if names := sorted(found[key]):
            said.append(f"{len(names)} tensors {words} (such as {names[0]!r})")
    if shapes := sorted(found["mismatched_keys"]):
        name, held, want = shapes[0]
        example = f"{name!r}, {tuple(held)} in place of {tuple(want)}"
        said.append(f"{len(shapes)} tensors have another shape (such as {example})")
    said += [str(error).splitlines()[0] for error in found.get("error_msgs", ())]
    if said:
        raise VideoAlignError(
            f"{where}: {', '.join(said)}. These weights are of another model, or another tool wrote them under names "
            "of its own."
        )


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    shapes = re.search(
        r"because (\S+) expected shape .*?(\[.*?\])\), but got .*?(\[.*?\])\)", text
    )  # as diffusers words it
    if shapes:
        return f"{shapes[1]!r} has the shape {shapes[3]} in its files, but {shapes[2]} in the model"
    return text[:300]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the libraries' own reports during a block: this module refuses what they only report."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)

"""Loading a model whole: every tensor of its files is in the model, and every tensor of the model is in its files.

diffusers and transformers load what fits and log the rest as a warning (huggingface/transformers#4557; diffusers does the same): tensors
under foreign names leave the model random or on the meta device, scales of fp8 files are dropped, and fp8 numbers without
their scales are cast as if they were weights. :func:`load_whole` is the one place where that is mended.

Two things may differ, and both are the libraries' own rules: tensors that are tied to others (``lm_head`` to the token
embedding, a T5 encoder's ``embed_tokens`` to ``shared``) stand in the files once, and tensors that a model class declares
as another use's (a T5 decoder beside the encoder) are left out.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file

from .. import VideoAlignError
from .checksums import check_seal
from .finite import require_finite

STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers call their weights files."""
DTYPES = ("F64", "F32", "F16", "BF16")
"""What a weight may be in a file. Numbers of fp8, fp4 or int8 are nothing without scales, and torch would cast them."""


def load_whole(kind: type, source: str | Path, where: str, part: str = "", **options: Any) -> nn.Module:
    """A model of diffusers or transformers in eval mode, with every tensor accounted for and finite.

    Args:
        kind: Class of the model, with ``from_pretrained``.
        source: Folder, or hub id.
        where: What is loaded, for messages.
        part: Folder inside ``source`` that holds the model.
        options: Further arguments of ``from_pretrained``.

    Raises:
        VideoAlignError: where files are missing or damaged, or a tensor is missing, unexpected, misshapen, of a dtype that
            only another library can read, or not finite.
    """
    folder = Path(source, part)
    if folder.is_dir():
        check_files(folder, where)
    try:
        with _silence():
            model, found = kind.from_pretrained(
                source, subfolder=part, output_loading_info=True, use_safetensors=True, **options
            )
    except Exception as error:  # whatever a library says of files that it cannot load
        raise VideoAlignError(f"{where}: {_first_line(error)}") from error
    if not folder.is_dir():  # of a hub id the files are here only now
        check_files(Path(cached_file(str(source), "config.json", subfolder=part)).parent, where)
    _account(found, where)
    if meta := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise VideoAlignError(f"{where}: {len(meta)} of the model's tensors are not in its files, such as {meta[0]!r}")
    require_finite(
        f"the weights of {where}",
        model.state_dict(),
        "take the files from their source again, or an earlier checkpoint",
    )
    return model


def check_files(folder: Path, where: str) -> None:
    """Refuse a folder whose weights files are missing, contradict their index, or hold what only another library reads.

    Args:
        folder: Folder with ``config.json`` and weights.
        where: What it is, for messages.

    Raises:
        VideoAlignError: at the first thing that is wrong.
    """
    if (folder / "adapter_config.json").exists():
        raise VideoAlignError(
            f"{where}: {folder} holds adapters (adapter_config.json), which would be loaded along unseen; merge them first"
        )
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        shards = {path.name for path in folder.glob(f"{stem}-?????-of-?????.safetensors")}
        if single.exists() and (index.exists() or shards):
            raise VideoAlignError(
                f"{where}: {folder} holds both {single.name} and {'shards' if shards else 'an index'}, so which weights are meant is "
                "open; remove those of the earlier save"
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
    """Names of a file's tensors; refuses dtypes that this package does not read, and files that were changed."""
    check_seal(path)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
    except (OSError, SafetensorError) as error:
        raise VideoAlignError(
            f"{where}: {path} is damaged or no safetensors file ({error}). Download it again."
        ) from None
    if foreign := [name for name in names if kinds[name] not in DTYPES]:
        raise VideoAlignError(
            f"{where}: {len(foreign)} of the {len(names)} tensors in {path.name} are quantised or no weights, such as {foreign[0]!r} "
            f"({kinds[foreign[0]]}); this package reads float32, bfloat16 and float16"
        )
    return names


def _account(found: dict[str, Any], where: str) -> None:
    """Refuse what the library's loading info tells."""
    said = []
    for key, words in (
        ("unexpected_keys", "in its files are not the model's"),
        ("missing_keys", "of the model are not in its files"),
    ):
        if names := sorted(found[key]):
            said.append(f"{len(names)} tensors {words} (such as {names[0]!r})")
    if shapes := sorted(found["mismatched_keys"]):
        name, held, want = shapes[0]
        said.append(
            f"{len(shapes)} tensors have another shape (such as {name!r}, {tuple(held)} in place of {tuple(want)})"
        )
    said += [str(error).splitlines()[0] for error in found.get("error_msgs", ())]
    if said:
        raise VideoAlignError(
            f"{where}: {', '.join(said)}. These weights are of another model, or another tool wrote them under names of its own."
        )


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    shapes = re.search(r"because (\S+) expected shape .*?(\[.*?\])\), but got .*?(\[.*?\])\)", text)  # diffusers' words
    return (
        f"{shapes[1]!r} has the shape {shapes[3]} in its files, but {shapes[2]} in the model" if shapes else text[:300]
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the libraries' own reports: what they say of tensors is a refusal here."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)

"""`videoalign convert-lora` and `videoalign fuse`: LoRA adapters for other tools, and folded into a pipeline."""

import argparse

from .parsing import Commands, add_dtype, add_out, command

NAMES = ("comfyui", "diffusers", "musubi")
"""Forms that adapters can be written in."""
GENERATOR = "folder of the diffusers pipeline, or hub id"


def register(commands: Commands) -> None:
    """Add the commands."""
    text = "write LoRA adapters in the names of another tool"
    parser = command(commands, "convert-lora", _convert, text)
    parser.add_argument(
        "adapters",
        metavar="IN",
        help="folder, file or hub id of LoRA adapters in any of these forms; IN,scale=S multiplies their update",
    )
    parser.add_argument("--to", required=True, choices=NAMES, help="tool whose names are written")
    add_out(parser, "file that is written, NAME.safetensors; it must not exist yet")
    parser.add_argument(
        "--generator", required=True, help=f"{GENERATOR}; its configuration gives names and shapes, no weights are read"
    )
    parser.add_argument(
        "--alpha",
        choices=("baked", "written"),
        help="whether alpha / rank is multiplied into the weights or stated beside them (default: baked for comfyui, "
        "written for the others)",
    )

    add_family(parser)

    text = "fold LoRA adapters into the weights of a pipeline, as a folder that needs no adapters"
    parser = command(commands, "fuse", _fuse, text)
    parser.add_argument("--generator", required=True, help=GENERATOR)
    add_loras(parser, "LoRA adapters that are folded in", required=True)
    add_out(parser)
    add_dtype(parser, "that of the files")
    add_family(parser)


def add_family(parser: argparse.ArgumentParser) -> None:
    """Add ``--family``, for generators whose family no installed package offers."""
    parser.add_argument(
        "--family",
        help="class of the generator's family by import path, package.module:Name (default: by its pipeline)",
    )


def add_loras(parser: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    """Add ``--lora``, which may be given several times.

    Args:
        parser: Parser to change.
        text: What the adapters are for.
        required: Whether one must be given.
    """
    parser.add_argument(
        "--lora",
        action="append",
        required=required,
        metavar="PATH[,scale=S][,expert=high|low]",
        help=f"folder, file or hub id of {text}; several times for several. scale multiplies their update; expert says "
        "which of two experts they are of, where their file does not",
    )


def _convert(o: argparse.Namespace) -> None:
    from ..models.lora_dialects import convert_adapters
    from ..models.lora_specs import parse
    from .quiet import quiet

    quiet()
    layers = convert_adapters(parse(o.adapters), o.to, o.out, o.generator, o.alpha, o.family)
    print(f"adapters of {layers} layers in {o.out}")


def _fuse(o: argparse.Namespace) -> None:
    from ..models.fuse import fuse
    from ..models.lora_specs import specs_of
    from .quiet import quiet

    quiet()
    changed = fuse(o.generator, specs_of(o.lora), o.out, o.dtype, o.family)
    print(
        f"{' and '.join(f'{count} layers of {name}' for name, count in changed.items())} changed; pipeline in {o.out}"
    )

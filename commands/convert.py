"""`videoalign convert` and `videoalign export`: reward models as folders of safetensors and JSON."""

import argparse

from .parsing import Commands, add_out, add_weights_source, command, judge_of

COPY = {"action": "store_true", "help": "copy the backbone into the folder, so that it stands alone"}


def register(commands: Commands) -> None:
    """Add the commands."""
    text = "write an official VideoReward as a folder of safetensors and JSON"
    parser = command(commands, "convert", _convert, text)
    parser.add_argument(
        "--from", dest="model", required=True, help="official folder or hub id, with model_config.json and checkpoint-N"
    )
    add_out(parser)
    parser.add_argument("--with-backbone", **COPY)
    add_weights_source(parser)

    text = "write the reward model of a checkpoint as a folder of safetensors and JSON"
    parser = command(commands, "export", _export, text)
    parser.add_argument("--checkpoint", required=True, help=".ckpt file inside the folder of a run")
    add_out(parser)
    parser.add_argument("--backbone", help="folder or hub id of the model's backbone, if it moved since the training")
    parser.add_argument("--with-backbone", **COPY)


def _convert(o: argparse.Namespace) -> None:
    from .reward_export import convert

    convert(judge_of(o), o.out, o.with_backbone)


def _export(o: argparse.Namespace) -> None:
    from .quiet import quiet
    from .reward_export import export

    quiet()
    export(o.checkpoint, o.out, o.with_backbone, o.backbone)

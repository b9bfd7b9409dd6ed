"""`videoalign generate`: videos of prompts, plain or steered by a noisy reward (Flow-NRG)."""

import argparse
from typing import Any

from .. import VideoAlignError
from ..models.locks import first_process
from .lora_tools import add_family, add_loras
from .parsing import GOES_ON, Commands, add_batch, add_devices, add_dtype, add_out, add_seed, command, count, weights

SIZES = {
    "num-frames": (81, "frames of each video"),
    "height": (480, "height of the videos in pixels"),
    "width": (832, "width of the videos in pixels"),
    "fps": (16, "frame rate that is written into the files"),
    "steps": (50, "number of scheduler steps"),
}
"""Options that are whole numbers: default and help."""
GENERATE = (
    "generator",
    "num_frames",
    "height",
    "width",
    "fps",
    "steps",
    "cfg_scale",
    "lora",
    "negative",
    "dtype",
    "source",
    "family",
    "cfg_scale_2",
    "shift",
)
"""Options that are arguments of :class:`videoalign.alignment.Generate`."""
UNSET = ("generator", "noisy_reward", "search", "memory", "family", "source")
"""Options that an empty text would turn off without a word."""
PROMPTS_FILE = (
    "CSV with a column prompt (and one of image, a path, for image-to-video), or text file with a prompt a line"
)
PROMPTS = ("prompts", "out", "samples", "batch_size", "seed")
"""Options that are arguments of :class:`videoalign.datamodules.prompts.Prompts`."""


def register(commands: Commands) -> None:
    """Add the command."""
    text = (
        "sample videos of prompts, or of prompts and images, as a videos set with recorded seeds. Samples to train on "
        "are best drawn with --cfg-scale 1: guided ones teach the guidance, not a preference"
    )
    parser = command(commands, "generate", _run, text, GOES_ON)
    parser.add_argument("--generator", required=True, help="folder of a diffusers pipeline, or hub id")
    parser.add_argument("--prompts", required=True, help=PROMPTS_FILE)
    add_out(parser, "folder that is written; an interrupted run goes on there")
    parser.add_argument("--samples", type=count(1), default=1, help="videos per prompt")
    for name, (value, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=count(1), default=value, help=text)
    parser.add_argument(
        "--cfg-scale", type=float, default=1.0, help="classifier-free guidance scale; 1 turns guidance off"
    )
    parser.add_argument(
        "--cfg-scale-2",
        type=float,
        help="scale of the second of two experts (Wan2.2-A14B), which works at low noise (default: --cfg-scale)",
    )
    parser.add_argument(
        "--shift", type=float, help="shift of the scheduler's time steps (default: what the generator's authors use)"
    )
    parser.add_argument("--negative", help="negative prompt of classifier-free guidance (default: the empty prompt)")
    parser.add_argument("--noisy-reward", help="folder or hub id of a noisy reward that steers sampling (Flow-NRG)")
    parser.add_argument(
        "--weights",
        type=weights,
        help="weights of the dimensions in the noisy reward, like VQ=0.1,MQ=0.1,TA=0.8 (default: a third each)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="guidance strength of the noisy reward, in its standard deviations; 0 leaves samples as they are "
        "(default: 100)",
    )
    parser.add_argument(
        "--search",
        metavar="YAML",
        help="search among candidates of each video by the noisy reward: BestOfN, Pruning or Particles, or with "
        "settings '{class_path: Particles, init_args: {candidates: 8}}' (docs/howto/search.md); guidance by the same "
        "reward is then off unless --strength is given",
    )
    add_family(parser)
    add_loras(parser, "LoRA adapters")
    parser.add_argument(
        "--memory",
        metavar="YAML",
        help="how weights are held and computed, such as '{text_first: true, tiling: true}'; the keys are those of "
        "model.memory in a predict YAML (docs/howto/memory.md)",
    )
    parser.add_argument("--source", help="name of the model in the records (default: the generator's)")
    add_dtype(parser, "float32")
    add_batch(parser, 1)  # a generator's videos are large
    add_devices(parser)
    add_seed(parser)


def _run(o: argparse.Namespace) -> None:
    from ..models.guidance import Guidance
    from ..models.memory import Memory
    from .generating import generate, value_of

    if empty := [name for name in UNSET if getattr(o, name) == ""]:
        raise VideoAlignError(
            f"--{empty[0].replace('_', '-')} is empty; is a variable of the shell not set? Leave the option out where "
            "it is not wanted"
        )
    steering = {name: value for name in ("weights", "strength") if (value := getattr(o, name)) is not None}
    if steering and not o.noisy_reward:
        given = " and --".join(steering)
        raise VideoAlignError(f"--{given} steer by a noisy reward: name its folder with --noisy-reward")
    model: dict[str, Any] = {name: value for name in GENERATE if (value := getattr(o, name)) is not None}
    if o.lora and len(o.lora) == 1:  # records name a single one without a list
        model["lora"] = o.lora[0]
    if o.noisy_reward:
        model["noisy_reward"] = o.noisy_reward
    if o.search:
        model["search"] = _search(o)
    if o.noisy_reward and (steering or not o.search):
        model["guide"] = Guidance(**steering)
    if o.memory:
        model["memory"] = value_of("memory", Memory, o.memory)
    generate(model, {name: getattr(o, name) for name in PROMPTS}, o.device, o.devices)
    if first_process():
        print(f"videos in {o.out}; `videoalign shards info {o.out}` describes them")


def _search(o: argparse.Namespace) -> Any:
    """The search that --search describes."""
    from ..models.particles import Particles  # noqa: F401  may be named without its module
    from ..models.search import Search
    from .generating import value_of

    if not o.noisy_reward:
        raise VideoAlignError("--search chooses by a noisy reward: name its folder with --noisy-reward")
    if o.weights and o.strength is None:
        raise VideoAlignError(
            "--weights are those of guidance, which --search turns off: give --strength, or the search its own weights "
            "('{class_path: BestOfN, init_args: {weights: {TA: 1.0}}}')"
        )
    return value_of("search", Search, o.search)

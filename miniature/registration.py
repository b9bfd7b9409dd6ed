"""The commands of the miniature world: `videoalign sprites`, `miniature`, `demo`, `paper` and `study`.

Only options are named here. What a command needs is imported when it runs, so that `--help` need not wait for torch.
"""

import argparse

from .. import VideoAlignError
from ..bars import Progress
from ..commands.parsing import LARGEST_SEED, STAGES, Commands, add_out, add_seed, add_workers, command, count, group

GENERATORS = ("wan", "wan-i2v", "wan22-5b", "wan22-5b-i2v", "wan22-a14b", "wan22-a14b-i2v", "ltx", "ltx-i2v")
GENERATORS += ("ltx2", "ltx2-i2v", "hunyuan15", "hunyuan15-i2v")
"""Families of generators; the others are reward models' backbones."""


def register(commands: Commands) -> None:
    """Add the commands.

    Args:
        commands: Result of ``add_subparsers``.
    """
    _add_sprites(commands)
    _add_miniature(commands)
    text = "the whole paper in miniature: world, reward model, generator, alignment, guidance, one report"
    demo = command(commands, "demo", _demo, text, STAGES)
    demo.add_argument("--out", default="runs/demo", help="folder; finished stages in it are not repeated")
    add_seed(demo)
    _add_paper(commands)
    _add_study(commands)


def _add_sprites(commands: Commands) -> None:
    text = "render the miniature world: rated pairs, two benchmarks, captioned clips"
    sprites = command(commands, "sprites", _sprites, text)
    add_out(sprites)
    for name, value, text in (
        ("train", 6000, "number of rated pairs"),
        ("val", 400, "number of held-out pairs"),
        ("benchmark-videos", 480, "number of videos per benchmark"),
        ("benchmark-pairs", 1500, "number of rated pairs per benchmark"),
        ("captions", 3000, "number of captioned clips"),
        ("clips", 4000, "number of clips to train a generator on"),
    ):
        sprites.add_argument(f"--{name}", type=count(1), default=value, help=text)
    add_seed(sprites)
    add_workers(sprites, 1)


def _add_miniature(commands: Commands) -> None:
    text = "write a miniature folder with random weights: a Qwen-VL model, or a pipeline that generates videos"
    mini = command(commands, "miniature", _miniature, text)
    families = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", *GENERATORS)
    tokens = "number of tokens that prompts of a pipeline are padded to (default: the family's own)"
    add_out(mini)
    mini.add_argument("--family", choices=families, default="qwen2_vl", help="architecture of the model or pipeline")
    mini.add_argument("--hidden", type=int, default=64, help="width of the language model or transformer")
    mini.add_argument("--max-tokens", type=count(1), help=tokens)
    mini.add_argument("--layers", type=count(1), default=4, help="depth of the language model or transformer")
    mini.add_argument("--patch", type=count(1), help="side of a Qwen-VL model's vision patches, in pixels (default: 8)")
    add_seed(mini)


def _add_paper(commands: Commands) -> None:
    text = "reproduce the paper's findings in miniature, over seeds, with intervals and verdicts: RESULTS.md"
    _add_seeds(
        command(commands, "paper", _paper, text, STAGES), "folder; several machines that see it may share the work"
    )


def _add_study(commands: Commands) -> None:
    text = "studies in miniature beyond the paper, over seeds, with intervals"
    study = group(commands, "study", text)
    text = "online DPO, DiffusionNFT, AWM, GRPO, reward gradients and search at equal evaluations: ON_POLICY.md"
    out = "folder, best that of `videoalign paper`, whose seeds it goes on from; several machines may share the work"
    _add_seeds(command(study, "on-policy", _on_policy, text, STAGES), out)


def _add_seeds(parser: argparse.ArgumentParser, out: str) -> None:
    """Options of work over seeds."""
    processes = "number of processes that work at once on this machine; one per core if not given"
    parser.add_argument("--out", default="runs/paper", help=out)
    parser.add_argument("--seeds", type=count(1), default=5, help="number of seeds; a later call may add more")
    parser.add_argument("--first", type=count(0, LARGEST_SEED), default=0, help="the first seed")
    parser.add_argument("--processes", type=count(1), help=processes)


def _sprites(options: argparse.Namespace) -> None:
    from ..datamodules.parallel import pool
    from .world.rendered_sets import WorldSize, write_world

    size = WorldSize(
        train=options.train,
        val=options.val,
        benchmark_videos=options.benchmark_videos,
        benchmark_pairs=options.benchmark_pairs,
        captions=options.captions,
        clips=options.clips,
    )
    progress = Progress()
    with pool(options.workers) as workers:
        for place in write_world(options.out, size, options.seed, workers):
            progress(*place)


def _miniature(options: argparse.Namespace) -> None:
    from ..commands.quiet import quiet
    from .networks.pipelines import make_generator
    from .networks.qwen import make_qwen
    from .world.sprites import SCENES

    quiet()
    prompts = [scene.prompt for scene in SCENES]
    shape = (options.family, prompts, options.hidden, options.layers)
    if options.family in GENERATORS:
        if options.patch:
            raise VideoAlignError("--patch is for Qwen-VL models; a pipeline's patches are its family's")
        make_generator(options.out, *shape, max_tokens=options.max_tokens, seed=options.seed)
        print(f"{options.out}: a {options.family} pipeline with random weights")
        return
    if options.max_tokens:
        raise VideoAlignError("--max-tokens is for pipelines; a reward model reads prompts of any length")
    make_qwen(options.out, *shape, patch=options.patch or 8, seed=options.seed)
    print(f"{options.out}: a {options.family} with random weights")


def _demo(options: argparse.Namespace) -> None:
    from .study.demo import demo

    demo(options.out, options.seed)


def _paper(options: argparse.Namespace) -> None:
    from .study.paper import paper

    paper(options.out, options.seeds, options.first, options.processes)


def _on_policy(options: argparse.Namespace) -> None:
    from .study.on_policy_study import on_policy

    on_policy(options.out, options.seeds, options.first, options.processes)

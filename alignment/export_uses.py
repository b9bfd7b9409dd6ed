"""Commands that use the export of a module, which a run shows when it has ended."""

import shlex
from pathlib import Path

import lightning as L

from ..callbacks.reports import HasVideoSize, shown
from ..datamodules.contracts import HasBenchmarks, offers


def of_reward(export: Path, trainer: L.Trainer) -> dict[str, str]:
    """Uses of a reward model.

    Args:
        export: Folder of the export.
        trainer: The trainer that ran; its DataModule's benchmarks are those to measure on.
    """
    model = f"--model {quoted(export)}"
    data = trainer.datamodule
    sets = [benchmark.shards.path for benchmark in data.benchmarks.values()] if offers(data, HasBenchmarks) else []
    if sets:
        folders = " ".join(f"--data {quoted(path)}" for path in sets)
        return {f"videoalign bench {model} {folders}{_on(trainer)}": "benchmark it"}
    return {f'videoalign score {model} --video V.mp4 --prompt "..."{_on(trainer)}': "score your videos"}


def of_generator(
    export: Path,
    option: str,
    generator: str | Path,
    trainer: L.Trainer,
    images: bool = False,
    family: str | None = None,
) -> dict[str, str]:
    """Samples of a generator that is tuned or steered.

    Args:
        export: Folder of the export.
        option: Option of `videoalign generate` that takes the export, with its value.
        generator: Folder or hub id of the pipeline that training started from.
        trainer: The trainer that ran; its DataModule's videos say the size of the samples.
        images: Whether videos begin with an image, which the table of prompts then names.
        family: Class of the generator's family, where the configuration names one.
    """
    data = trainer.datamodule
    size = data.video_size() if isinstance(data, HasVideoSize) else {}
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in size.items())
    prompts = quoted(export.parent / ("prompts.csv" if images else "prompts.txt"))
    rows = r"printf 'prompt,image\na red circle,%s\n' IMAGE.png" if images else 'echo "a red circle"'
    source = quoted(generator) if Path(generator).exists() else generator
    option = f"--family {family} {option}" if family else option
    command = (
        f"{rows} > {prompts} && videoalign generate --generator {source} {option} "
        f"--prompts {prompts} --out {quoted(export.parent / 'generated')}{options}{_on(trainer)}"
    )
    return {command: "sample videos"}


def quoted(path: str | Path) -> str:
    return shlex.quote(shown(path))


def _on(trainer: L.Trainer) -> str:
    return " --device cpu" if trainer.strategy.root_device.type == "cpu" else ""

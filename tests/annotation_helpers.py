"""What the tests of annotation share: sets of videos, rounds, people at work, and the command line."""

from pathlib import Path
from typing import Any

import numpy as np

from videoalign.annotation.assignment import Task
from videoalign.annotation.people import Annotator
from videoalign.annotation.protocol import flipped
from videoalign.annotation.store import Store
from videoalign.cli import main
from videoalign.datamodules.shards import ShardWriter
from videoalign.datamodules.video import encode
from videoalign.miniature.world.sprites import FPS, FRAMES, SCENES, SOURCES, render, shown

COLUMNS = ("VQ", "MQ", "TA")
GOOD = {"VQ": "A", "MQ": "same", "TA": "B"}
"""A vote on a pair."""


def write_sprites(folder: Path) -> Path:
    """Write a set of ten prompts with one clip each from the best and the worst source of the miniature world."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "videos", per_shard=8) as writer:
        for number, content in enumerate(SCENES[:10]):
            for source in (SOURCES[0], SOURCES[-1]):
                flaws = source.sample(rng)
                video = encode(render(shown(content, flaws.wrong, rng), flaws, rng), FPS)
                record = {"prompt": content.prompt, "source": source.name, "fps": FPS, "num_frames": FRAMES}
                writer.write(f"{number:03d}-{source.name}", {"": video}, record)
    return folder


def write_clips(folder: Path, rows: list[tuple[str, str | None, str, str]]) -> Path:
    """Write a set of grey clips.

    Args:
        folder: The folder to make.
        rows: Key, path or None, prompt and source of each clip.
    """
    with ShardWriter(folder, "videos") as writer:
        for number, (key, path, prompt, source) in enumerate(rows):
            video = encode(np.full((4, 32, 32, 3), 20 * number % 250, np.uint8), 8)
            record = {"prompt": prompt, "source": source, "fps": 8.0, "num_frames": 4}
            writer.write(key, {"": video}, record | ({"path": path} if path else {}))
    return folder


def person(store: Store, name: str, role: str = "annotator") -> Annotator:
    """Invite somebody, who opens the link."""
    annotator = store.who(store.invite(name, role))
    assert annotator is not None
    return annotator


def rate(store: Store, who: Annotator, choices: dict[str, str] = GOOD, **more: Any) -> Task:
    """Vote on the pair on a person's screen, as the screen shows it; returns the task."""
    task = store.task(who)
    store.vote(who, task.ticket, choices, **more)
    return task


def in_pair(store: Store, task: Task, choices: dict[str, str]) -> dict[str, str]:
    """Choices on a screen as the pair's own A and B, or the other way round."""
    row = next(row for row in store.pairs() if row.id == task.pair_id)
    return choices if task.left == row.key_a else flipped(choices)


def annotate(name: str, *arguments: Any, **options: Any) -> None:
    """Run a command of `videoalign annotate`.

    Args:
        name: The command.
        arguments: Its arguments without a name.
        options: Its options by name, with a list for several values.
    """
    words = ["annotate", name, *map(str, arguments)]
    for option, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{option.replace('_', '-')}", *map(str, values)]
    main(words)


def task_of(client: Any, token: str) -> dict[str, Any]:
    """What the page is told about the pair on the screen."""
    return client.get(f"/a/{token}/task").json()["task"]


def ballot(client: Any, token: str, choices: dict[str, str] = GOOD, **more: Any) -> dict[str, Any]:
    """A vote as the page sends it, on the pair on the screen."""
    return {"ticket": task_of(client, token)["ticket"], "choices": choices, **more}

"""`videoalign compare`: several ways of sampling, judged side by side on the same prompts and noise.

An *arm* is a generator with adapters, a noisy reward that steers it, or neither. Each arm's videos are a set of their own,
and every judge rates every set: the reward model, the miniature world's oracle where there is one, and the noisy reward's
own view. A reward that steers always rises in its own view; whether another judge agrees is the question, and where
the two part is reward hacking (VideoAlign, section 5.3). Best-of-N by the reward model costs N samples: the honest rival.
"""

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import VideoAlignError
from ..alignment.reward_model import RewardModel
from ..callbacks.prompt_sampler import Sampling
from ..datamodules.prompts import read_prompts
from ..datamodules.shards import ShardSet
from ..miniature.world.oracle import Oracle
from ..miniature.world.rated_samples import clips_of
from ..models.files import read_json, write_json
from ..models.finite import by_name, require_finite
from ..models.guidance import Guidance
from ..models.locks import beside, held, real
from ..models.preference import DIMENSIONS
from .benchmarking import score_set
from .comparison import Judged, found_of, save
from .inference import Source, generate, predicting

BASE, VIDEOS = "base", "videos"
"""The plain generator's name, and the folder of all arms' videos."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way of sampling; the plain generator where nothing is set."""

    generator: str | None = None
    """Folder or hub id of another pipeline."""
    lora: str | None = None
    """Folder of adapters."""
    noisy_reward: str | None = None
    """Folder of a noisy reward; without a guide it only watches."""
    guide: Guidance | None = None
    """When and how strongly it steers."""

    def __post_init__(self) -> None:
        if self.guide and not self.noisy_reward:
            raise VideoAlignError("an arm with a guide needs a noisy reward: name its folder under noisy_reward")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Guidance by one noisy reward at several strengths."""

    noisy_reward: str
    """Folder of the noisy reward."""
    strengths: list[float]
    """Ascending; 0 is the base."""
    guide: Guidance = field(default_factory=Guidance)
    """Everything but the strength: weights, bounds, what it reads."""
    lora: str | None = None
    """Folder of adapters that it composes with."""

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.strengths, self.strengths[1:]))
        if not self.strengths or not ascending or not all(0 <= s < math.inf for s in self.strengths):
            raise VideoAlignError(f"sweep strengths must be finite, ascend, and not be negative, got {self.strengths}")
        if len({f"{s:g}" for s in self.strengths}) < len(self.strengths):
            raise VideoAlignError(f"sweep strengths {self.strengths} are too close to have names of their own")

    def arms(self, name: str) -> dict[str, Arm]:
        """An arm per strength above 0, and one that only watches, at 0."""
        return {
            f"{name}@0": Arm(noisy_reward=self.noisy_reward, lora=self.lora),
            **{
                f"{name}@{s:g}": Arm(
                    noisy_reward=self.noisy_reward, lora=self.lora, guide=replace(self.guide, strength=s)
                )
                for s in self.strengths
                if s > 0
            },
        }


def compare(
    generator: str,
    prompts: str,
    out: str,
    sampling: Sampling,
    samples: int = 4,
    reward_model: str | None = None,
    oracle: str | None = None,
    arms: Mapping[str, Arm] | None = None,
    sweeps: Mapping[str, Sweep] | None = None,
    workers: int = 1,
    device: str = "auto",
) -> dict[str, Any]:
    """Sample all arms, judge them, print and save a table and charts. An interrupted comparison goes on.

    Args:
        generator: folder or hub id of the pipeline. prompts: CSV with a column ``prompt``, or text file with one a line.
        out: folder of everything found. sampling: how; its batch size is also the reward model's. samples: noises per prompt.
        reward_model: folder of a reward model that judges. oracle: calibration file of the miniature world's oracle.
        arms: ways of sampling by name; ``base``, the plain generator, is always the first. sweeps: by name.
        workers: processes that decode. device: where to compute.

    Returns:
        What is saved as ``OUT/comparison.json``.
    """
    folder, texts = Path(out), read_prompts(prompts)
    if not reward_model and not oracle:
        raise VideoAlignError("nobody judges: name a reward model (--reward_model) or an oracle (--oracle)")
    every, curves = plan(arms or {}, sweeps or {})
    with held(folder):
        judges = _Judges(reward_model, oracle, texts, sampling, workers, device)
        judged: dict[str, Judged] = {}
        for number, (name, arm) in enumerate(every.items(), 1):
            if not (folder / VIDEOS / name).exists():
                print(f"arm {number} of {len(every)}: {name}", flush=True)
            sample_arm(folder, name, arm, generator, prompts, sampling, samples, device)
            judged[name] = judges(folder / VIDEOS / name, texts, samples)
        found = found_of(judged, curves)
        save(
            folder,
            found,
            every.keys(),
            texts,
            sampling.fps,
            f"{generator}, {samples} noises for each of {len(texts)} prompts",
        )
    return found


def plan(
    arms: Mapping[str, Arm], sweeps: Mapping[str, Sweep]
) -> tuple[dict[str, Arm], dict[str, tuple[Mapping[str, float], list[str]]]]:
    """All arms by name, the base first; and by sweep its weights and the names of its arms by ascending strength.

    Raises:
        VideoAlignError: where a name cannot be a folder's.
    """
    if wrong := [n for n in (*arms, *sweeps) if not n or set(n) & set("@/\\.") or (n == BASE and n in sweeps)]:
        raise VideoAlignError(
            f"arms or sweeps {wrong}: names must not be empty, hold @, /, \\ or a dot, or be that of the base"
        )
    watch = next((sweep.noisy_reward for sweep in sweeps.values()), None)
    every = {BASE: Arm(noisy_reward=watch), **arms}
    curves: dict[str, tuple[Mapping[str, float], list[str]]] = {}
    for name, sweep in sweeps.items():
        own = sweep.arms(name)
        if own[f"{name}@0"] == every[BASE]:  # the base watched by this very reward
            del own[f"{name}@0"]
        start = [name for name in own if name.endswith("@0")] or [BASE]
        every |= own
        curves[name] = sweep.guide.weights, [*start, *(arm for arm in own if arm not in start)]
    return every, curves


def sample_arm(
    folder: Path,
    name: str,
    arm: Arm,
    generator: str,
    prompts: str,
    sampling: Sampling,
    samples: int,
    device: str = "auto",
) -> None:
    """One arm's videos, ``FOLDER/videos/NAME``: an ordinary `videoalign generate`; nothing where they are there.

    Raises:
        VideoAlignError: where its videos are there, but were made otherwise.
    """
    videos, record = folder / VIDEOS / name, folder / VIDEOS / f"{name}.json"
    made = {
        "generator": generator,
        "prompts": read_prompts(prompts),
        "samples": samples,
        "sampling": asdict(sampling),
        "arm": asdict(arm),
    }
    made = json.loads(json.dumps(made))
    begun = videos.exists() or beside(real(videos), "parts").exists()
    if begun and record.exists() and read_json(record, "a comparison") != made:
        raise VideoAlignError(
            f"{videos} holds videos of other settings (see {record}); name another --out, or remove both"
        )
    write_json(record, made)
    if videos.exists():
        return
    shutil.rmtree(videos.with_name(f"{name}.rewards"), ignore_errors=True)  # of videos that are gone
    s = sampling
    # without a guide of its own a reward watches: strength 0 leaves samples as they are
    guide = {"noisy_reward": arm.noisy_reward, "guide": arm.guide or Guidance(strength=0.0)} if arm.noisy_reward else {}
    generate(
        {
            "generator": arm.generator or generator,
            "lora": arm.lora,
            "num_frames": s.num_frames,
            "height": s.height,
            "width": s.width,
            "fps": s.fps,
            "steps": s.steps,
            "cfg_scale": s.cfg_scale,
            "negative": s.negative,
            "source": name,
            **guide,
        },
        {"prompts": prompts, "out": str(videos), "samples": samples, "batch_size": s.batch_size, "seed": s.seed},
        device,
        1,
    )


class _Judges:
    """Everyone who rates an arm's videos.

    Args:
        reward_model, oracle: folder and file, either may be None. prompts: of all videos. sampling, workers, device: see :func:`compare`.
    """

    def __init__(
        self,
        reward_model: str | None,
        oracle: str | None,
        prompts: Sequence[str],
        sampling: Sampling,
        workers: int,
        device: str,
    ) -> None:
        self.model, self.sampling, self.workers, self.device = None, sampling, workers, device
        if reward_model:
            network = Source(model=reward_model).load()
            network.need_statistics(reward_model)
            self.model = RewardModel(network)
        self.oracle = Oracle.load(oracle) if oracle else None
        if self.oracle:  # refuse before the long work
            self.oracle.check(prompts, (sampling.num_frames, sampling.height, sampling.width, 3))

    def __call__(self, videos: Path, prompts: Sequence[str], samples: int) -> Judged:
        """Ratings of a set, prompts and noises in order."""
        shards = ShardSet(videos)
        contents = sorted(shards.contents(), key=lambda content: content.key)  # PROMPT-NOISE
        records, shape = [content.record for content in contents], (len(prompts), samples)
        ratings: dict[str, Tensor] = {}
        if self.oracle:
            ratings["oracle"] = self.oracle(clips_of(contents), [record["prompt"] for record in records])
        if self.model:
            trainer = predicting(self.device, [], False)
            raw = score_set(
                trainer,
                self.model,
                shards,
                [content.key for content in contents],
                videos.with_name(f"{videos.name}.rewards"),
                self.sampling.batch_size,
                self.workers,
            )
            ratings["reward model"] = self.model.network.normalise(raw)
        if all("noisy_reward" in record for record in records):
            ratings["own view"] = torch.tensor([[record["noisy_reward"][d] for d in DIMENSIONS] for record in records])
        for name, rows in ratings.items():
            require_finite(
                f"ratings of {videos} by the {name}",
                by_name([content.key for content in contents], rows),
                "look at the videos and at this judge",
            )
        whole = {
            name: torch.cat([r, r.sum(1, keepdim=True)], 1).double().unflatten(0, shape) for name, r in ratings.items()
        }
        return Judged(whole, statistics.median(record["seconds"] for record in records))

"""`videoalign compare`: several ways of sampling, judged side by side on the same prompts and noise.

An *arm* is a generator with adapters, a noisy reward that steers it or searches, or neither. Each arm's videos are a
set of their own, which every judge rates, and the noisy reward too: its own view. A reward that steers always rises in
its own view; whether another judge agrees is the question, and where the two part is reward hacking (VideoAlign,
section 5.3). Best-of-N costs N samples and no training: it is the rival that every arm must beat.
"""

import json
import math
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import VideoAlignError
from ..callbacks.prompt_sampler import Sampling
from ..datamodules.prompts import read_items
from ..datamodules.shards import ShardSet
from ..models.adapter_files import file_of, read_adapters
from ..models.checksums import stamp
from ..models.dimensions import DIMENSIONS
from ..models.files import read_json, write_json
from ..models.finite import by_name, require_finite
from ..models.generator_folder import read_index, weight_files
from ..models.guidance import Guidance
from ..models.hub_address import address_of
from ..models.locks import beside, held, real
from ..models.lora_specs import specs_of
from ..models.memory import Memory
from ..models.name_checks import check_names
from ..models.noisy_reward import record_of
from ..models.number_checks import at_least
from ..models.particles import Particles  # noqa: F401  YAML may name it without its module
from ..models.scoring import failing_as
from ..models.search import Search
from .comparison import OWN_VIEW, RatedArm, found_of, save
from .generating import generate
from .judge import Judge, ratings_of
from .predicting import alone
from .reward_judge import RewardJudge

BASE, VIDEOS = "base", "videos"
"""The plain generator's name, and the folder of all arms' videos."""
LATER = ("family", "search")
"""Fields of an arm that earlier releases did not have."""
REWARD_MODEL = "reward model"
"""The judge of this name keeps its rewards in ``videos/ARM.rewards``, any other in ``videos/ARM.NAME.rewards``."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way of sampling: the plain generator, changed in what is set here."""

    generator: str | None = None
    """Folder or hub id of another pipeline."""
    lora: str | list[str] | None = None
    """Folder, file or hub id of LoRA adapters, or a list of several; each may end in ``,scale=S`` and ``,expert=high``
    or ``,expert=low``."""
    noisy_reward: str | None = None
    """Folder or hub id of a noisy reward; without a guide it only rates the videos."""
    guide: Guidance | None = None
    """When and how strongly the noisy reward steers."""
    family: str | None = None
    """Class of the family, by name or import path (``package.module:Name``); by default the comparison's."""
    search: Search | None = None
    """Search among candidates of each video by the noisy reward, which then guides only where there is a guide."""

    def __post_init__(self) -> None:
        if self.search and not self.noisy_reward:
            raise VideoAlignError("an arm with a search needs a noisy reward: name its folder under noisy_reward")
        if self.guide and not self.noisy_reward:
            raise VideoAlignError("an arm with a guide needs a noisy reward: name its folder under noisy_reward")
        specs_of(self.lora)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Guidance by one noisy reward at several strengths."""

    noisy_reward: str
    """Folder or hub id of the noisy reward."""
    strengths: list[float]
    """Strengths of guidance, ascending; 0 is the base."""
    guide: Guidance = field(default_factory=Guidance)
    """Settings of the guidance but for its strength: weights, bounds, what the reward reads."""
    lora: str | list[str] | None = None
    """Folder, file or hub id of LoRA adapters that all arms of the sweep sample with, or a list of several, as in an
    arm."""

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.strengths, self.strengths[1:]))
        if not self.strengths or not ascending or not all(0 <= s < math.inf for s in self.strengths):
            raise VideoAlignError(f"sweep strengths must be finite, ascend, and not be negative, got {self.strengths}")
        if len({f"{s:g}" for s in self.strengths}) < len(self.strengths):
            raise VideoAlignError(f"sweep strengths {self.strengths} are too close to have names of their own")

    def arms(self, name: str) -> dict[str, Arm]:
        """An arm per strength above 0, and one at 0 whose videos the noisy reward only rates."""
        start = Arm(noisy_reward=self.noisy_reward, lora=self.lora)
        above = [strength for strength in self.strengths if strength > 0]
        guided = {f"{name}@{s:g}": replace(start, guide=replace(self.guide, strength=s)) for s in above}
        return {f"{name}@0": start, **guided}


def compare(
    generator: str,
    prompts: str,
    out: str,
    sampling: Sampling,
    judges: Mapping[str, Judge],
    samples: int = 4,
    arms: Mapping[str, Arm] | None = None,
    sweeps: Mapping[str, Sweep] | None = None,
    best_of: str | None = None,
    device: str = "auto",
    family: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    memory: Memory = Memory(),  # noqa: B008  frozen
) -> dict[str, Any]:
    """Sample all arms, judge them, print and save a table and charts. An interrupted comparison goes on.

    Args:
        generator: Folder or hub id of the pipeline.
        prompts: CSV with a column ``prompt`` (and ``image``), or text file with one prompt a line.
        out: Folder of all results.
        sampling: How videos are sampled.
        judges: Judges that rate the videos, by name. The first one says what is better.
        samples: Number of noises per prompt.
        arms: Ways of sampling by name; ``base``, the plain generator, is always the first.
        sweeps: Guidance at several strengths, by name.
        best_of: Name of the judge that best-of-N chooses by; by default the first reward model among the judges, or
            the first judge.
        device: Where to sample: auto, cpu or gpu.
        family: Class of the generator's family, by import path (``package.module:Name``) or name; found by the
            pipeline's class if not given.
        dtype: Dtype of the transformers and of the text encoder.
        memory: How the generators' weights are held and computed.

    Returns:
        What is saved as ``OUT/comparison.json``.
    """
    alone("compare")
    at_least(1, samples=samples)
    folder, texts = Path(out), [item.prompt for item in read_items(prompts)]
    held_as = ({"dtype": dtype} if dtype != "float32" else {}) | ({"memory": memory} if memory != Memory() else {})
    sampling, chooser = sampling.complete(), _chooser(judges, best_of)
    every, curves = plan(arms or {}, sweeps or {}, family)
    with held(folder):
        for name, judge in judges.items():
            with failing_as(f"judge {name} ({judge.name}) failed in check"):
                judge.check(texts, sampling)
        given = generator, prompts, sampling, samples
        for name, arm in every.items():  # all of them before hours of sampling
            _look_at(folder, name, arm, *given, held_as)
        judged: dict[str, RatedArm] = {}
        for number, (name, arm) in enumerate(every.items(), 1):
            if not (folder / VIDEOS / name).exists():
                print(f"arm {number} of {len(every)}: {name}", flush=True)
            sample_arm(folder, name, arm, *given, device, held_as)
            judged[name] = _judged(judges, folder / VIDEOS / name, (len(texts), samples))
        found = found_of(judged, curves, chooser)
        what = f"{generator}, {samples} noises for each of {len(texts)} prompts"
        save(folder, found, every.keys(), texts, sampling.fps, what)
    return found


def _chooser(judges: Mapping[str, Judge], best_of: str | None) -> str:
    """Name of the judge that best-of-N chooses by.

    Raises:
        VideoAlignError: Where nobody judges, or a name cannot be a judge's.
    """
    if not judges:
        raise VideoAlignError(
            "nobody judges: name one judge or more under judges, such as {reward model: {class_path: "
            "videoalign.commands.reward_judge.RewardJudge, init_args: {model: FOLDER}}}"
        )
    check_names("judges", judges, "/\\.|", {OWN_VIEW: "the noisy reward's own view"})
    if best_of is not None and best_of not in judges:
        raise VideoAlignError(f"best_of {best_of!r} is none of the judges: choose {', '.join(judges)}, or leave it out")
    models = [name for name, judge in judges.items() if isinstance(judge, RewardJudge)]
    return best_of or next(iter([*models, *judges]))


def plan(
    arms: Mapping[str, Arm], sweeps: Mapping[str, Sweep], family: str | None = None
) -> tuple[dict[str, Arm], dict[str, tuple[Mapping[str, float], list[str]]]]:
    """All arms by name, the base first; and for each sweep its weights and the names of its arms, the base first.

    Arms without a family of their own get the one that is given.

    Raises:
        VideoAlignError: Where a name cannot be that of a folder.
    """
    check_names("arms", arms, "@/\\.|", {BASE: "the plain generator"})
    check_names("sweeps", sweeps, "@/\\.|", {BASE: "the plain generator"})
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
    return {name: replace(arm, family=arm.family or family) for name, arm in every.items()}, curves


def sample_arm(
    folder: Path,
    name: str,
    arm: Arm,
    generator: str,
    prompts: str,
    sampling: Sampling,
    samples: int,
    device: str = "auto",
    held_as: Mapping[str, Any] | None = None,
) -> None:
    """Sample one arm's videos into ``FOLDER/videos/NAME``, as `videoalign generate` would; finished ones are kept.

    Args:
        folder: Folder of the comparison.
        name: Name of the arm.
        arm: How this arm differs from the plain generator.
        generator: Folder or hub id of the plain generator.
        prompts: CSV with a column ``prompt``, or text file with one prompt a line.
        sampling: How videos are sampled.
        samples: Number of noises per prompt.
        device: Where to sample: auto, cpu or gpu.
        held_as: Arguments of :class:`~videoalign.alignment.Generate` that say how weights are held, if not as usual.

    Raises:
        VideoAlignError: Where its videos are there, but were sampled with other settings.
    """
    videos, record = folder / VIDEOS / name, folder / VIDEOS / f"{name}.json"
    made = _made_before(folder, name, arm, generator, prompts, sampling, samples, held_as)
    if videos.exists():
        return
    write_json(record, made)
    # Rewards of videos that are gone; an arm's name holds no dot, so these are of no other arm.
    for rewards in (*videos.parent.glob(f"{escape(name)}.rewards"), *videos.parent.glob(f"{escape(name)}.*.rewards")):
        shutil.rmtree(rewards, ignore_errors=True)
    model = _generate_arguments(name, arm, generator, sampling) | dict(held_as or {})
    noises = {"samples": samples, "batch_size": sampling.batch_size, "seed": sampling.seed}
    generate(model, {"prompts": prompts, "out": str(videos), **noises}, device, 1)


def _look_at(folder: Path, name: str, arm: Arm, generator: str, *made: Any) -> None:
    """Refuse an arm whose videos are of other settings, or whose folders or files are missing or damaged.

    Whether they fit each other is found when the arm is sampled: that takes the weights. Arguments are those of
    :func:`_made_before`.
    """
    _made_before(folder, name, arm, generator, *made)
    if (folder / VIDEOS / name).exists():
        return
    try:
        read_index(arm.generator or generator)
        for spec in specs_of(arm.lora):
            read_adapters(spec.path)
        if arm.noisy_reward:
            record_of(arm.noisy_reward)
    except VideoAlignError as error:
        raise VideoAlignError(f"arm {name}: {error}") from error


def _made_before(
    folder: Path,
    name: str,
    arm: Arm,
    generator: str,
    prompts: str,
    sampling: Sampling,
    samples: int,
    held_as: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the videos of an arm depend on, as plain values; arguments are those of :func:`sample_arm`.

    Raises:
        VideoAlignError: Where its videos are there, but were sampled with other settings.
    """
    videos, record = folder / VIDEOS / name, folder / VIDEOS / f"{name}.json"
    items = read_items(prompts)
    images = {"images": [item.sha256 for item in items]} if items[0].image else {}
    made = {
        "generator": generator,
        "prompts": [item.prompt for item in items],
        **images,
        "samples": samples,
        "sampling": {key: value for key, value in asdict(sampling).items() if value is not None},
        "arm": _made(arm),
        **{key: value if isinstance(value, str) else asdict(value) for key, value in (held_as or {}).items()},
    }
    made, weights = json.loads(json.dumps(made)), _weights(arm, generator)
    there = next((place for place in (videos, beside(real(videos), "parts")) if place.exists()), None)
    if there and record.exists():
        before = read_json(record, "a comparison")
        known = before.pop("weights", {})  # earlier releases did not write them
        if before != made:
            raise VideoAlignError(
                f"{videos} holds videos of other settings (see {record}); name another --out, or remove both"
            )
        if changed := [place for place in known.keys() & weights.keys() if known[place] != weights[place]]:
            raise VideoAlignError(
                f"arm {name}: {', '.join(sorted(changed))} holds other weights than when {there} was sampled; name "
                f"another --out, or remove {there} and {record} to sample this arm anew"
            )
    return made | {"weights": weights}


def _weights(arm: Arm, generator: str) -> dict[str, str]:
    """Stamps of the weights that an arm samples with, by their places; of those that are on this machine."""
    found = {arm.generator or generator: weight_files}
    found |= {spec.path: _adapter_files for spec in specs_of(arm.lora)}
    found |= {arm.noisy_reward: _reward_files} if arm.noisy_reward else {}
    local = {place: Path(place).expanduser() for place in found if address_of(place) is None}
    return {place: stamp(found[place](path)) for place, path in local.items() if path.exists()}


def _adapter_files(place: Path) -> list[Path]:
    try:
        return [file_of(str(place))]
    except VideoAlignError:
        return []  # whoever samples refuses it


def _reward_files(folder: Path) -> list[Path]:
    return [folder / "model.safetensors"]


def _made(arm: Arm) -> dict[str, Any]:
    """An arm as plain values; without what earlier releases did not have, where it is not set."""
    plain = {key: value for key, value in asdict(replace(arm, search=None)).items() if key not in LATER or value}
    return plain | ({"search": arm.search.settings()} if arm.search else {})


def _generate_arguments(name: str, arm: Arm, generator: str, sampling: Sampling) -> dict[str, Any]:
    """An arm as arguments of :class:`~videoalign.alignment.Generate`."""
    size = ("num_frames", "height", "width", "fps", "steps", "cfg_scale", "negative")
    arguments = {key: getattr(sampling, key) for key in size}
    arguments |= {key: value for key in ("cfg_scale_2", "shift") if (value := getattr(sampling, key)) is not None}
    arguments |= {"generator": arm.generator or generator, "lora": arm.lora, "source": name}
    arguments |= {"family": arm.family} if arm.family else {}
    arguments |= {"search": arm.search} if arm.search else {}
    if arm.noisy_reward:
        # Without a guide of its own a reward only rates, or searches: strength 0 leaves samples as they are.
        arguments |= {"noisy_reward": arm.noisy_reward, "guide": arm.guide or Guidance(strength=0.0)}
    return arguments


def _judged(judges: Mapping[str, Judge], videos: Path, shape: tuple[int, int]) -> RatedArm:
    """Everyone's ratings of an arm's videos.

    Args:
        judges: Who rates, by name.
        videos: Folder of the arm's videos.
        shape: Numbers of prompts and of noises.
    """
    shards = ShardSet(videos)
    contents = sorted(shards.contents(), key=lambda content: content.key)  # PROMPT-NOISE
    keys, records = [content.key for content in contents], [content.record for content in contents]
    ratings: dict[str, Tensor] = {}
    for name, judge in judges.items():
        kept = f"{videos.name}.rewards" if name == REWARD_MODEL else f"{videos.name}.{name}.rewards"
        ratings[name] = ratings_of(judge, shards, keys, videos.with_name(kept), f"judges.{name}")
    if all("noisy_reward" in record for record in records):
        ratings[OWN_VIEW] = torch.tensor([[record["noisy_reward"][d] for d in DIMENSIONS] for record in records])
        require_finite(f"ratings of {videos} by the {OWN_VIEW}", by_name(keys, ratings[OWN_VIEW]), "look at the videos")
    whole = {name: torch.cat([r, r.sum(1, keepdim=True)], 1).double() for name, r in ratings.items()}
    seconds = statistics.median(record["seconds"] for record in records)
    counts = [record.get("evaluations") for record in records]  # sets of earlier releases have none
    evaluations = None if None in counts else statistics.mean(counts)
    return RatedArm({name: r.unflatten(0, shape) for name, r in whole.items()}, seconds, evaluations)

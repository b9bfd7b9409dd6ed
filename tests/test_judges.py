"""Judges: a reward model as one object, and what `videoalign compare` asks of everyone who rates."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from videoalign import VideoAlignError
from videoalign.cli import main
from videoalign.commands import arms
from videoalign.commands.reward_judge import RewardJudge
from videoalign.datamodules.encode_list import clips_of
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import encode
from videoalign.miniature.world.oracle import Oracle, OracleJudge
from videoalign.miniature.world.sprites import SCENES
from videoalign.models import VideoReward
from videoalign.models.video_reward import Statistics

PROMPTS = [content.prompt for content in SCENES[:2]]
SAMPLES, FRAMES, SIZE = 2, 9, 32
KEYS = [f"{p:05d}-{n:03d}" for p in range(len(PROMPTS)) for n in range(SAMPLES)]
SAMPLING = {"num_frames": FRAMES, "height": SIZE, "width": SIZE, "fps": 8}
ORACLE, REWARD = (
    "videoalign.miniature.world.oracle.OracleJudge",
    "videoalign.commands.reward_judge.RewardJudge",
)


def write_set(folder: Path, **changes) -> None:
    """A *videos* set of noise, as `generate` writes it."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "videos") as writer:
        for number, key in enumerate(KEYS):
            video = rng.integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
            record = {"prompt": PROMPTS[number // SAMPLES], "seconds": 1.0, **SAMPLING, **changes}
            writer.write(key, {"": encode(video, 8)}, record)


@pytest.fixture(scope="module")
def world(tmp_path_factory, backbone, sampling):
    """Folder of a set, two reward models, an oracle and prompts. Read only."""
    folder = tmp_path_factory.mktemp("judges")
    write_set(folder / "set")
    for name, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        network = VideoReward(backbone, template="plain", sampling=sampling, language="full")
        network.save_pretrained(folder / f"{name}_raw")
        network.statistics = Statistics([1.0, 2.0, 3.0], [0.5, 2.0, 0.25])
        network.save_pretrained(folder / name)
    Oracle().save(folder / "oracle.json")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture
def sampled(monkeypatch):
    """Arms' videos come from nowhere: judging is what these tests look at. Names of the arms that were sampled."""
    names = []

    def sample_arm(folder, name, *rest):
        names.append(name)
        if not (folder / "videos" / name).exists():
            write_set(folder / "videos" / name)

    monkeypatch.setattr(arms, "sample_arm", sample_arm)
    monkeypatch.setattr(arms, "_look_at", lambda *rest: None)  # there is no generator
    return names


def reward(world, model="one", **options):
    return {"class_path": REWARD, "init_args": {"model": str(world / model), "workers": 0, "device": "cpu", **options}}


def oracle(world):
    return {"class_path": ORACLE, "init_args": {"calibration": str(world / "oracle.json")}}


def run(world, folder, judges, **changes):
    """Exit status of `compare`, and what it found."""
    config = {"generator": "none", "prompts": str(world / "prompts.txt"), "out": str(folder / "out")}
    config |= {"sampling": SAMPLING, "samples": SAMPLES, "judges": judges, "device": "cpu", **changes}
    (folder / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    try:
        main(["compare", "--config", str(folder / "c.yaml")])
    except SystemExit as done:
        return done.code, None
    return 0, json.loads((folder / "out" / "comparison.json").read_text())


# --- a reward model -----------------------------------------------------------------------------------------------


def test_nothing_is_loaded_before_it_is_needed():
    judge = RewardJudge(model="nowhere")
    assert judge.name == "reward model nowhere"
    with pytest.raises(VideoAlignError, match="nowhere: there is no such folder of a reward model"):
        judge.need_statistics()


def test_the_model_is_loaded_once(world):
    judge = RewardJudge(model=str(world / "one"), device="cpu")
    assert judge.network is judge.network and judge.module.network is judge.network and judge.module is judge.module


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("workers", -1), ("devices", 0)])
def test_numbers_that_mean_nothing_are_refused(name, value):
    with pytest.raises(VideoAlignError, match=f"{name} of reward model m must be at least"):
        RewardJudge(model="m", **{name: value})


def test_a_set_is_scored_once_and_rated_in_normalised_rewards(world, tmp_path, monkeypatch):
    judge = RewardJudge(model=str(world / "one"), device="cpu", batch_size=3, workers=0)
    shards, calls, forward = ShardSet(world / "set"), [], VideoReward.forward
    monkeypatch.setattr(VideoReward, "forward", lambda self, **k: (calls.append(1), forward(self, **k))[1])
    raw = judge.score_set(shards, KEYS, tmp_path / "rewards")
    assert raw.shape == (len(KEYS), 3) and len(calls) == 2
    rated = judge.rate_set(shards, KEYS[::-1], tmp_path / "rewards")
    assert len(calls) == 2 and [*rated] == ["VQ", "MQ", "TA"]
    assert torch.equal(torch.stack([*rated.values()], 1), judge.network.normalise(raw).flip(0))


def test_without_statistics_rewards_are_scored_and_no_comparison_is_judged(world, tmp_path):
    judge = RewardJudge(model=str(world / "one_raw"), device="cpu", workers=0)
    assert judge.score_set(ShardSet(world / "set"), KEYS[:1], tmp_path / "rewards").isfinite().all()
    with pytest.raises(VideoAlignError, match="no statistics"):
        judge.check(PROMPTS, None)


def test_several_processes_are_refused_in_a_comparison():
    with pytest.raises(VideoAlignError, match="devices 2, but a comparison runs in one process"):
        RewardJudge(model="m", devices=2).check(PROMPTS, None)


# --- the judges of a comparison -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["oracle", "reward model"])
def test_the_first_judge_says_what_is_better_and_a_reward_model_chooses(first, world, tmp_path, sampled, capsys):
    judges = {"oracle": oracle(world), "reward model": reward(world)}
    judges = {name: judges[name] for name in sorted(judges, key=lambda name: name != first)}
    status, found = run(world, tmp_path, judges, arms={"other": {}})
    assert status == 0 and sampled == ["base", "other"]
    assert (found["judge"], found["chosen_by"]) == (first, "reward model")
    assert [*found["arms"]["base"]["means"]] == [*found["arms"]["other"]["against_base"]] == [*judges]
    (head,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| arm"))
    assert head.index(f"{first}: VQ") < head.index(f"{next(j for j in judges if j != first)}: VQ")


def test_best_of_names_who_chooses(world, tmp_path, sampled):
    judges = {"oracle": oracle(world), "reward model": reward(world)}
    status, found = run(world, tmp_path, judges, best_of="oracle")
    best = torch.tensor([found["best_of"][n]["Overall"] for n in ("1", "2")])
    assert status == 0 and found["chosen_by"] == "oracle" and best[1] >= best[0]


def test_every_reward_model_keeps_its_rewards_apart(world, tmp_path, sampled):
    judges = {name: reward(world, name) for name in ("one", "two")} | {"reward model": reward(world, "two")}
    status, found = run(world, tmp_path, judges)
    assert status == 0 and found["chosen_by"] == "one"
    kept = sorted(folder.name for folder in (tmp_path / "out" / "videos").glob("*.rewards"))
    assert kept == ["base.one.rewards", "base.rewards", "base.two.rewards"]
    means = found["arms"]["base"]["means"]
    assert means["two"] == means["reward model"] != means["one"]
    assert run(world, tmp_path, judges)[1] == found


def test_a_class_of_the_users_own_judges(world, tmp_path, sampled, monkeypatch):
    """It needs the methods of the protocol, and nothing of this package's classes."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "brightness_judge.py").write_text("""
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from videoalign.callbacks.prompt_sampler import Sampling
from videoalign.datamodules.encode_list import clips_of
from videoalign.datamodules.shards import ShardSet


class Brightness:
    name = "brightness"

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def check(self, prompts: Sequence[str], sampling: Sampling) -> None:
        pass

    def rate_set(self, videos: ShardSet, keys: Sequence[str], folder: Path) -> dict[str, Tensor]:
        contents = {content.key: content for content in videos.contents()}
        means = torch.from_numpy(clips_of([contents[key] for key in keys])).float().mean((1, 2, 3, 4))
        return {name: means for name in self.names}
""")

    def judge(*names):
        return {"class_path": "brightness_judge.Brightness", "init_args": {"names": [*names]}}

    status, found = run(world, tmp_path, {"light": judge("VQ", "MQ", "TA", "more")})
    want = clips_of(list(ShardSet(tmp_path / "out" / "videos" / "base").contents())).mean()
    assert status == 0 and found["chosen_by"] == found["judge"] == "light"
    assert found["arms"]["base"]["means"]["light"]["VQ"] == pytest.approx(want, rel=1e-4)


def test_a_judge_must_give_a_number_per_video_and_dimension(world, tmp_path):
    class Poor:
        name = "the poor one"

        def rate_set(self, videos, keys, folder):
            return {"VQ": torch.zeros(len(keys)), "MQ": torch.zeros(1), "score": torch.zeros(len(keys))}

    words = r"judges.poor \(the poor one\) does not give one number per video of .* under the names MQ, TA"
    with pytest.raises(VideoAlignError, match=words):
        arms._judged({"poor": Poor()}, world / "set", (2, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judges": {}}, "nobody judges"),
        ({"judges": None}, "judges"),
        ({"judges": {"a/b": "one"}}, "judges: 'a/b' cannot be a name"),
        ({"judges": {"a.b": "one"}}, "judges: 'a.b' cannot be a name"),
        ({"judges": {"own view": "one"}}, "judges: 'own view' is the name of the noisy reward's own view"),
        ({"judges": {"a": "one"}, "best_of": "b"}, "best_of 'b' is none of the judges"),
        ({"judges": {"a": "one_raw"}}, "no statistics"),
        ({"judges": {"a": "nowhere"}}, "no such folder"),
        ({"judges": {"a": {"class_path": "videoalign.miniature.world.oracle.Oracle"}}}, "no Judge: it has no rate_set"),
        ({"reward_model": "runs/reward"}, "reward_model: a reward model is one of the judges now"),
        ({"oracle": "oracle.json"}, "oracle: the oracle is one of the judges now"),
        ({"workers": 2}, "workers: the processes that decode are the judge's now"),
    ],
)
def test_judges_that_do_not_fit_are_refused(changes, words, world, tmp_path, sampled, capsys):
    changes = {"judges": {"a": "one"}, **changes}
    judges = changes.pop("judges")
    judges = judges and {n: reward(world, j) if isinstance(j, str) else j for n, j in judges.items()}
    assert run(world, tmp_path, judges, **changes) == (2, None)
    message = capsys.readouterr().err
    assert message.count("videoalign: error:") == 1 and words in message and not sampled


def test_old_keys_are_refused_on_the_command_line_too(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--oracle", "oracle.json"])
    assert "oracle: the oracle is one of the judges now" in capsys.readouterr().err


# --- the oracle ---------------------------------------------------------------------------------------------------


def test_the_oracle_judges_the_sets_own_pixels(world, tmp_path):
    judge, shards = OracleJudge(str(world / "oracle.json")), ShardSet(world / "set")
    rated = judge.rate_set(shards, KEYS[::-1], tmp_path)
    contents = sorted(shards.contents(), key=lambda content: content.key, reverse=True)
    want = Oracle()(clips_of(contents), [content.record["prompt"] for content in contents])
    assert [*rated] == ["VQ", "MQ", "TA"] and torch.equal(torch.stack([*rated.values()], 1), want)
    assert not [*tmp_path.iterdir()]


def test_a_calibration_is_read_when_it_is_needed(tmp_path):
    judge = OracleJudge(str(tmp_path / "oracle.json"))
    Oracle().save(tmp_path / "oracle.json")
    assert judge.oracle == Oracle() and judge.oracle is judge.oracle


@pytest.mark.parametrize("changes", [{"height": None}, {"num_frames": "nine"}])
def test_clips_without_a_size_are_refused(changes, tmp_path):
    write_set(tmp_path / "set", **changes)
    with pytest.raises(VideoAlignError, match="does not state num_frames, height and width"):
        clips_of(list(ShardSet(tmp_path / "set").contents()))

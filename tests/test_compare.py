"""`videoalign compare`: what it writes, where it goes on, and what it refuses."""

import functools
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import videoalign
from compare_kit import (
    DIMENSIONS,
    PROMPTS,
    SAMPLES,
    compare,
    counted,
    frames,
    generation,
    records,
    settings,
    tree,
    videos,
)
from helpers import call, flags, strict_json
from videoalign import VideoAlignError
from videoalign.commands import arms as module
from videoalign.commands.arms import Arm, Sweep
from videoalign.commands.comparison import COLUMNS, film
from videoalign.datamodules.video import decode
from videoalign.miniature.world.oracle import Oracle
from videoalign.models import VideoReward
from videoalign.models.guidance import Guidance

ARMS = ["base", "none", "predicted", "tuned", "both", "nrg@1", "nrg@30.5"]


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    """A comparison of every kind of arm. Read only."""
    folder = tmp_path_factory.mktemp("compared")
    config = settings(
        world,
        folder / "out",
        arms={
            "none": {"noisy_reward": world / "nrg", "guide": {"strength": 0.0}},
            "predicted": {"noisy_reward": world / "nrg", "guide": {"through": "predicted", "strength": 5.0}},
            "tuned": {"lora": world / "lora"},
            "both": {"lora": world / "lora", "noisy_reward": world / "nrg", "guide": {"strength": 30.0}},
        },
        sweeps={
            "nrg": {
                "noisy_reward": world / "nrg",
                "strengths": [0, 1, 30.5],
                "guide": {"weights": {"TA": 1.0}, "every": 1},
            }
        },
    )
    assert compare(folder / "c.yaml", config) == 0
    return SimpleNamespace(config=config, out=folder / "out", found=strict_json(folder / "out" / "comparison.json"))


def test_a_comparison_writes_numbers_table_charts_films_and_events(compared):
    out, found = compared.out, compared.found
    assert [*found["arms"]] == ARMS
    assert (found["judge"], found["prompts"], found["samples"]) == ("oracle", 2, SAMPLES)
    assert [*found["sweeps"]] == ["nrg"]
    assert found["sweeps"]["nrg"]["strengths"] == [0.0, 1.0, 30.5]
    assert found["sweeps"]["nrg"]["weights"] == {"TA": 1.0}
    assert [*found["best_of"]] == ["1", "2"]
    text = (out / "comparison.md").read_text()
    assert all(f"\n| {name} |" in text for name in ARMS)
    assert "sweep nrg: best for the oracle" in text
    assert text.startswith(f"{compared.config['generator']}, {SAMPLES} noises for each of 2 prompts")
    for name in ("arms.png", "sweep_nrg.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(10**6)) > 10
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    (shown,) = events.Tensors("compare/text_summary")
    assert all(name in shown.tensor_proto.string_val[0].decode() for name in ARMS)
    tags = events.Tags()["images"]
    assert {"compare/arms", "compare/sweep_nrg"} <= set(tags)
    assert any("none, predicted" in tag for tag in tags)


def test_films_show_a_row_per_prompt_and_a_column_per_arm(compared):
    best = compared.found["sweeps"]["nrg"]["best"]
    columns = 5 + len({best, 30.5} - {0.0})
    with Image.open(compared.out / "films.gif") as film:
        assert film.n_frames == 9
        width, height = film.size
    assert width / height == pytest.approx(columns * 34 / (2 * 34))
    assert height >= 2 * 96


def test_a_cell_of_a_film_is_the_video_of_its_prompt_and_arm(compared):
    moving = film(compared.out, ["base", "tuned"], PROMPTS, least=1)
    for column, row in itertools.product(range(2), range(2)):
        want = frames(videos(compared.out / "videos" / ("base", "tuned")[column])[f"{row:05d}-000"])
        for number in (0, 8):
            cell = np.asarray(moving[number])[1 + 34 * row : 33 + 34 * row, 1 + 34 * column : 33 + 34 * column]
            assert np.array_equal(cell, want[number].permute(1, 2, 0).numpy())


def test_ratings_are_those_of_every_judge_by_itself(compared, world):
    network = VideoReward.from_pretrained(world / "judge").eval()
    oracle = Oracle.load(world / "oracle.json")
    for name in ("base", "predicted", "nrg@30.5"):
        kept, made = videos(compared.out / "videos" / name), records(compared.out / "videos" / name)
        assert sorted(kept) == ["00000-000", "00000-001", "00001-000", "00001-001"]
        clips = {key: frames(video) for key, video in kept.items()}
        rows = {"oracle": [], "reward model": [], "own view": []}
        for key, clip in clips.items():
            prompt = PROMPTS[int(key[:5])]
            assert made[key]["prompt"] == prompt and made[key]["source"] == name
            rows["oracle"].append(oracle(clip.permute(0, 2, 3, 1).numpy()[None], [prompt])[0])
            content = decode(kept[key], network.processor.sampling, network.processor.factor)
            with torch.no_grad():
                rows["reward model"].append(network.normalise(network(**network.processor([content], [prompt])))[0])
            rows["own view"].append(torch.tensor([made[key]["noisy_reward"][d] for d in DIMENSIONS]))
        means = compared.found["arms"][name]["means"]
        for judge, found in rows.items():
            mean = torch.stack(found).double().mean(0)
            for column, value in zip(COLUMNS, [*mean.tolist(), float(mean.sum())]):
                assert means[judge][column] == pytest.approx(value, abs=2e-4), (name, judge, column)
        if name == "base":  # of each prompt the sample that the reward model likes best, as the oracle sees it
            liked = torch.stack(rows["reward model"]).sum(1).view(2, SAMPLES).argmax(1)
            best = torch.stack(rows["oracle"]).sum(1).view(2, SAMPLES)[torch.arange(2), liked].mean()
            assert compared.found["best_of"]["2"]["Overall"] == pytest.approx(float(best), abs=1e-4)
        seconds = [record["seconds"] for record in made.values()]
        assert min(seconds) > 0
        assert compared.found["arms"][name]["seconds"] == pytest.approx(np.mean(seconds))


def generate(world, out, **options):
    """Exit status of `videoalign generate` with the settings of the comparison."""
    return call("generate", *flags(**generation(world, out), **options))


def test_who_only_watches_changes_no_byte(compared, world, tmp_path):
    """The base, which the sweep's reward watches, equals a guide of strength 0 and `generate` without a reward."""
    base = videos(compared.out / "videos" / "base")
    assert videos(compared.out / "videos" / "none") == base
    assert generate(world, tmp_path / "plain") == 0
    assert videos(tmp_path / "plain") == base
    assert not any(
        {"noisy_reward", "guide", "reward"} & record.keys() for record in records(tmp_path / "plain").values()
    )
    row = compared.found["arms"]["none"]["against_base"]["oracle"]["Overall"]
    assert row["win_rate"] == row["superiority"] == 0.5 and row["win_rate_interval"] == [0.5, 0.5]


def test_every_other_arm_is_a_set_of_its_own(compared):
    sets = {name: videos(compared.out / "videos" / name) for name in ARMS if name != "none"}
    for (one, first), (two, second) in itertools.combinations(sets.items(), 2):
        assert any(not torch.equal(frames(first[key]), frames(second[key])) for key in first), (one, two)
    seeds = {name: {key: r["seed"] for key, r in records(compared.out / "videos" / name).items()} for name in ARMS}
    assert all(found == seeds["base"] for found in seeds.values())


def test_what_steered_is_recorded(compared, world):
    def one(name):
        return records(compared.out / "videos" / name)["00000-000"]

    assert one("nrg@30.5")["guide"]["strength"] == 30.5 and one("nrg@30.5")["guide"]["weights"] == {"TA": 1.0}
    assert one("predicted")["guide"]["through"] == "predicted" and one("nrg@1")["guide"]["through"] == "noisy"
    assert one("base")["guide"]["strength"] == 0 and one("base")["reward"] == str(world / "nrg")
    assert "guide" not in one("tuned")
    assert "own view" not in compared.found["arms"]["tuned"]["means"]


def test_arms_with_adapters_are_those_of_generate(compared, world, tmp_path):
    assert generate(world, tmp_path / "set", lora=world / "lora") == 0
    assert videos(tmp_path / "set") == videos(compared.out / "videos" / "tuned")


def test_a_second_call_samples_and_scores_nothing_again(compared, tmp_path, monkeypatch, capsys):
    sizes, before = counted(monkeypatch), tree(compared.out / "videos")
    scored, forward = [], VideoReward.forward
    monkeypatch.setattr(VideoReward, "forward", lambda self, *a, **k: (scored.append(1), forward(self, *a, **k))[1])
    kept = (compared.out / "comparison.json").read_bytes(), (compared.out / "comparison.md").read_bytes()
    assert compare(tmp_path / "c.yaml", compared.config) == 0
    assert not sizes
    assert not scored
    assert tree(compared.out / "videos") == before
    assert ((compared.out / "comparison.json").read_bytes(), (compared.out / "comparison.md").read_bytes()) == kept
    assert "arm 1 of" not in capsys.readouterr().out


def without_seconds(found):
    """The numbers that do not depend on how fast the machine is."""
    arms = {
        n: {k: v for k, v in row.items() if k not in ("seconds", "time", "best_of")} for n, row in found["arms"].items()
    }
    return {**found, "arms": arms}


def test_an_arm_that_was_removed_is_sampled_again(compared, tmp_path, monkeypatch):
    shutil.copytree(compared.out, tmp_path / "out")
    for name in ("tuned", "tuned.rewards"):
        shutil.rmtree(tmp_path / "out" / "videos" / name)
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", {**compared.config, "out": tmp_path / "out"}) == 0
    assert sizes == [2, 2]
    assert without_seconds(strict_json(tmp_path / "out" / "comparison.json")) == without_seconds(compared.found)


def test_an_arm_whose_videos_alone_were_removed_goes_on(compared, tmp_path, capsys):
    shutil.copytree(compared.out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "videos" / "tuned")
    assert compare(tmp_path / "c.yaml", {**compared.config, "out": tmp_path / "out"}) == 0


def test_an_interrupted_comparison_goes_on(compared, world, tmp_path, monkeypatch, capsys):
    """The comparison stops in the second of two batches of the second arm."""
    arms = {"none": compared.config["arms"]["none"]}
    config = settings(world, tmp_path / "out", arms=arms)
    with monkeypatch.context() as patch:
        counted(patch, 3)
        assert compare(tmp_path / "c.yaml", config) == 1  # a fault of the program
    left = tmp_path / "out" / "videos"
    assert (left / "base").is_dir()
    assert (left / ".none.parts").is_dir()
    assert not (left / "none").exists()
    assert not (tmp_path / "out" / "comparison.json").exists()
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", config) == 0
    assert sizes == [2]
    assert not (left / ".none.parts").exists()
    assert videos(left / "none") == videos(compared.out / "videos" / "none")
    assert "arm 2 of 2: none" in capsys.readouterr().out


def test_interrupted_scoring_goes_on(compared, tmp_path, monkeypatch):
    shutil.copytree(compared.out, tmp_path / "out")
    file = tmp_path / "out" / "videos" / "nrg@1.rewards" / "rewards.0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]) + '{"key": "0')
    sizes, forward = [], VideoReward.forward
    monkeypatch.setattr(VideoReward, "forward", lambda self, *a, **k: (sizes.append(1), forward(self, *a, **k))[1])
    assert compare(tmp_path / "c.yaml", {**compared.config, "out": tmp_path / "out"}) == 0
    assert sizes == [1]
    again = strict_json(tmp_path / "out" / "comparison.json")
    for name, row in compared.found["arms"].items():  # one by one is scored in another batch
        assert again["arms"][name]["means"]["reward model"] == pytest.approx(row["means"]["reward model"], abs=1e-3)


@pytest.mark.parametrize("what", ["sampling", "samples", "prompts", "arms", "sweeps"])
def test_videos_of_other_settings_are_refused(what, compared, world, tmp_path, monkeypatch, capsys):
    config, before = json.loads(json.dumps(compared.config, default=str)), tree(compared.out)
    if what == "sampling":
        config["sampling"]["steps"] = 4
    elif what == "samples":
        config["samples"] = 3
    elif what == "prompts":
        (tmp_path / "p.txt").write_text(PROMPTS[1] + "\n")
        config["prompts"] = str(tmp_path / "p.txt")
    elif what == "arms":
        config["arms"]["both"]["guide"]["strength"] = 31.0
    else:
        config["sweeps"]["nrg"]["guide"]["end"] = 0.1
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", config) == 2
    message = capsys.readouterr().err
    name = {"arms": "both", "sweeps": "nrg@1"}.get(what, "base")
    assert message.count("videoalign: error:") == 1
    assert f"{name} holds videos of other settings" in message
    assert not sizes
    assert tree(compared.out) == before


def test_an_arm_may_be_added_later(compared, world, tmp_path, monkeypatch):
    shutil.copytree(compared.out, tmp_path / "out")
    later = {
        **compared.config,
        "out": tmp_path / "out",
        "arms": {**compared.config["arms"], "late": {"lora": world / "lora", "generator": world / "wan"}},
    }
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", later) == 0
    assert sizes == [2, 2]
    found = strict_json(tmp_path / "out" / "comparison.json")
    assert [*found["arms"]] == ["base", "none", "predicted", "tuned", "both", "late", "nrg@1", "nrg@30.5"]
    assert videos(tmp_path / "out" / "videos" / "late") == videos(tmp_path / "out" / "videos" / "tuned")


def test_the_base_alone_with_one_judge_and_one_sample(world, tmp_path):
    """Options on the command line win over the YAML file."""
    config = settings(world, tmp_path / "out", reward_model=None)
    assert compare(tmp_path / "c.yaml", config, "--samples", "1", "--sampling.steps", "2") == 0
    found = strict_json(tmp_path / "out" / "comparison.json")
    assert [*found["arms"]] == ["base"]
    assert found["samples"] == 1
    assert found["arms"]["base"]["means"].keys() == {"oracle"}
    assert not (tmp_path / "out" / "arms.png").exists()
    assert (tmp_path / "out" / "films.gif").exists()
    assert {record["steps"] for record in records(tmp_path / "out" / "videos" / "base").values()} == {2}


def test_one_sample_per_prompt_is_compared_by_the_same_noise(world, tmp_path):
    sweeps = {"s": {"noisy_reward": world / "nrg", "strengths": [30.0]}}
    config = settings(
        world, tmp_path / "out", oracle=None, samples=1, sweeps=sweeps, arms={"tuned": {"lora": world / "lora"}}
    )
    assert compare(tmp_path / "c.yaml", config) == 0
    found = strict_json(tmp_path / "out" / "comparison.json")
    assert [*found["arms"]] == ["base", "tuned", "s@30"]
    assert found["judge"] == "reward model"
    row = found["arms"]["tuned"]["against_base"]["reward model"]["Overall"]
    assert 0 <= row["win_rate"] <= 1
    assert row["superiority"] is None
    assert [*found["best_of"]] == ["1"]
    assert (tmp_path / "out" / "arms.png").stat().st_size > 1000
    assert (tmp_path / "out" / "sweep_s.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_model": None, "oracle": None}, "nobody judges"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"arms": {"a@1": {}}}, "arms: 'a@1' cannot be a name"),
        ({"arms": {"../a": {}}}, "arms: '../a' cannot be a name"),
        ({"arms": {"a.rewards": {}}}, "arms: 'a.rewards' cannot be a name"),
        ({"arms": {"a|b": {}}}, "arms: 'a|b' cannot be a name"),
        ({"arms": {"a\tb": {}}}, "arms: 'a\\tb' cannot be a name"),
        ({"arms": {"": {}}}, "arms: '' cannot be a name"),
        ({"arms": {"base": {"lora": "dpo"}}}, "arms: 'base' is the name of the plain generator"),
        ({"arms": {"a": None}}, "arms.a must be an Arm (its class_path and init_args), got null"),
        ({"sweeps": {"base": {"noisy_reward": "nrg", "strengths": [0, 1]}}}, "sweeps: 'base' is the name of"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": [1, 0]}}}, "strengths must be finite, ascend"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": [1, 1]}}}, "strengths must be finite, ascend"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": []}}}, "strengths must be finite, ascend"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": [1], "guide": {"weights": {"XX": 1.0}}}}}, "XX"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": [1], "guide": {"through": "clean"}}}}, "through"),
        ({"arms": {"a": {"strength": 3}}}, "strength"),
        ({"arms": {"a": {"guide": {"strength": -1.0}, "noisy_reward": "nrg"}}}, "strength"),
        ({"unheard_of": 3}, "unheard_of"),
        ({"sampling": {"num_frames": 9}}, "height"),
        ({"prompts": "none.txt"}, "none.txt"),
        ({"reward_model": "none"}, "none"),
        ({"oracle": "none.json"}, "none.json"),
        ({"generator": "./none"}, "none"),
        ({"sweeps": {"s": {"noisy_reward": "none", "strengths": [1]}}}, "none"),
        (
            {"arms": {"first": {}, "late": {"lora": "./none,scale=2"}}},
            "arm late: ./none: there is no such folder or file of adapters",
        ),
        ({"arms": {"first": {}, "late": {"noisy_reward": "./none"}}}, "arm late: ./none: there is no such folder"),
        ({"arms": {"first": {}, "late": {"generator": "./none"}}}, "arm late: ./none: there is no such folder"),
    ],
)
def test_compare_refuses(changes, words, world, tmp_path, monkeypatch, capsys):
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", settings(world, tmp_path / "out", **changes)) == 2
    message = capsys.readouterr().err
    assert message.count("videoalign: error:") == 1
    assert words in message
    assert "Traceback" not in message
    assert not sizes
    assert not (tmp_path / "out" / "comparison.json").exists()


@pytest.mark.parametrize("line", ["1: {}", "yes: {}", "null: {}"])
@pytest.mark.parametrize("key", ["arms", "sweeps", "judges"])
def test_a_name_that_yaml_reads_as_no_text_is_refused(key, line, world, tmp_path, capsys):
    config = {name: value for name, value in settings(world, tmp_path / "out").items() if name != key}
    value = {"arms": "{}", "sweeps": "{noisy_reward: nrg, strengths: [1]}"}.get(key)
    value = value or "{class_path: videoalign.commands.reward_judge.RewardJudge, init_args: {model: x}}"
    path = tmp_path / "c.yaml"
    path.write_text(
        f"{yaml.safe_dump(json.loads(json.dumps(config, default=str)))}{key}: {{{line.replace('{}', value)}}}\n"
    )
    assert call("compare", "--config", path) == 2
    message = capsys.readouterr().err
    assert f"{key}: a name is read as" in message and "put it in quotes" in message
    assert "Traceback" not in message


def test_videos_of_weights_that_were_replaced_are_refused(world, tmp_path, monkeypatch, capsys):
    """A LoRA, a noisy reward or a pipeline that was trained again lies at the same path as before."""
    for name in ("wan", "lora", "nrg"):
        shutil.copytree(world / name, tmp_path / name)
    arms = {"tuned": {"lora": f"{tmp_path / 'lora'},scale=0.5"}, "watched": {"noisy_reward": tmp_path / "nrg"}}
    config = settings(world, tmp_path / "out", reward_model=None, arms=arms, generator=tmp_path / "wan")
    assert compare(tmp_path / "c.yaml", config, "--samples", "1", "--sampling.steps", "1") == 0
    before = tree(tmp_path / "out" / "videos")
    sizes = counted(monkeypatch)
    for name, arm in (("wan", "base"), ("lora", "tuned"), ("nrg", "watched")):
        (file,) = sorted((tmp_path / name).glob("**/*.safetensors"))[:1]
        whole = file.read_bytes()
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        changed = {key: tensor + 1 for key, tensor in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(changed, file, metadata)
        assert compare(tmp_path / "c.yaml", config, "--samples", "1", "--sampling.steps", "1") == 2
        message = capsys.readouterr().err
        assert f"arm {arm}: {tmp_path / name} holds other weights than when" in message
        file.write_bytes(whole)
    assert not sizes and tree(tmp_path / "out" / "videos") == before
    for record in (tmp_path / "out" / "videos").glob("*.json"):  # of an earlier release, which did not look
        record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "weights"}))
    shutil.rmtree(tmp_path / "nrg")  # what is gone cannot differ
    assert compare(tmp_path / "c.yaml", config, "--samples", "1", "--sampling.steps", "1") == 0


@pytest.mark.parametrize("strengths", [[-1.0, 0.0, 1.0], [1e6, 1e6 + 1]], ids=["negative", "of one name"])
def test_no_strength_is_dropped_without_a_word(strengths):
    try:
        sweep = Sweep(noisy_reward="r", strengths=strengths)
    except VideoAlignError:
        return
    assert len(sweep.arms("s")) == sum(s != 0 for s in strengths)


def test_an_arm_with_a_guide_but_no_reward_is_refused(world, tmp_path):
    config = settings(world, tmp_path / "out", reward_model=None, arms={"a": {"guide": {"strength": 3.0}}})
    assert compare(tmp_path / "c.yaml", config) == 2


def test_a_mended_path_may_use_the_same_folder(world, tmp_path, capsys):
    """First the reward's folder is misspelt and nothing is sampled; the next call names it rightly."""
    wrong, right = ({"s": {"noisy_reward": world / name, "strengths": [1.0]}} for name in ("ngr", "nrg"))
    assert compare(tmp_path / "c.yaml", settings(world, tmp_path / "out", reward_model=None, sweeps=wrong)) == 2
    assert not list((tmp_path / "out" / "videos").glob("*/index.json"))
    assert compare(tmp_path / "c.yaml", settings(world, tmp_path / "out", reward_model=None, sweeps=right)) == 0


def test_prompts_that_the_oracle_cannot_judge_are_refused_before_the_work(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("a dog runs\n")
    sizes = counted(monkeypatch)
    config = settings(world, tmp_path / "out", reward_model=None, prompts=tmp_path / "p.txt")
    assert compare(tmp_path / "c.yaml", config) == 2
    assert "none of the miniature world" in capsys.readouterr().err
    assert not sizes


def test_each_sweep_is_held_against_the_base_as_its_own_reward_sees_it(world, tmp_path):
    """Two rewards that differ only in their zero give the same videos, hence the same gains."""
    sweeps = {
        name: {"noisy_reward": world / folder, "strengths": [30.0]}
        for name, folder in (("one", "nrg"), ("two", "moved"))
    }
    assert compare(tmp_path / "c.yaml", settings(world, tmp_path / "out", reward_model=None, sweeps=sweeps)) == 0
    assert videos(tmp_path / "out" / "videos" / "one@30") == videos(tmp_path / "out" / "videos" / "two@30")
    one, two = (strict_json(tmp_path / "out" / "comparison.json")["sweeps"][name]["gains"] for name in sweeps)
    assert one["oracle"] == two["oracle"]
    assert one["own view"] == pytest.approx(two["own view"], abs=1e-4)


def test_arms_of_a_sweep_carry_everything_but_the_strength():
    guide = Guidance(weights={"TA": 1.0}, every=2, through="predicted", strength=7.0)
    arms = Sweep(noisy_reward="r", strengths=[0, 0.5, 20], guide=guide, lora="l").arms("s")
    assert [*arms] == ["s@0", "s@0.5", "s@20"]
    assert arms.pop("s@0") == Arm(noisy_reward="r", lora="l")  # it only watches
    for name, arm in arms.items():
        assert isinstance(arm, Arm)
        assert (arm.noisy_reward, arm.lora, arm.generator) == ("r", "l", None)
        assert arm.guide == Guidance(weights={"TA": 1.0}, every=2, through="predicted", strength=float(name[2:]))


EXPERIMENTS = Path(videoalign.__file__).parent / "experiments"


@pytest.mark.parametrize("path", ["nrg/sweep.yaml", "sprites/compare.yaml"])
def test_shipped_comparisons_are_read(path, monkeypatch):
    """Nothing is sampled: the function is called with every name in the file, and that is all."""
    seen, told = {}, yaml.safe_load((EXPERIMENTS / path).read_text())

    @functools.wraps(module.compare)
    def record(**given):
        seen.update(given)

    monkeypatch.setattr(module, "compare", record)
    options = ["--out=o", "--prompts=p.txt", "--sampling.seed=9"]
    assert call("compare", "--config", EXPERIMENTS / path, *options) == 0
    assert (seen["out"], seen["prompts"], seen["sampling"].seed) == ("o", "p.txt", 9)
    assert {*(seen["arms"] or {})} == {*told.get("arms", {})}
    assert {*seen["sweeps"]} == {*told["sweeps"]}
    for name, sweep in seen["sweeps"].items():
        assert isinstance(sweep, Sweep)
        assert sweep.strengths == told["sweeps"][name]["strengths"]
        assert all(getattr(sweep.guide, key) == value for key, value in told["sweeps"][name].get("guide", {}).items())
    assert all(
        isinstance(arm, Arm) and arm.lora == told["arms"][name]["lora"] for name, arm in (seen["arms"] or {}).items()
    )


def test_help_needs_no_configuration(capsys):
    assert call("compare", "--help-all") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--generator", "--sweeps", "--sampling.steps"))

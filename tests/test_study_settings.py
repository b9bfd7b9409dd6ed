"""Settings of the study's trainings: a key that an experiment does not take is refused before any unit runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from videoalign import VideoAlignError
from videoalign.miniature.study import configured, steps
from videoalign.miniature.study.loop_size import LoopSize
from videoalign.miniature.study.paper import Paper
from videoalign.miniature.study.pipeline import Loop


@pytest.fixture
def loop(tmp_path):
    return Loop(tmp_path, LoopSize(), 0)


@pytest.mark.parametrize(
    "key", ["model.init_args.netwrok.init_args.template", "trainer.max_step", "data.init_args.trian", "model__loss"]
)
def test_a_wrong_key_is_one_message_before_any_work(key, loop, tmp_path):
    with pytest.raises(VideoAlignError, match=rf"rm/x \(experiments/sprites, reward_btt\): .*{key.split('.')[-1]}"):
        loop.reward_model("rm/x", "training", {key: "plain_shared"})
    assert not list(tmp_path.iterdir())


def test_a_wrong_key_of_nothing_is_refused_too(loop):
    """The parser ignores it."""
    with pytest.raises(VideoAlignError, match=r"rm/x .* no setting data.init_args.benchmark;"):
        loop.reward_model("rm/x", "training", {"data.init_args.benchmark": {}})


def test_an_experiments_own_folder_is_refused_too(loop, monkeypatch):
    """A judge of a cause once read the benchmarks that the recipe names."""
    monkeypatch.setattr(configured, "_sound", set())
    settings = loop.settings("rm/x", loop.reward_model("rm/x", "training", {}).run.args[2])
    del settings["data.init_args.benchmarks"]
    with pytest.raises(VideoAlignError, match=r"rm/x .*benchmarks is still .*runs/sprites/world/recent"):
        configured.check("rm/x", ["reward_btt"], settings)


def test_a_wrong_value_is_refused_too(loop):
    with pytest.raises(VideoAlignError, match=r"rm/x .*max_steps"):
        loop.reward_model("rm/x", "training", {"trainer.max_steps": 0.5})


def test_settings_that_tuning_will_choose_are_checked_before_it(tmp_path):
    wrong = {"data.init_args.weigths": {"TA": 1.0}}
    with pytest.raises(VideoAlignError, match=r"seed0/TA/dpo \(experiments/sprites, flow_sft \+ flow_dpo\): .*weigths"):
        Paper(tmp_path, LoopSize(), 0, "seed0").trained("TA/dpo", "dpo", "preferred", settings=wrong)


def test_each_combination_of_keys_is_parsed_once_and_draws_nothing(tmp_path, monkeypatch):
    parsed, run = [], configured.run
    monkeypatch.setattr(configured, "_sound", set())
    monkeypatch.setattr(configured, "run", lambda args, kind: parsed.append(args) or run(args, kind))
    before = torch.get_rng_state()
    for seed in range(2):
        Loop(tmp_path, LoopSize(), seed).base()
    assert len(parsed) == 6 and torch.equal(before, torch.get_rng_state())
    assert not list(tmp_path.iterdir())


def test_settings_are_those_of_the_unit_over_the_common_ones(loop):
    unit = loop.reward_model("rm/x", "training", {"seed_everything": 7, "trainer.max_steps": 5})
    result, experiments, settings, export = unit.run.args
    assert (result, experiments, export) == ("rm/x", ("reward_btt",), True) and unit.cost == 0.4 * 5
    assert settings["seed_everything"] == 7 and settings["data.init_args.seed"] == 0
    assert settings["trainer.logger.init_args.name"] == "rm/x"


@pytest.mark.parametrize(("described", "kept"), [([0.95], 0), ([0.9, 0.94], 1), ([0.8, 0.93, 0.9], 1), ([None], 0)])
def test_caption_pretraining_begins_again_until_clips_are_described(described, kept, tmp_path, monkeypatch):
    """Of the starts that are all too bad the best is kept; where nothing is held out, there is one."""
    taken = []

    def train(args):
        given = dict(arg[2:].split("=", 1) for arg in args if arg.startswith("--") and "=" in arg)
        out = Path(given["model.init_args.out"])
        out.mkdir(parents=True)
        (out / "start").write_text(str(len(taken)))
        taken.append((given["seed_everything"], given["data.init_args.seed"], given["model.init_args.backbone"]))
        value = described[len(taken) - 1]
        return SimpleNamespace(
            trainer=SimpleNamespace(callback_metrics={} if value is None else {"val/describes": value})
        )

    monkeypatch.setattr(steps, "run", train)
    unit = next(unit for unit in Loop(tmp_path, LoopSize(), 3).base() if unit.name == "backbone")
    unit.run()
    assert len(taken) == len(described) <= LoopSize().starts and (tmp_path / "backbone/start").read_text() == str(kept)
    assert [seeds[:2] for seeds in taken] == [(str(s), str(s)) for s in (3, 10003, 20003)[: len(taken)]]
    assert taken[0][2] == str(tmp_path / "random") and len({model for *_, model in taken}) == len(taken)
    assert not (tmp_path / "backbone-starts").exists()


def test_other_random_weights_are_a_whole_model_of_their_own(loop):
    for seed in (None, 7):
        loop.random_qwen(f"random-{seed}", seed=seed)
    one, other = (load_file(loop.folder / f"random-{seed}/model.safetensors") for seed in (None, 7))
    assert one.keys() == other.keys() and not all(torch.equal(one[name], other[name]) for name in one)

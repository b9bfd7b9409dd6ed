"""Cells (k) and (m): judges that differ in one respect, and the judge on the output of aligned generators."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from videoalign.datamodules.shards import ShardWriter
from videoalign.datamodules.video import encode
from videoalign.miniature.study.judge_causes import CAUSES, CLIPS_OF_PROMPT, PAIRS, STEPS, Cause
from videoalign.miniature.study.judge_cells import JudgeCells
from videoalign.miniature.study.judge_claims import JUDGED, claims, drop, further, orders, overstated
from videoalign.miniature.study.judge_tables import cause_tables, clips_figure, output_table
from videoalign.miniature.study.loop_size import LoopSize
from videoalign.miniature.study.paper import Paper
from videoalign.miniature.study.tuning_rounds import TUNED, first_round
from videoalign.miniature.study.units import Board
from videoalign.miniature.world.oracle import Oracle
from videoalign.miniature.world.output_accuracy import output_accuracy, ring_pairs
from videoalign.miniature.world.sprites import FPS, FRAMES, SCENES, SIZE, Flaws, render
from videoalign.models import VideoReward
from videoalign.models.files import write_json
from videoalign.models.video_reward import Statistics

PROMPTS = ["a"] * 16 + ["b"] * 7 + ["c"] * 3 + ["d"] * 2 + ["e"]


# --- accuracy on the clips of one generator -----------------------------------------------------------------------


def test_every_clip_is_in_equally_many_pairs_of_its_prompt():
    pairs = ring_pairs(PROMPTS, 4, seed=1)
    assert all(PROMPTS[a] == PROMPTS[b] and a != b for a, b in pairs)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)  # none twice
    times = Counter(number for pair in pairs for number in pair)
    assert [times[number] for number in range(len(PROMPTS))] == [4] * 23 + [2] * 3 + [1] * 2 + [0]
    assert pairs == ring_pairs(PROMPTS, 4, seed=1) != ring_pairs(PROMPTS, 4, seed=2)
    assert 0.3 < sum(a < b for a, b in pairs) / len(pairs) < 0.7  # sides are drawn


def test_a_judge_like_the_oracle_reaches_the_ceiling_and_its_opposite_the_rest():
    torch.manual_seed(0)
    quality, prompts = torch.rand(64, 3), ["a", "b", "c", "d"] * 16
    found = output_accuracy(quality, 2 * quality + 1, prompts, seed=3)
    assert found["judge"] == found["ceiling"] and min(found["ceiling"].values()) > 0.85
    turned = output_accuracy(quality, -quality, prompts, seed=3)
    assert turned["judge"] == pytest.approx({name: 1 - value for name, value in found["ceiling"].items()})
    assert turned["ceiling"] == found["ceiling"] and turned["decided"] == found["decided"]
    blind = quality.clone()
    blind[:, 1] = torch.rand(64)
    found = output_accuracy(quality, blind, prompts, seed=3)
    assert 0.3 < found["judge"]["MQ"] < 0.7 and found["judge"]["VQ"] == found["ceiling"]["VQ"]


def test_clips_that_are_all_alike_have_a_lower_ceiling():
    torch.manual_seed(1)
    quality, prompts = torch.rand(400, 3), ["a", "b", "c", "d"] * 100
    far, near = (output_accuracy(q, q, prompts) for q in (quality, 0.5 + 0.1 * (quality - 0.5)))
    assert all(near["ceiling"][d] < far["ceiling"][d] - 0.1 for d in far["ceiling"])
    assert all(near["decided"][d] < far["decided"][d] for d in far["decided"])


# --- (m) on files -------------------------------------------------------------------------------------------------


def write_clips(folder, seed, freeze):
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, "videos") as writer:
        for place, scene in enumerate(SCENES[:4]):
            for noise in range(5):
                flaws = Flaws(fade=float(rng.uniform(0, 0.9)), freeze=float(rng.uniform(0, freeze)))
                record = {"prompt": scene.prompt, "num_frames": FRAMES, "height": SIZE, "width": SIZE}
                writer.write(f"{place:05d}-{noise:03d}", {"": encode(render(scene, flaws, rng), FPS)}, record)


@pytest.fixture(scope="module")
def judged(tmp_path_factory, backbone, sampling):
    """A seed whose clips are sampled and compared, and what the cell leaves."""
    out = tmp_path_factory.mktemp("judged")
    seed = JudgeCells(out, LoopSize(), 0, "seed0")
    torch.manual_seed(0)
    network = VideoReward(backbone, template="plain", sampling=sampling, language="full")
    network.statistics = Statistics([0.0] * 3, [1.0] * 3)
    network.save_pretrained(seed.folder / "reward")
    Oracle.calibrated(clips=16).save(seed.folder / "oracle.json")
    for number, arm in enumerate(("base", "sft", "dpo")):
        write_clips(seed.folder / f"cells/aligned/videos/{arm}", number, 0.9)
    write_clips(seed.folder / "cells/nrg/videos/even@30", 3, 0.9)
    write_json(seed.folder / "cells/aligned/comparison.json", {"arms": {"base": {}, "sft": {}, "dpo": {}}})
    write_json(out / TUNED, {"nrg": {"strength": 30.0}})
    seed.output_cell()[0].run()
    return seed.folder, json.loads((seed.folder / "cells/outputs.json").read_text())


def test_the_cell_rates_the_clips_of_every_arm(judged):
    folder, found = judged
    assert list(found) == ["base", "sft", "dpo", "nrg"]
    for arm in found.values():
        assert arm.keys() == {"judge", "ceiling", "decided"}
        assert arm["ceiling"]["VQ"] > 0.8 and arm["judge"].keys() == arm["ceiling"].keys()
    assert (folder / "cells/aligned/videos/sft.rewards").is_dir()  # as the comparison keeps them


def test_the_cell_is_done_once_everything_that_it_reads_is(tmp_path):
    unit = Paper(tmp_path, LoopSize(), 0, "seed0").output_cell()[0]
    assert unit.name == "seed0/cells/outputs.json" and TUNED in unit.needs
    assert {f"seed0/cells/{name}/comparison.json" for name in ("aligned", "nrg")} < {*unit.needs}


# --- (k) ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """All units of a tuning seed, by name without its folder."""
    out = tmp_path_factory.mktemp("studied")
    one = Paper(out, LoopSize(), 1000, "tuning/seed1000")
    units = [*one.tuning([first_round()]), *one.cause_cells()]
    Board(out, units)  # names are unique, and every need is there
    return out / "tuning/seed1000", {unit.name.removeprefix("tuning/seed1000/"): unit for unit in units}


def test_judges_differ_from_the_loops_own_in_what_they_say(studied):
    folder, units = studied
    own = units["reward"].run.args[2]
    common = {"trainer.logger.init_args.name": "judges/{}"}
    changes = {
        "unaugmented": {"data.init_args.augment": "null"},
        "unmirrored": {"data.init_args.augment.init_args.flip": False},
        "turned": {"data.init_args.augment.init_args.transpose": True},
        **{
            name: {"model.init_args.network.init_args.folder": folder / f"judges/{name}-rendered"}
            for name in ("small-patches", "placeless", "undetailed")
        },
        "few-clips": {"data.init_args.train": folder / "judges/pairs/few-clips/train"},
        "unrendered": {"data.init_args.train": folder / "judges/pairs/unrendered/train"},
        **{
            f"clips-{clips}": {
                "data.init_args.train": folder / f"judges/pairs/clips-{clips}/train",
                "trainer.max_steps": min(STEPS, LoopSize().generated),
                "trainer.val_check_interval": min(STEPS, LoopSize().generated),
            }
            for clips in CLIPS_OF_PROMPT
        },
    }
    assert {*CAUSES} <= {*changes}
    for name, changed in changes.items():
        _, experiments, settings, export = units[f"judges/{name}"].run.args
        want = {**own, **changed, **{key: value.format(name) for key, value in common.items()}}
        assert settings == want and experiments == units["reward"].run.args[1] and export
        assert settings["data.init_args.val"] == folder / "rated/val"
        assert units[f"bench/judge-{name}"].needs == (f"tuning/seed1000/judges/{name}", "tuning/seed1000/generated")


def test_captions_of_a_cause_lead_to_its_judge(studied):
    folder, units = studied
    for name, changed in (
        ("placeless", {"data.init_args.places": False}),
        ("undetailed", {"data.init_args.detailed": 0}),
        (
            "small-patches",
            {
                "model.init_args.backbone": folder / "judges/small-patches-random",
                "data.init_args.data": folder / "world/captions",
            },
        ),
    ):
        captions, rendered = (units[f"judges/{name}-{part}"] for part in ("backbone", "rendered"))
        own = units["backbone"].run.args[2]
        told = {"trainer.logger.init_args.name", "model.init_args.out"}
        assert {k: v for k, v in captions.run.args[2].items() if own.get(k) != v and k not in told} == changed
        assert rendered.run.args[2]["model.init_args.network.init_args.backbone"] == folder / f"judges/{name}-backbone"
        assert f"tuning/seed1000/judges/{name}-backbone" in rendered.needs
        judge = units[f"judges/{name}"]
        assert f"tuning/seed1000/judges/{name}-rendered" in judge.needs and "reward_rendered" not in str(judge.needs)


def test_small_patches_have_a_model_and_frames_of_their_own(studied):
    folder, units = studied
    made = units["judges/small-patches-random"]
    assert made.run.args == ("judges/small-patches-random", 8)
    assert made.name in units["judges/small-patches-backbone"].needs
    rendered = units["judges/small-patches-rendered"].run.args[2]
    assert rendered["data.init_args.train"] == folder / "world/train"  # decoded at any size, not frames


def test_judges_of_more_or_fewer_clips_have_equally_many_ratings(studied):
    _, units = studied
    for clips in CLIPS_OF_PROMPT:
        _, samples, *numbers = units[f"judges/pairs/clips-{clips}"].run.args
        assert samples == "samples/pool" and numbers == [PAIRS, clips, PAIRS]
    assert units["samples/pool"].run.args[2] == CLIPS_OF_PROMPT[-1]
    assert units["judges/pairs/unrendered"].run.args[1:] == ("samples/rated", LoopSize().rated, None, 0)
    assert units["judges/pairs/few-clips"].run.args[1:] == (
        "samples/rated",
        LoopSize().rated,
        16,
        LoopSize().rated // 2,
    )
    assert not Cause("as it is", {"model.init_args.decay": "none"}).own_pairs


# --- claims, tables and figure on made-up findings ----------------------------------------------------------------


def rows(value, ceiling=0.9):
    return {who: dict.fromkeys(("VQ", "MQ", "TA", "Overall"), v) for who, v in (("judge", value), ("ceiling", ceiling))}


def found(fall=0.1, won=0.8, truly=0.6):
    def against(value):
        return {column: {"win_rate": value, "superiority": 0.5} for column in ("VQ", "MQ", "TA", "Overall")}

    arm = {"against_base": {"reward model": against(won), "oracle": against(truly)}}
    return {
        "outputs": {"base": rows(0.8), **{name: rows(0.8 - fall, 0.87) for name in JUDGED}},
        "aligned": {"arms": {name: arm for name in JUDGED if name != "nrg"}},
        "nrg": {"arms": {"even@30": arm}},
        "tuned": {"nrg": {"strength": 30.0}},
    }


def test_numbers_of_claims():
    one = found()
    assert orders("base")(one) == pytest.approx(0.8) and orders("base", "MQ", "ceiling")(one) == 0.9
    for arm in JUDGED:
        assert drop(arm)(one) == pytest.approx(0.1)
        assert further(arm, "TA")(one) == pytest.approx(0.07)  # the ceiling fell by .03
        assert overstated(arm)(one) == pytest.approx(0.2)
    assert len(claims()) == 3 * len(JUDGED) and len({claim.finding for claim in claims()}) == len(claims())
    assert all(claim.of(one) > 0 for claim in claims())
    for claim in claims():
        with pytest.raises(KeyError):
            claim.of({"aligned": {"arms": {}}})


def test_tables_and_figure():
    table = output_table({seed: found(fall=0.1 + 0.01 * seed) for seed in range(3)})
    assert "| base | 0.80 / 0.80 / 0.80; 0.800 ± 0.000 | 0.900 ± 0.000 |  |" in table
    assert "| +0.110 ± 0.025 | +0.080 ± 0.025 | 0.800 ± 0.000 | 0.600 ± 0.000 | +0.200 ± 0.000 |" in table
    assert "full training" not in table  # no seed has it

    def accuracies(value):
        return {"generated": {d: {"without_ties": value} for d in ("VQ", "MQ", "TA")}}

    judges = {
        seed: {
            "reward models": {f"judge-clips-{clips}": accuracies(0.6 + clips / 1000) for clips in CLIPS_OF_PROMPT}
            | {"judge-unaugmented": accuracies(0.7 - 0.01 * seed)},
            "judges": {"reward": accuracies(0.8)},
        }
        for seed in range(3)
    }
    table = cause_tables(judges)
    assert "| no mirrors and no shifts | 0.690 ± 0.025 | 0.690 ± 0.025 | 0.690 ± 0.025 | -0.110 ± 0.025 |" in table
    assert "| 48 | 0.648 ± 0.000 |" in table and "no rendered" not in table
    (axis,) = clips_figure(judges).axes
    assert axis.get_legend_handles_labels()[1] == ["VQ", "MQ", "TA"]
    assert cause_tables({}) == "" and clips_figure({0: {"reward models": {}, "judges": {}}}) is None

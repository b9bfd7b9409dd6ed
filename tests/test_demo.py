"""The whole loop at toy size: every stage feeds the next, what is there is not made again, a killed call goes on.

The cells of `paper`, the simulation of annotation and the on-policy study are tested on the finished demo.
"""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image

from chrome import BROWSER, needs_browser
from videoalign import VideoAlignError
from videoalign.annotation.simulate import Simulation
from videoalign.datamodules.shards import ShardSet
from videoalign.miniature.study import policy_page
from videoalign.miniature.study.demo import demo
from videoalign.miniature.study.demo_table import summary
from videoalign.miniature.study.loop_size import LoopSize
from videoalign.miniature.study.on_policy_study import units as policy_units
from videoalign.miniature.study.paper import Paper
from videoalign.miniature.study.paper_claims import ORACLE, RM
from videoalign.miniature.study.pipeline import ALIGNED
from videoalign.miniature.study.policy_findings import BASE, FIGURES, NAMES
from videoalign.miniature.study.policy_recipes import RECIPES
from videoalign.miniature.study.policy_searches import PLAIN, WAYS
from videoalign.miniature.study.policy_size import SHARES, PolicySize
from videoalign.miniature.study.policy_tuning import TUNED as POLICY_TUNED
from videoalign.miniature.study.policy_tuning import grid
from videoalign.miniature.study.policy_units import HELD, Policies
from videoalign.miniature.study.tuning import ALGORITHMS
from videoalign.miniature.study.tuning_rounds import TUNED
from videoalign.miniature.study.units import Board, leading_to
from videoalign.miniature.world.oracle import Oracle, OracleJudge
from videoalign.miniature.world.rendered_sets import WorldSize
from videoalign.models.files import read_json, read_results, write_json
from videoalign.models.flow import draw_seed
from videoalign.models.generator_folder import load_generator
from videoalign.models.noisy_reward import NoisyReward
from videoalign.models.preference import probabilities

pytestmark = pytest.mark.slow

TOY = {
    "world": {"train": 72, "val": 12, "benchmark_videos": 32, "benchmark_pairs": 16, "captions": 64, "clips": 64},
    "captions": 2, "starts": 2, "reward": 4, "generated": 2, "autoencoder": 6, "generator": 4, "noisy": 4, "align": 2,
    "samples": 2, "rated": 24, "benchmark": 2, "benchmark_pairs": 8, "fresh": 4, "judged": 2, "calibrated": 12,
    "checked": 24,
}  # fmt: skip

TOY_POLICIES = PolicySize(budget=240, noises=2, groups=1, samples=2, batch=2)
CHOSEN = {name: tried[0] for name, tried in grid(PolicySize()).items()}

SCRIPT = f"""
import sys
from videoalign import VideoAlignError
from videoalign.miniature.study.demo import demo
from videoalign.miniature.study.demo_table import summary
from videoalign.miniature.study.loop_size import LoopSize
from videoalign.miniature.world.rendered_sets import WorldSize
toy = {TOY!r}
if __name__ == "__main__":
    demo(sys.argv[1], 0, LoopSize(**{{**toy, "world": WorldSize(**toy["world"])}}))
"""


def toy_size():
    return LoopSize(**{**TOY, "world": WorldSize(**TOY["world"])})


def times(folder):
    """When each file was last written; the report and pictures are made anew by every call."""
    anew = {"report.html"}
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in anew and path.suffix != ".png"
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that was killed while the algorithms trained, and called again."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "toy.py").write_text(textwrap.dedent(SCRIPT))
    out = folder / "seed0"
    process = subprocess.Popen(
        [sys.executable, folder / "toy.py", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if "training SFT on the preferred" in line:
            break
    else:
        pytest.fail("the demo ended before it aligned a generator")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = times(out)
    done = subprocess.run(
        [sys.executable, folder / "toy.py", out],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, before, done.stdout


def test_a_killed_demo_goes_on_where_it_stopped(finished):
    out, before, printed = finished
    assert re.search(r"^(\d+) of \d+ stages were done before", printed)
    assert "rendering the world" not in printed
    after = times(out)
    kept = (
        "world/",
        "frames/",
        "backbone/",
        "reward_rendered/",
        "generator/",
        "samples/",
        "rated/",
        "reward/",
        "preferred/",
    )
    old = {path: t for path, t in before.items() if str(path.relative_to(out)).startswith(kept)}
    assert len(old) > 50
    assert all(after[path] == t for path, t in old.items())


def test_every_stage_leaves_what_the_next_one_reads(finished):
    out, _, _ = finished
    generator = load_generator(str(out / "generator"))
    for name in ALIGNED:
        generator.pipeline.load_lora_weights(str(out / name))
        generator.pipeline.unload_lora_weights()
    NoisyReward.from_pretrained(out / "noisy_reward", generator)
    Oracle.load(out / "oracle.json")
    assert ShardSet(out / "rated/train").index.kind == "pairs"
    assert ShardSet(out / "latents/preferred").index.latents["of"] == "pairs"
    assert ShardSet(out / "latents/fresh").index.latents["of"] == "videos"
    compared = json.loads((out / "compared/comparison.json").read_text())
    assert {*ALIGNED, "base", "nrg@1", "nrg-text@30"} <= compared["arms"].keys()
    assert list((out / "tensorboard").rglob("events.*"))
    assert list((out / "compared/tensorboard").glob("events.*"))


def test_no_prompt_of_the_comparison_was_trained_on(finished):
    out, _, _ = finished
    unseen = set((out / "world/unseen.txt").read_text().splitlines())
    for name in ("world/train", "world/val", "world/clips", "rated/train", "preferred", "samples/fresh"):
        assert not unseen & {content.record["prompt"] for content in ShardSet(out / name).contents()}, name


def test_labels_reach_training_but_no_oracle_numbers(finished):
    out, _, _ = finished
    for content in ShardSet(out / "rated/train").contents():
        if content.key.startswith("g"):
            assert "quality" not in content.record
            assert {"labels", "votes", "scores"} <= content.record.keys()


def test_a_second_call_does_nothing(finished, capsys):
    out, _, _ = finished
    before = times(out)
    demo(out, 0, toy_size())
    assert times(out) == before
    assert "report.html" in capsys.readouterr().out


def test_another_seed_wants_another_folder(finished):
    out, _, _ = finished
    before = times(out)
    with pytest.raises(VideoAlignError, match=r"seed 0, here 1.*another --out"):
        demo(out, 1, toy_size())
    assert times(out) == before


def test_the_report_holds_every_section_and_sound_pictures(finished):
    out, _, _ = finished
    page = (out / "report.html").read_text()
    sections = re.findall("<h2>(.*?)</h2>", page)
    assert len(sections) == 9
    assert not re.search(r'(src|href)="(?!data:)', page)
    pictures = re.findall(r'src="data:image/(gif|png);base64,([^"]+)"', page)
    assert len(pictures) == page.count("<img") > 30
    for kind, content in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert image.format.lower() == kind
        image.load()


def test_the_clips_that_lead_the_report_are_the_quartiles_of_the_gain(finished):
    out, _, _ = finished
    compared = json.loads((out / "compared/comparison.json").read_text())
    best = max(
        (name for name in compared["arms"] if name not in ("base", "control")),
        key=lambda name: compared["arms"][name]["against_base"]["oracle"]["Overall"]["superiority"],
    )
    sets = [ShardSet(out / "compared/videos" / name) for name in ("base", best)]
    keys, judge = sorted(content.key for content in sets[0].contents()), OracleJudge(str(out / "oracle.json"))
    rated = [torch.stack([*judge.rate_set(videos, keys, out).values()], 1).sum(1) for videos in sets]
    gains = sorted((rated[1] - rated[0]).tolist())
    page = (out / "report.html").read_text()
    shown = re.findall(r"gives the right clip ([\d.]+) (more|less)", page)
    want = [gains[round(share * (len(gains) - 1))] for share in (0.25, 0.5, 0.75)]
    assert shown == [(f"{abs(gain):.2f}", "more" if gain >= 0 else "less") for gain in want]
    assert page.count("<section>") == 3 and page.count(f'alt="{best}: VQ') == 3


def test_a_terminal_ends_with_the_sentence_the_table_and_the_paths(finished):
    out, _, printed = finished
    said = printed[printed.index("Motion quality rose with") :]
    assert " ".join(said.split()).startswith(summary(read_results(out / "compared/comparison.json", "a demo")))
    assert said.index("\nbase ") < said.index("\nnrg@100 ") < said.index("\nreport ") < said.index("\ncurves ")


@needs_browser
def test_a_browser_shows_the_report(finished, tmp_path):
    out, _, _ = finished
    shot = tmp_path / "page.png"
    subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=390,4000",
            f"--screenshot={shot}",
            (out / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    picture = Image.open(shot).convert("RGB")
    assert len(picture.getcolors(maxcolors=2**24)) > 500  # clips and charts are drawn


@pytest.fixture(scope="module")
def cells(finished):
    """Some cells of the paper, with a finished demo as their only seed."""
    out, _, _ = finished
    settings = {name: {"lr": 1e-4, "beta": 30.0} if "dpo" in name else {"lr": 1e-4} for name in ALGORITHMS}
    write_json(out / TUNED, {**settings, "nrg": {"strength": 10.0}})
    units = {unit.name: unit for unit in Paper(out, toy_size(), 0).cells()}

    def make(name):
        for need in units[name].needs if name in units else ():
            make(need)
        if not (out / name).exists():
            units[name].run()
        return out / name

    return out, make


def test_a_share_of_the_pairs_trains_a_reward_model(cells):
    _, make = cells
    accuracies = json.loads((make("bench/bt-10") / "accuracies.json").read_text())
    assert set(accuracies) == {"recent", "older"}
    assert "without_ties" in accuracies["recent"]["VQ"]


def test_a_foreign_prompt_moves_no_reward_that_stands_before_it(cells):
    """Separate tokens keep VQ and MQ blind to the prompt, exactly; a shared token does not (section 3.2)."""
    _, make = cells
    moved = json.loads(make("cells/prompts.json").read_text())
    assert moved["separate"]["VQ"] == moved["separate"]["MQ"] == 0 < moved["separate"]["TA"]
    assert min(moved["shared"].values()) > 0


def test_full_training_leaves_a_pipeline_and_adapters_an_adapter(cells):
    _, make = cells
    load_generator(str(make("aligned/dpo-full")))
    assert list(make("aligned/dpo").glob("*.safetensors"))
    assert not (make("aligned/dpo") / "model_index.json").exists()


def test_text_alignment_alone_trains_on_pairs_that_differ_in_it(cells):
    """The unit's own margin is .3; a judge of four steps tells a prompt's clips apart by less."""
    out, _ = cells
    units = {unit.name: unit for unit in Paper(out, toy_size(), 0).cells()}
    result, samples, mode, weights, margin, judge = units["preferred_ta"].run.args
    assert (result, mode, weights.TA, weights.VQ, weights.MQ, margin) == ("preferred_ta", "margin", 1, 0, 0, 0.3)
    assert units["latents/preferred_ta"].needs == ("preferred_ta", "generator")
    Paper(out, toy_size(), 0).prefer(result, samples, mode, weights, 1e-4, judge)
    pairs = [content.record for content in ShardSet(out / "preferred_ta").contents()]
    assert pairs
    for record in pairs:
        gap = record["rewards"]["A"]["TA"] - record["rewards"]["B"]["TA"]
        assert abs(gap) > 1e-4
        assert record["labels"]["TA"] == ("A" if gap > 0 else "B")


def test_rendered_pairs_are_labelled_by_the_reward_model_only(cells):
    out, make = cells
    make("conditions/rendered-control")
    make("conditions/rendered-dpo")
    pool, taught = ShardSet(out / "pools/rendered"), (out / "world/prompts.txt").read_text().splitlines()
    prompts = [content.record["prompt"] for content in pool.contents()]
    assert set(prompts) <= set(taught)
    assert max(map(prompts.count, taught)) <= TOY["fresh"]
    assert not any("quality" in content.record for content in pool.contents())
    assert all("rewards" in content.record for content in ShardSet(out / "pairs/rendered").contents())


def test_uncertain_pairs_first_are_what_the_last_model_did_not_know(finished):
    """Choices grow from round to round and all orders begin alike.

    The last model's ties, or the disputes of two models, come first.
    """
    out, _, _ = finished
    simulation = Simulation(out, toy_size(), 0, labels=(24, 36), pool=60)
    units = simulation.units()
    for unit in units:
        if not (out / unit.name).exists():
            unit.run()
    names = ("start-24", "random-36", "uncertain-36", "disagreement-36")
    start, *rounds = ((out / f"active/{name}.txt").read_text().split() for name in names)
    assert all(keys[:24] == start and len({*keys}) == 36 for keys in rounds)
    pool = sorted(
        (content.key for content in ShardSet(out / "world/train").contents()), key=lambda key: draw_seed(0, "pool", key)
    )[:60]
    assert {*rounds[0]} == {*pool[:36]}
    rest = [key for key in pool if key not in start]
    (first, scale), (second, other) = (
        simulation._margins(f"active/start-24{which}", rest) for which in ("", "-second")
    )
    ties = probabilities(first, 5.0)[..., 1].mean(1)
    assert {*rounds[1][24:]} == {rest[i] for i in ties.topk(12).indices}
    disputes = (first / scale - second / other).abs().mean(1)
    assert disputes.min() > 0
    assert {*rounds[2][24:]} == {rest[i] for i in disputes.topk(12).indices}
    assert len({frozenset(keys) for keys in rounds}) == 3  # or the orders would not differ
    found = simulation.found()
    assert len({row[24] for row in found.values()}) == 1
    assert all(0 <= v <= 1 for row in found.values() for v in row.values())


# --- the on-policy study goes on from it ------------------------------------------------------------------------------


def do(out, made):
    """Do units one after the other in this process."""
    board = Board(out, made)
    while left := board.left():
        next(unit for unit in left if all(map(board.done, unit.needs))).run()


@pytest.mark.parametrize("name", RECIPES)
def test_counted_evaluations_are_those_of_the_rule(name, finished, monkeypatch):
    """Four optimizer steps of each algorithm; PRFL may need fewer than the rule says, because it draws its steps."""
    steps = {"quarter": 1, "half": 2, "full": 4}
    module = Policies.trained.__globals__
    monkeypatch.setitem(module, "steps_of", lambda *_: steps)
    monkeypatch.setitem(module, "spent", lambda *_: {"full": 0.0})
    out = finished[0]
    one = Policies(out.parent, toy_size(), 0, out.name, TOY_POLICIES)
    unit = one.trained(f"counted/{name}", name, CHOSEN[name])
    do(out.parent, leading_to([*one.base(), unit], [unit.name]))
    for share, step in steps.items():
        folder = out / "counted" / name / share
        found = read_json(folder / "evaluations.json", "a count")
        rule = step * RECIPES[name].step(TOY_POLICIES)
        assert found["steps"] == step and (folder / "pytorch_lora_weights.safetensors").exists()
        if name == "prfl":
            assert 0.4 * rule < found["evaluations"] <= rule + 2 * 14.5
        else:
            assert found["evaluations"] == rule


def test_a_seed_from_the_loop_to_the_page(finished, monkeypatch):
    """With one algorithm that needs no pairs, and one search."""
    for kind in (RECIPES, WAYS):
        for name in {*kind} - {"online-dpo", "smc"}:
            monkeypatch.delitem(kind, name)
            monkeypatch.delitem(NAMES, name)
    base = finished[0].parent
    write_json(base / POLICY_TUNED, CHOSEN)
    do(base, policy_units(base, toy_size(), TOY_POLICIES, [0]))
    found = policy_page.write_page(base, [0], toy_size(), TOY_POLICIES)["seeds"][0]
    assert {*found["compared"]} == {*SHARES} and {*found["counted"]} == {*RECIPES}
    full = found["compared"]["full"]["arms"]
    assert {*full} == {BASE, PLAIN, *RECIPES, *WAYS}
    assert {*full["online-dpo"]["means"]} == {HELD, RM, ORACLE} and "own view" in full["smc"]["means"]
    assert full["smc"]["evaluations"] == 2 * 26.5
    assert "| SMC |" in (base / policy_page.PAGE).read_text() and (base / FIGURES / "curves.png").exists()

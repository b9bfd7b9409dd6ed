"""Reproducing the paper: claims, intervals, verdicts and the page, on made-up findings."""

import json
import math
import re
import shutil
from dataclasses import asdict
from inspect import signature
from pathlib import Path

import pytest
from scipy import stats

from videoalign import VideoAlignError
from videoalign.miniature.study import paper as paper_module
from videoalign.miniature.study.judge_cells import STUDIED
from videoalign.miniature.study.judge_claims import JUDGED
from videoalign.miniature.study.loop_size import LoopSize, begin
from videoalign.miniature.study.paper import Paper, paper, units
from videoalign.miniature.study.paper_cells import CELLS, CLAIMS
from videoalign.miniature.study.paper_claims import BETAS, GUIDES, ORACLE, POOLS, RM, SHARES, STRENGTHS, Claim
from videoalign.miniature.study.paper_findings import COMPARISONS, earlier, findings, over_seeds
from videoalign.miniature.study.paper_page import write_page
from videoalign.miniature.study.paper_verdicts import WORDS, by_chance, decided, tally, verdicts
from videoalign.miniature.study.pipeline import Loop
from videoalign.miniature.study.rater_claims import BIASES, model_name
from videoalign.miniature.study.tuning import choose, planned
from videoalign.miniature.study.tuning_rounds import (
    GRIDS,
    TRIED,
    TUNED,
    TUNING,
    TUNING_SEEDS,
    first_round,
    tuning_place,
)
from videoalign.miniature.study.units import Board
from videoalign.models.files import write_json
from videoalign.models.intervals import Interval
from videoalign.models.published import TABLE_2, TABLE_6, VIDEOREWARD

COLUMNS = ("VQ", "MQ", "TA", "Overall")


def test_the_interval_is_students():
    values = (0.1, 0.3, 0.35, 0.2)
    interval = Interval.over(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / 4, scale=stats.sem(values))
    assert interval.mean - interval.half == pytest.approx(low)
    assert interval.mean + interval.half == pytest.approx(high)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.3, 0.31, 0.29), "reproduced"),
        ((-0.3, -0.31, -0.29), "not reproduced"),
        ((0.3,), "undecided (1 of 1 seeds for it)"),
        ((0.3, -0.2, 0.1), "undecided (2 of 3 seeds for it)"),
        ((0.0, 0.0), "undecided (0 of 2 seeds for it)"),
    ],
)
def test_verdicts(values, verdict):
    assert Interval.over(values).verdict(WORDS[True]) == verdict


def test_one_seed_has_no_interval():
    interval = Interval.over((0.5,))
    assert math.isinf(interval.half) and math.isinf(interval.high) and str(interval) == "0.500"


def rates(value, columns=None):
    """The win rates of one arm by both judges; some columns may have others."""
    won = {
        c: {"win_rate": v, "superiority": v} for c, v in {**dict.fromkeys(COLUMNS, value), **(columns or {})}.items()
    }
    halves = [{c: {k: v + d for k, v in w.items()} for c, w in won.items()} for d in (-0.01, 0.01)]
    return {
        "means": {ORACLE: dict.fromkeys(COLUMNS, value)},
        "best_of": {"difference": value - 0.5, "draws": 2.0},
        "against_base": {RM: won, ORACLE: {c: {**w, "win_rate": w["win_rate"] - 0.01} for c, w in won.items()}},
        "halves": dict.fromkeys((RM, ORACLE), halves),
    }


def accuracies(value):
    return {
        b: {c: {"without_ties": value, "with_ties": value} for c in COLUMNS} for b in ("recent", "older", "generated")
    }


def seed_folder(out, seed, shift=0.0):
    """Everything that a seed leaves, in which the whole paper is right."""
    place = out / f"seed{seed}"
    for name, value in {"reg": 0.6, "bt": 0.7, "btt": 0.75}.items():
        write_json(place / f"bench/{name}/accuracies.json", accuracies(value + shift))
    for share in SHARES:
        for name, value in {"reg": 0.5, "bt": 0.55}.items():
            write_json(place / f"bench/{name}-{100 * share:g}/accuracies.json", accuracies(value + share / 10))
    for bias in BIASES:  # raters' bias costs regression, less where scores are standardised
        for loss, value in {"bt": 0.7, "btt": 0.75, "reg": 0.66 - bias / 10, "std": 0.665 - bias / 20}.items():
            write_json(place / f"bench/{model_name(loss, bias)}/accuracies.json", accuracies(value + shift))
    write_json(place / "bench_reward_rendered/accuracies.json", accuracies(0.8 + shift))
    write_json(place / "bench_reward/accuracies.json", accuracies(0.9 + shift))
    moved = {"separate": {"VQ": 0.0, "MQ": 0.0, "TA": 0.5}, "shared": {"VQ": 0.2, "MQ": 0.1, "TA": 0.5}}
    write_json(place / "cells/prompts.json", moved)
    table = {"sft": (0.62, 0.7, 0.46), "rwr": (0.59, 0.68, 0.48), "dpo-time": (0.8, 0.9, 0.3), "dpo": (0.9, 0.8, 0.7)}
    order = {"control": 0.5, "sft": 0.6, "rwr": 0.65, "dpo-time": 0.66, "dpo": 0.8, "sft-full": 0.55, "dpo-full": 0.4}
    alone = {"sft": 0.54, "rwr": 0.49, "dpo-time": 0.56, "dpo": 0.65}
    arms = {
        name: rates(value + shift, dict(zip(COLUMNS, (v + shift for v in table.get(name, ())))))
        for name, value in order.items()
    }
    for cell, found in (("aligned", arms), ("ta", {name: rates(value + shift) for name, value in alone.items()})):
        write_json(
            place / f"cells/{cell}/comparison.json",
            {"arms": {"base": {"means": {ORACLE: dict.fromkeys(COLUMNS, 0.5)}}, **found}, "prompts": 8, "samples": 16},
        )
    base = {"base": {"means": {ORACLE: dict.fromkeys(COLUMNS, 0.5)}}}
    betas = {f"{name}-{b:g}": rates(v) for name, v in (("constant", 0.7), ("time", 0.6)) for b in BETAS}
    write_json(place / "cells/beta/comparison.json", {"arms": {**base, **betas}})
    guided = {
        f"{name}@{s:g}": rates(0.4 if name.startswith("clean") else 0.7) for name in GUIDES for s in STRENGTHS[1:]
    }
    for s in STRENGTHS[1:]:
        for judge in (RM, ORACLE):
            guided[f"vq-mq@{s:g}"]["against_base"][judge]["TA"] = {"win_rate": 0.3, "superiority": 0.3}
    write_json(place / "cells/nrg/comparison.json", {"arms": {**base, **guided}})
    pools = {
        f"{pool}-{name}": rates(v)
        for pool in POOLS
        for name, v in (("control", 0.6), ("sft", 0.6), ("rwr", 0.65), ("dpo", 0.8))
    }
    write_json(place / "cells/conditions/comparison.json", {"arms": {**base, **pools}})
    rows = dict.fromkeys(JUDGED, 0.7 + shift) | {"base": 0.8}
    outputs = {
        name: {"judge": dict.fromkeys(COLUMNS, value), "ceiling": dict.fromkeys(COLUMNS, 0.9)}
        for name, value in rows.items()
    }
    write_json(place / "cells/outputs.json", outputs)
    write_json(place / "oracle_check.json", {"renders": {"VQ": 0.95, "MQ": 0.96, "TA": 0.94}})
    write_json(out / TUNED, {"sft": {"lr": 1e-3}, "nrg": {"strength": 30.0}})


def test_tables_that_the_paper_prints_twice_agree():
    """The last variant of Table 6 is the reward model of Table 2."""
    twice = {column: rows[VIDEOREWARD] for column, rows in TABLE_2["videogen-rewardbench"].items()}
    assert TABLE_6["separate"] == {**twice, "GenAI-Bench": TABLE_2["genai-bench"]["Overall"][VIDEOREWARD]}


def test_every_finding_has_one_primary_row_which_the_rule_names():
    """It was fixed before any result: oracle, without ties, the tuned strength, the mean of a curve."""
    findings_of = {}
    for claim in CLAIMS:
        findings_of.setdefault(claim.finding, []).append(claim)
    for (family, statement), rows in findings_of.items():
        primary = [claim for claim in rows if claim.primary]
        assert len(primary) == 1, statement
        assert primary[0].cell in CELLS
        assert primary[0].paper or family.startswith("our own")
        texts = [claim.text for claim in rows]
        for word in ("oracle, other noise", "tuning chose", "mean over", "without ties"):
            if any(word in text for text in texts):
                assert word in primary[0].text, texts
    families = [{c.finding[0] for c in CLAIMS if c.primary and bool(c.paper) == paper} for paper in (True, False)]
    assert not families[0] & families[1]
    assert len(CLAIMS) > 2 * len(findings_of) > 130


def made_up(values, family="Table 3", number=0, **more):
    """A claim whose number is one of the findings' own."""
    return Claim("d", f"statement {family} {number}", "1 / 2", lambda f, k=(family, number): f[k], family, **more), {
        seed: {(family, number): value} for seed, value in enumerate(values)
    }


def merged(*parts):
    found = {}
    for _, seeds in parts:
        for seed, one in seeds.items():
            found.setdefault(seed, {}).update(one)
    return [claim for claim, _ in parts], found


def test_families_are_corrected_and_secondary_rows_do_not_count():
    """Of three p-values of .01, .02 and .2 Holm decides the first two in a family of three, .04 fails beside them."""

    def runs(p, seeds=5):  # values whose t-test has just this p-value
        spread = [-1.0, -0.5, 0.0, 0.5, 1.0]
        error = stats.sem(spread)
        return [float(0.1 * (v + stats.t.isf(p / 2, seeds - 1) * error)) for v in spread]

    family = [made_up(runs(p), "A", number) for number, p in enumerate((0.01, 0.02, 0.2))]
    other = [made_up(runs(0.04), "B", 0), made_up(runs(1e-6), "B", 1, primary=False), made_up([], "B", 2)]
    rows = {row["claim"]: row for row in verdicts(*reversed(merged(*family, *other)))}
    adjusted = [rows[f"statement A {n}"]["adjusted"] for n in range(3)]
    assert adjusted == pytest.approx([0.03, 0.04, 0.2])
    assert [rows[f"statement A {n}"]["verdict"].split(" ")[0] for n in range(3)] == [*["reproduced"] * 2, "undecided"]
    # a finding that has no result yet counts in its family
    assert rows["statement B 0"]["adjusted"] == pytest.approx(0.08)
    assert "decided but for the correction" in rows["statement B 0"]["verdict"]
    assert rows["statement B 1"]["verdict"] == "" and rows["statement B 1"]["alone"] == "yes"
    assert len(decided(rows.values())) == 4
    assert tally([*rows.values()]).startswith("4 findings of the paper (2 reproduced, 0 not reproduced, 2 undecided)")
    assert "4 have its sign; chance alone would give 2." in by_chance([*rows.values()])


def test_an_undecided_finding_says_that_its_difference_is_small():
    small, large = made_up([0.001, -0.001, 0.002], "A", 0), made_up([0.1, -0.1, 0.2], "A", 1)
    other = made_up([0.001, -0.001, 0.002], "A", 2, rate=False)
    rows = verdicts(*reversed(merged(small, large, other)))
    assert ["less than 0.05 either way" in row["verdict"] for row in rows] == [True, False, False]
    assert ["power" in row for row in rows] == [True, True, False]


def test_noise_of_the_judged_videos_is_told_from_differences_between_seeds(tmp_path):
    for seed in range(3):
        seed_folder(tmp_path, seed, shift=0.02 * seed)
    found = {seed: findings(tmp_path, seed) for seed in range(3)}
    rows = decided(verdicts(found))
    power = rows["Table 3, against the base", "Flow-DPO raises VQ"]["power"]
    # halves differ by .02 in every seed, so that the noise has a variance of .0001; seeds have .0004 in all
    assert power["split"] and power["videos"] == 128 and power["deviation"] == pytest.approx(0.02)
    assert (power["within"] / 128, power["between"]) == pytest.approx((0.0001, 0.0003))
    order = rows["Table 3, order", "Flow-DPO above SFT, mean of VQ, MQ and TA"]["power"]
    assert order["split"] and order["within"] == 0  # both arms rise by the same in the same half
    assert not rows["Table 6", "BT orders better than regression, overall"]["power"]["split"]
    for one in found.values():  # results of an earlier version
        for cell in COMPARISONS:
            for arm in one[cell]["arms"].values():
                arm.pop("halves", None)
    assert not any(row["power"]["split"] for row in verdicts(found) if "power" in row)


def test_where_the_paper_is_right_every_claim_is_reproduced_or_confirmed(tmp_path):
    for seed in range(3):
        seed_folder(tmp_path, seed, shift=0.001 * seed)
    rows = verdicts({seed: findings(tmp_path, seed) for seed in range(3)})
    assert len(rows) == len(CLAIMS)
    assert {row["cell"] for row in rows} == set("abcdefghijlm")
    wrong = [r["claim"] for r in rows if r["primary"] and r["verdict"] != ("reproduced" if r["paper"] else "confirmed")]
    assert not wrong
    assert all(row["alone"] == "yes" and not row["verdict"] for row in rows if not row["primary"])
    assert len({(row["cell"], row["claim"]) for row in rows}) == len(rows)


def test_where_it_is_wrong_the_claim_is_not(tmp_path):
    for seed in range(3):
        seed_folder(tmp_path, seed, shift=0.001 * seed)
        path = tmp_path / f"seed{seed}/bench/bt/accuracies.json"
        write_json(path, accuracies(0.5 + 0.001 * seed))
    rows = {row["claim"]: row["verdict"] for row in verdicts({seed: findings(tmp_path, seed) for seed in range(3)})}
    assert rows["BT orders better than regression, overall, without ties"] == "not reproduced"
    assert rows["BTT is more accurate than BT with ties, VQ"] == "reproduced"


def test_a_seed_without_a_cell_speaks_of_the_others_only(tmp_path):
    seed_folder(tmp_path, 0)
    write_json(tmp_path / "seed1/bench/reg/accuracies.json", accuracies(0.6))
    found = {seed: findings(tmp_path, seed) for seed in range(2)}
    assert over_seeds(found, lambda f: f["reward models"]["reg"]["recent"]["VQ"]["without_ties"]).runs == (0.6, 0.6)
    assert len(over_seeds(found, lambda f: f["aligned"]["arms"]["dpo"]["means"][ORACLE]["VQ"]).runs) == 1
    assert over_seeds(found, lambda f: f["nothing"]) is None


def test_the_page_has_every_cell_every_figure_and_the_numbers(tmp_path, capsys):
    for seed in range(2):
        seed_folder(tmp_path, seed, shift=0.01 * seed)
    results = write_page(tmp_path, range(2), LoopSize())
    text = (tmp_path / "RESULTS.md").read_text()
    assert [line[4] for line in text.splitlines() if line.startswith("## (")] == list("abcdefghijlm")
    figures = [part.split(")")[0] for part in text.split("](")[1:] if ".png" in part.split(")")[0]]
    assert len(figures) == 6
    assert all((tmp_path / figure).stat().st_size > 5000 for figure in figures)
    stored = json.loads((tmp_path / "docs/results/results.json").read_text())
    assert len(stored["verdicts"]) == len(CLAIMS) == len(results["verdicts"]) and set(stored["seeds"]) == {"0", "1"}
    assert "nan" not in text and "inf" not in text and "interval" not in json.dumps(stored)
    assert "72.58 / 70.16" in text and "RESULTS.md" in capsys.readouterr().out
    # the paper's numbers are rounded as people do: 53.55 to 53.6, 66.50 to 67
    assert "| 72.1 / 53.6 |" in text and "| 61 / 76 / 46 |" in text and text.count("| 67 / 64 / 61 |") == 3
    assert not re.search(r"\n\n\n|\{\{|\{%", text) and text.endswith(" |\n\n</details>\n")


def test_a_page_of_one_seed_decides_nothing(tmp_path):
    seed_folder(tmp_path, 0)
    rows = write_page(tmp_path, range(1), LoopSize())["verdicts"]
    assert all(row["verdict"].startswith("undecided") for row in rows if row["primary"])
    assert "make at least 5" in (tmp_path / "RESULTS.md").read_text()


def test_seeds_of_another_machine_join_the_page(tmp_path):
    """Nothing but their results.json is needed."""
    for seed in range(3):
        seed_folder(tmp_path / "there", seed, shift=0.001 * seed)
    seed_folder(tmp_path / "here", 3, shift=0.003)
    write_page(tmp_path / "there", range(3), LoopSize())
    (tmp_path / "here/docs/results").mkdir(parents=True)
    shutil.copy(tmp_path / "there/docs/results/results.json", tmp_path / "here/docs/results")
    results = write_page(tmp_path / "here", range(3, 4), LoopSize())
    assert [*results["seeds"]] == [0, 1, 2, 3]
    assert all(len(row["values"]) == 4 for row in results["verdicts"])


def test_a_folder_that_holds_less_takes_nothing_from_what_is_known(tmp_path):
    """A seed's folder was begun anew, beside results of this seed that came from elsewhere."""
    for seed in range(2):
        seed_folder(tmp_path, seed, shift=0.01 * seed)
    before = write_page(tmp_path, range(2), LoopSize())
    for name in ("cells/aligned", "bench/reg", "bench_reward"):
        shutil.rmtree(tmp_path / "seed0" / name)
    write_json(tmp_path / "seed0/bench/bt/accuracies.json", accuracies(0.123))  # made anew
    after = write_page(tmp_path, range(2), LoopSize())
    assert len(after["verdicts"]) == len(before["verdicts"])
    assert after["seeds"][0]["reward models"].pop("bt") != before["seeds"][0]["reward models"].pop("bt")
    assert after["seeds"] == before["seeds"]


def test_a_page_of_the_first_cell_alone(tmp_path):
    """Other cells, the oracle's check among them, may come much later."""
    seed_folder(tmp_path / "all", 0)
    shutil.copytree(tmp_path / "all/seed0/cells/nrg", tmp_path / "some/seed0/cells/nrg")
    write_page(tmp_path / "some", range(2), LoopSize())
    text = (tmp_path / "some/RESULTS.md").read_text()
    assert [line[4] for line in text.splitlines() if line.startswith("## (")] == ["g"]
    assert "not yet" in text


def test_without_a_cell_there_is_no_page(tmp_path):
    with pytest.raises(VideoAlignError, match="no finished cell"):
        write_page(tmp_path, range(2), LoopSize())
    assert not (tmp_path / "RESULTS.md").exists()


def tuned_folder(out, rounds=3, best=0):
    """A folder in which rounds of trials are done: of each algorithm the reward model prefers one of the first."""
    for _ in range(rounds):
        plan = planned(out)
        if plan.whole:
            return
        for seed in TUNING_SEEDS:
            arms, begun = {}, {name: len(every) for name, every in plan.trials.items()}
            for name, new in plan.rounds[-1].items():
                for place, values in enumerate(new, begun[name]):
                    arm = f"nrg@{values['strength']:g}" if name == "nrg" else f"{name}-{place}"
                    arms[arm] = rates(0.6 if place == best else 0.5 - 0.001 * place)
            write_json(out / tuning_place(seed) / f"cells/trials{len(plan.rounds) - 1}/comparison.json", {"arms": arms})


def test_units_of_all_seeds_fit_together(tmp_path):
    """Every need is the result of a unit; each seed has the same units; tuning precedes what it decides."""
    write_json(tmp_path / TUNED, {"nrg": {"strength": 30.0}})
    made = units(tmp_path, LoopSize(), range(2))
    board = Board(tmp_path, made)
    names = {unit.name for unit in made}
    assert all(need in names for unit in made for need in unit.needs)
    of = [{name.split("/", 1)[1] for name in names if name.startswith(f"seed{seed}/")} for seed in range(2)]
    assert of[0] == of[1]
    assert len(of[0]) > 100
    order = {name: place for place, name in enumerate(board.order)}
    assert all(order[need] < order[unit.name] for unit in made for need in unit.needs)
    assert len([unit for unit in made if TUNED in unit.needs]) > 2 * 20


def test_while_settings_are_not_chosen_everything_else_is_done(tmp_path):
    """Reported seeds begin beside the rounds, with all that needs no setting: none of it is planned otherwise later."""
    first = {unit.name: unit for unit in units(tmp_path, LoopSize(), range(2))}
    assert all(need in first for unit in first.values() for need in unit.needs)
    assert TUNED not in first and f"{tuning_place(1000)}/trials/dpo-0" in first
    early = {name for name in first if name.startswith("seed1/")}
    assert {"seed1/reward", "seed1/rm/bt-1", "seed1/pools/many", "seed1/beta/time-10"} <= early
    assert "seed1/cells/nrg/videos/even@30" in early
    assert not {"seed1/aligned/dpo", "seed1/cells/aligned/comparison.json", "seed1/cells/nrg/comparison.json"} & early
    write_json(tmp_path / TUNED, {"nrg": {"strength": 17.0}})
    last = {unit.name: unit for unit in units(tmp_path, LoopSize(), range(2))}
    for name in early:
        assert last[name].needs == first[name].needs
        assert name.endswith("/comparison.json") or last[name].run.args == first[name].run.args
    added = {name for name in last if "even@17" in name}
    assert added == {f"seed{seed}/cells/nrg/videos/even@17" for seed in range(2)} | {
        f"seed{seed}/cells/nrg/videos/clean-even@17" for seed in range(2)
    }
    for seed in range(2):
        needs = last[f"seed{seed}/cells/nrg/comparison.json"].needs
        assert f"seed{seed}/cells/nrg/videos/even@17" in needs and TUNED in needs


def test_rounds_follow_from_results_alone(tmp_path):
    """A process that joins later finds the same rounds; a choice at an end leads to a further one."""
    assert planned(tmp_path).rounds == [first_round()] and not planned(tmp_path).whole
    tuned_folder(tmp_path, rounds=1)
    plan = planned(tmp_path)
    assert plan == planned(tmp_path) and len(plan.rounds) == 2 and not plan.whole
    trials = {u.name for u in units(tmp_path, LoopSize(), range(1)) if "/trials/" in u.name}
    wanted = {f"{tuning_place(seed)}/trials/sft-{n}" for seed in TUNING_SEEDS for n in range(9)}
    assert wanted <= trials and f"{tuning_place(1000)}/trials/sft-9" not in trials
    # one seed's round is missing: nothing is decided
    path = tmp_path / tuning_place(1001) / "cells/trials0/comparison.json"
    kept = path.read_text()
    path.unlink()
    assert planned(tmp_path).rounds == [first_round()]
    path.write_text(kept)
    tuned_folder(tmp_path, rounds=5)
    plan = planned(tmp_path)
    assert plan.whole
    choose(tmp_path)
    tuned = json.loads((tmp_path / TUNED).read_text())
    assert tuned.keys() == GRIDS.keys() and {"lr", "beta"} == tuned["dpo"].keys()
    tried = json.loads((tmp_path / TRIED).read_text())["trials"]
    assert len({len(every) for every in tried.values()}) == 1 and len(tried["sft"][0]["judge"]) == 3


def test_a_failure_elsewhere_does_not_stop_the_rounds(tmp_path, monkeypatch):
    """Rounds go on where only cells failed; where a round itself failed, they end, and the page is written."""
    calls = []

    def work(out, made, processes, threads):
        calls.append(len(planned(tmp_path).rounds))
        tuned_folder(tmp_path, rounds=1)
        raise VideoAlignError("a cell failed")

    monkeypatch.setattr(paper_module, "work", work)
    with pytest.raises(VideoAlignError, match="a cell failed"):
        paper(tmp_path, seeds=1, processes=1)
    assert calls[:2] == [1, 2] and (tmp_path / TUNED).exists() and len(calls) == calls[-2] + 1
    shutil.rmtree(tmp_path / TUNING)
    calls.clear()
    monkeypatch.setattr(paper_module, "work", lambda *_: broken(calls))
    with pytest.raises(VideoAlignError, match="a round failed"):
        paper(tmp_path, seeds=1, processes=1)
    assert len(calls) == 1 and not (tmp_path / TUNED).exists()


def broken(calls):
    calls.append("work")
    raise VideoAlignError("a round failed")


def test_tuning_is_on_seeds_that_are_not_reported():
    trials = [unit.name for unit in units(Path("nowhere"), LoopSize(), range(5)) if "/trials/" in unit.name]
    assert {"/".join(name.split("/")[:2]) for name in trials} == {tuning_place(seed) for seed in TUNING_SEEDS}


def test_cells_of_another_size_are_refused(tmp_path):
    begin(tmp_path, asdict(LoopSize()))
    begin(tmp_path, asdict(LoopSize()))
    with pytest.raises(VideoAlignError, match=r"reward 350, here 5.*another --out"):
        begin(tmp_path, asdict(LoopSize(reward=5)))


def test_guidance_is_reported_as_it_was_tuned():
    """The same reward and weights; the cell has the strength that tuning chooses beside those of its curves."""
    made = Paper(Path("nowhere"), LoopSize(), 0)
    tuned, cell = ({u.name for u in units} for units in (made.tuning([first_round()]), made.generator_cells()))
    assert {f"{s:g}" for s in GRIDS["nrg"]["strength"]} == {n.partition("nrg@")[2] for n in tuned if "nrg@" in n}
    assert {f"{s:g}" for s in STRENGTHS if s} == {n.partition("even@")[2] for n in cell if "/even@" in n}
    assert sum(GUIDES["even"][1].values()) == pytest.approx(1)
    assert GUIDES["even"][0] == "noisy_reward"


def test_with_settings_at_hand_nothing_is_tuned(tmp_path):
    write_json(tmp_path / TUNED, {"nrg": {"strength": 30.0}})
    write_json(tmp_path / STUDIED, {})
    left = Board(tmp_path, units(tmp_path, LoopSize(), range(1))).left()
    assert left
    assert not [unit.name for unit in left if unit.name.startswith(TUNING)]


def test_seeds_of_another_size_or_settings_do_not_join(tmp_path):
    seed_folder(tmp_path, 0)
    write_page(tmp_path, range(1), LoopSize())
    with pytest.raises(VideoAlignError, match="another size"):
        earlier(tmp_path, LoopSize(reward=5))
    write_json(tmp_path / TUNED, {"sft": {"lr": 5.0}})
    with pytest.raises(VideoAlignError, match="another tuned"):
        earlier(tmp_path, LoopSize())


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"first": -1}, {"first": 998, "seeds": 3}, {"first": 1002}])
def test_seeds_that_cannot_be_reported_are_refused(tmp_path, wrong):
    with pytest.raises(VideoAlignError, match="seeds 1000 to 1002 are for tuning"):
        paper(tmp_path, **wrong)


def test_each_seed_needs_its_own_results_only(tmp_path):
    write_json(tmp_path / TUNED, {"nrg": {"strength": 30.0}})
    for unit in units(tmp_path, LoopSize(), range(3)):
        own = unit.name.split("/")[0]
        assert {need.split("/")[0] for need in unit.needs} <= {own, TUNING}


def test_results_that_are_none_are_named(tmp_path):
    write_json(tmp_path / "docs/results/results.json", [])
    with pytest.raises(VideoAlignError, match="holds no results"):
        earlier(tmp_path, LoopSize())


def test_every_unit_calls_what_its_own_cell_defines():
    """Cells are mixed into one class: of two methods with one name, one cell would call the other's."""
    kinds = [kind for kind in Paper.__mro__ if issubclass(kind, Loop) and kind not in Loop.__mro__]
    owners: dict[str, list[str]] = {}
    for kind in kinds:
        for name, value in vars(kind).items():
            if callable(value) and not name.startswith("__"):
                owners.setdefault(name, []).append(kind.__name__)
    assert len(owners) > 15
    assert {name: many for name, many in owners.items() if len(many) > 1} == {}
    for unit in Paper(Path("nowhere"), LoopSize(), 0).cells():
        signature(unit.run.func).bind(*unit.run.args, **unit.run.keywords)

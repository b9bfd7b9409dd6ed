"""The on-policy study: equal evaluations, units, a judge that nothing is trained against, and the page.

Its trainings themselves are in test_demo.py, which has what they begin with.
"""

import json
import re

import pytest

from videoalign import VideoAlignError
from videoalign.miniature.study import on_policy_study
from videoalign.miniature.study.loop_size import STUDY, LoopSize
from videoalign.miniature.study.on_policy_study import on_policy, units
from videoalign.miniature.study.paper import Paper
from videoalign.miniature.study.paper_claims import ORACLE, RM
from videoalign.miniature.study.policy_findings import (
    BASE,
    COLUMNS,
    FIGURES,
    NAMES,
    earlier,
    findings,
    gain,
    hacks_at,
    picked,
)
from videoalign.miniature.study.policy_page import PAGE, write_page
from videoalign.miniature.study.policy_recipes import RECIPES, before, spent, steps_of
from videoalign.miniature.study.policy_searches import PLAIN, WAYS
from videoalign.miniature.study.policy_size import SHARES, PolicySize
from videoalign.miniature.study.policy_tuning import TRIED, TUNED, choose, compared, grid
from videoalign.miniature.study.policy_units import HELD, HELD_FOLDER, PLACE
from videoalign.miniature.study.tuning_rounds import TUNING_SEEDS, tuning_place
from videoalign.miniature.study.units import Board, leading_to
from videoalign.models.files import read_json, write_json

VIEW = "own view"
CHOSEN = {name: tried[0] for name, tried in grid(PolicySize()).items()}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """All units of two seeds once settings are chosen, by name."""
    out = tmp_path_factory.mktemp("planned")
    write_json(out / TUNED, CHOSEN)
    return out, {unit.name: unit for unit in units(out, STUDY, PolicySize(), range(2))}


# --- what is spent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_an_algorithm_spends_what_every_other_does(name):
    """At each place of the curves, all but what one more step would cost."""
    size = PolicySize()
    for share, evaluations in spent(name, size, fresh=8).items():
        assert 0.97 * SHARES[share] * size.budget < evaluations <= SHARES[share] * size.budget


@pytest.mark.parametrize("name", [name for name in WAYS if name != "nrg"])
def test_a_search_spends_as_much_on_the_judged_videos(name):
    size = PolicySize()
    for share in SHARES.values():
        each = WAYS[name].candidates(size, share) * WAYS[name].each
        assert each <= size.of_video(share) < each + WAYS[name].each
    assert 8 * 16 * (size.of_video() - size.of_video(0.0)) == size.budget


def test_a_budget_that_buys_no_step_is_refused():
    with pytest.raises(VideoAlignError, match=r"a budget of 480 evaluations gives grpo the steps .* must be larger"):
        steps_of("grpo", PolicySize(budget=480), fresh=8)


def test_every_algorithm_with_a_setting_has_equally_many_trials():
    assert {len(tried) for tried in grid(PolicySize()).values()} == {4}
    assert {*grid(PolicySize())} == {*RECIPES, "smc", "nrg"}


# --- units ------------------------------------------------------------------------------------------------------------


def test_units_of_all_seeds_fit_together(planned):
    """Every need is the result of a unit; each seed has the same units, and needs its own results only."""
    out, made = planned
    board = Board(out, list(made.values()))
    assert all(need in made for unit in made.values() for need in unit.needs)
    of = [{name.split("/", 1)[1] for name in made if name.startswith(f"seed{seed}/")} for seed in range(2)]
    assert of[0] == of[1] and {f"{PLACE}/{name}" for name in RECIPES} <= of[0]
    for name, unit in made.items():
        if name.startswith("seed"):
            assert {need.split("/")[0] for need in unit.needs} <= {name.split("/")[0]}
    left = {unit.name for unit in board.left()}
    assert left and not any(name.startswith("tuning/") for name in left)  # settings are at hand


def test_the_base_is_the_papers(planned):
    """What the loop makes has the same name, needs and arguments in both, so that neither does it twice."""
    out, made = planned
    own = {name: unit for name, unit in made.items() if name.startswith("seed0/") and f"/{PLACE}/" not in name}
    theirs = {unit.name: unit for unit in Paper(out, STUDY, 0, "seed0").base()}
    assert {"seed0/reward", "seed0/noisy_reward", "seed0/latents/preferred", "seed0/generated"} <= {*own}
    for name, unit in own.items():
        assert unit.needs == theirs[name].needs and unit.run.args == theirs[name].run.args


def test_nothing_is_trained_or_chosen_against_the_held_out_judge(planned):
    """Only comparisons and its own benchmark read it; tuning seeds do not even have one."""
    _, made = planned
    held = f"seed0/{HELD_FOLDER}"
    readers = {name for name, unit in made.items() if held in unit.needs}
    assert readers == {f"seed0/{PLACE}/bench/held", *(f"seed0/{PLACE}/compared/{s}/comparison.json" for s in SHARES)}
    every = list(made.values())
    for name in RECIPES:
        assert held not in {unit.name for unit in leading_to(every, [f"seed0/{PLACE}/{name}"])}
        assert "held" not in str(made[f"seed0/{PLACE}/{name}"].run.args)
    assert not any("/held/" in name for name in made if name.startswith("tuning/"))
    # its clips, its raters and its weights are of other seeds
    args = {name: made[f"seed0/{PLACE}/held/{name}"].run.args for name in ("samples", "reward")}
    assert args["samples"][:4] == (f"{PLACE}/held/samples", "prompts.txt", 96, 11)
    assert args["reward"][2]["seed_everything"] == 5000


def test_before_settings_are_chosen_all_else_is_done(tmp_path):
    first = {unit.name for unit in units(tmp_path, LoopSize(), PolicySize(), range(1))}
    assert {TUNED, *map(compared, TUNING_SEEDS), f"seed0/{HELD_FOLDER}", "seed0/noisy_reward"} <= first
    assert f"{tuning_place(1001)}/{PLACE}/trials/draft-2" in first and f"seed0/{PLACE}/sft" not in first


def test_settings_are_those_that_the_reward_model_prefers(tmp_path):
    size = PolicySize()
    for seed in TUNING_SEEDS:
        arms = {
            f"{name}-{number}": {
                "against_base": {
                    RM: {"Overall": {"superiority": 0.9 if number == 1 else 0.5}},
                    ORACLE: {"Overall": {"superiority": 0.6 - 0.1 * number}},
                }
            }
            for name, tried in grid(size).items()
            for number in range(len(tried))
        }
        write_json(tmp_path / compared(seed), {"arms": arms})
    choose(tmp_path, size)
    tuned = read_json(tmp_path / TUNED, "settings")
    assert tuned == {name: tried[1] for name, tried in grid(size).items()}
    assert len(read_json(tmp_path / TRIED, "trials")["trials"]["dpo"][2]["judge"]) == 3


def test_the_study_tunes_first_then_compares_and_a_failure_leaves_the_page(tmp_path, monkeypatch):
    calls = []

    def work(out, made, processes, threads):
        calls.append({unit.name for unit in made})
        if len(calls) == 1:
            write_json(out / TUNED, CHOSEN)
        else:
            seed_folder(out, 0)
            raise VideoAlignError("seed1 failed")

    monkeypatch.setattr(on_policy_study, "work", work)
    with pytest.raises(VideoAlignError, match="seed1 failed"):
        on_policy(tmp_path, 2, processes=1)
    first, second = calls
    assert TUNED in first and not any("/compared/full" in name for name in first)
    assert {f"seed1/{PLACE}/compared/full/comparison.json", f"seed1/{PLACE}/nft"} <= second
    assert (tmp_path / PAGE).exists()
    with pytest.raises(VideoAlignError, match="seed1 failed"):
        on_policy(tmp_path, 2, processes=1)
    assert len(calls) == 3  # settings are at hand


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"first": -1}, {"first": 998, "seeds": 3}, {"first": 1002}])
def test_seeds_that_cannot_be_reported_are_refused(tmp_path, wrong):
    with pytest.raises(VideoAlignError, match="seeds 1000 to 1002 are for tuning"):
        on_policy(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_budget_is_refused(tmp_path):
    write_json(tmp_path / PLACE / "size.json", {"budget": 5})
    with pytest.raises(VideoAlignError, match=r"budget 5, here 28672.*another --out"):
        on_policy(tmp_path, 1)


# --- the page ---------------------------------------------------------------------------------------------------------


def rated(own, held, true, evaluations=24.0):
    """An arm whose judges see these gains, in deviations of 0.5 from a mean of 1."""
    views = {RM: own, HELD: held, ORACLE: true, VIEW: own}
    won = {c: {"win_rate": 0.5 + true / 10, "superiority": 0.5 + true / 20} for c in COLUMNS}
    return {
        "means": {judge: dict.fromkeys(COLUMNS, 1 + 0.5 * value) for judge, value in views.items()},
        "deviations": {judge: dict.fromkeys(COLUMNS, 0.5) for judge in views},
        "against_base": dict.fromkeys(views, won),
        "evaluations": evaluations,
    }


def seed_folder(out, seed, shift=0.0):
    """Everything that a seed leaves: online DPO rises throughout; GRPO falls at the end, which the judge sees."""
    place = out / f"seed{seed}" / PLACE
    for number, share in enumerate(SHARES, 1):
        each = {name: rated(0.2 * number, 0.15 * number, 0.1 * number + shift) for name in NAMES}
        each["online-dpo"] = rated(0.6 * number, 0.5 * number, 0.4 * number + shift)
        each["grpo"] = rated(0.9 * number, (0.5, 0.8, 0.3)[number - 1], (0.5, 0.7, 0.2)[number - 1] + shift)
        if share != "full":
            del each["nrg"]
        arms = {BASE: rated(0, 0, 0), PLAIN: rated(0, 0, 0), **each}
        best = {str(n): dict.fromkeys(COLUMNS, 1 + 0.1 * n) for n in range(1, 17)}
        whole = {"arms": arms, "prompts": 8, "samples": 16, "best_of": best, "chosen_by": RM, "sweeps": {}}
        write_json(place / "compared" / share / "comparison.json", whole)
        for name in RECIPES:
            counted = {"evaluations": spent(name, PolicySize(), 8)[share] - before(RECIPES[name], 8), "steps": 1}
            write_json(place / name / share / "evaluations.json", counted)
    for name in ("own", "held"):
        accuracies = {"generated": {c: {"without_ties": 0.8} for c in COLUMNS}}
        write_json(place / "bench" / name / "accuracies.json", accuracies)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    for seed in range(3):
        seed_folder(out, seed, shift=0.01 * seed)
    write_json(out / TUNED, CHOSEN)
    trials = {name: [{"values": v, "judge": [0.5, 0.6], "oracle": [0.5, 0.5], "number": 0} for v in tried]
              for name, tried in grid(PolicySize()).items()}  # fmt: skip
    write_json(out / TRIED, {"seeds": TUNING_SEEDS, "trials": trials})
    results = write_page(out, range(3), STUDY, PolicySize())
    return out, results, (out / PAGE).read_text()


def test_the_page_has_all_tables_figures_and_numbers(page):
    out, results, text = page
    assert all(f"| {words} |" in text for words in NAMES.values())
    figures = [part.split(")")[0] for part in text.split("](")[1:] if ".png" in part.split(")")[0]]
    assert figures == [f"{FIGURES}/{name}.png" for name in ("curves", "judges", "dimensions")]
    assert all((out / figure).stat().st_size > 5000 for figure in figures)
    stored = json.loads((out / FIGURES / "results.json").read_text())
    assert set(stored["seeds"]) == {"0", "1", "2"} and stored["tuned"] == CHOSEN and len(results["seeds"]) == 3
    assert "nan" not in text.lower() and "inf " not in text and not re.search(r"\n\n\n|\{\{|\{%", text)
    assert "VQ 0.80, MQ 0.80, TA 0.80, Overall 0.80; the held-out judge" in text
    assert "| best of 4 by the reward model |" in text


def test_counted_evaluations_stand_beside_the_rules(page):
    text = page[2]
    (row,) = [line for line in text.splitlines() if line.startswith("| Flow-RWR | labelled")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[5] == cells[6] == f"{spent('rwr', PolicySize(), 8)['full']:,.0f}"


def test_the_reading_names_winner_hacker_and_what_the_held_out_judge_saw(page):
    text = page[2]
    assert "**At a quarter of the budget** Flow-GRPO (all steps) gains most by the oracle (+0.51 ± 0.02" in text
    assert "**At the whole budget** Flow-DPO (online) gains most by the oracle (+1.21" in text
    assert "**Flow-GRPO (all steps) hacks most**: in 3 of 3 seeds" in text and "first at the whole budget" in text
    # the held-out judge falls with GRPO's oracle, so its pick is the best one; the own reward takes the last
    (row,) = [line for line in text.splitlines() if line.startswith("| Flow-GRPO (all steps) | half 3 |")]
    assert row.split("|")[3:6] == [" 0.00 ± 0.00 ", " full 3 ", " 0.50 ± 0.00 "]
    assert "falls too in 3 of these 3, and it falls as far in 0 of the 87 others" in text


def test_differences_are_those_of_gains_and_corrected_for_all_pairs(page):
    text = page[2]
    # online DPO is above all others, Flow-GRPO below them; the other twelve are equal
    assert "**Of 91 pairs of algorithms 25 are decided** at the whole budget" in text
    assert "Flow-GRPO (all steps) is below 13 others, " in text and "SFT is below 1 other," in text
    assert "| Flow-DPO (online) | Flow-GRPO (all steps) | 1.00 ± 0.00 |" in text
    assert "| Flow-GRPO (all steps) | +0.40 ± 0.00 | +0.50 ± 0.00 | -0.10 ± 0.00 |" in text
    assert "| Flow-NRG | +0.20 ± 0.00 | +0.10 ± 0.00 | +0.00 ± 0.00 |" in text  # it has one cost


def test_a_difference_that_varies_as_much_as_itself_is_not_decided(page, tmp_path):
    for seed, shift in enumerate((0.9, -0.9, 0.1)):
        seed_folder(tmp_path, seed)
        path = tmp_path / f"seed{seed}" / PLACE / "compared" / "full" / "comparison.json"
        compared = read_json(path, "a comparison")
        compared["arms"]["online-dpo"]["means"][ORACLE]["Overall"] += shift
        write_json(path, compared)
    write_page(tmp_path, range(3), STUDY, PolicySize())
    assert "**Of 91 pairs of algorithms 12 are decided**" in (tmp_path / PAGE).read_text()


def test_gains_places_and_hacking_of_a_seed(page):
    found = findings(page[0], 0)
    assert gain(found, "half", "online-dpo", ORACLE) == pytest.approx(0.8)
    assert gain(found, "half", "prfl", "own", "MQ") == pytest.approx(0.4)  # in the noisy reward's view
    assert gain(found, BASE, "sft", "own") == 0 and gain(found, "quarter", "nrg", ORACLE) == pytest.approx(0.3)
    assert hacks_at(found, "grpo") == "full" and hacks_at(found, "online-dpo") is None
    assert picked(found, "grpo", "own") == ("full", pytest.approx(0.5))
    assert picked(found, "grpo", HELD) == ("half", 0)


def test_seeds_of_elsewhere_join_and_those_of_another_budget_do_not(page, tmp_path):
    write_json(tmp_path / FIGURES / "results.json", read_json(page[0] / FIGURES / "results.json", "results"))
    seed_folder(tmp_path, 7)
    assert {*write_page(tmp_path, [7], STUDY, PolicySize())["seeds"]} == {0, 1, 2, 7}
    with pytest.raises(VideoAlignError, match="another policies"):
        earlier(tmp_path, STUDY, PolicySize(budget=5))


def test_without_a_comparison_there_is_no_page(tmp_path):
    with pytest.raises(VideoAlignError, match="no finished comparison"):
        write_page(tmp_path, range(2), STUDY, PolicySize())
    assert not (tmp_path / PAGE).exists()

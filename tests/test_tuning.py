"""Tuning in rounds: which settings are tried, which are chosen, and that results alone decide what comes next."""

import json
import math

import pytest

from videoalign import VideoAlignError
from videoalign.miniature.study.tuning_rounds import (
    FURTHER,
    GRIDS,
    ROUNDS,
    Trial,
    choice,
    ends,
    first_round,
    next_round,
)
from videoalign.miniature.study.tuning_tables import tuning_tables, tuning_text


def tuned(best, spread=1.0):
    """Tune on a smooth landscape with one summit; returns all trials and the number of rounds."""

    def height(algorithm, values):
        return -sum(math.log(v / best[algorithm][axis]) ** 2 for axis, v in values.items()) / spread

    trials, following, rounds = {name: [] for name in GRIDS}, first_round(), 0
    while following:
        for name, new in following.items():
            heights = [height(name, values) for values in new]
            trials[name] += [Trial(v, (h, h), (-h, -h), rounds) for v, h in zip(new, heights)]
        rounds += 1
        following = next_round(trials, rounds)
    return trials, rounds


MIDDLE = {name: {axis: math.sqrt(v[0] * v[-1]) for axis, v in axes.items()} for name, axes in GRIDS.items()}


def test_every_algorithm_has_equally_many_trials_in_every_round_and_none_twice():
    beyond = {**MIDDLE, "sft": {"lr": 0.05}, "dpo-time": {"lr": 1e-5, "beta": 1e5}, "nrg": {"strength": 1000.0}}
    trials, rounds = tuned(beyond)
    counts = {name: [sum(t.number == r for t in every) for r in range(rounds)] for name, every in trials.items()}
    assert rounds == ROUNDS and {tuple(count) for count in counts.values()} == {(6, *[FURTHER] * (rounds - 1))}
    for every in trials.values():
        assert len({json.dumps(t.values, sort_keys=True) for t in every}) == len(every)


def test_choices_at_an_end_are_followed_beyond_it_until_they_are_inside():
    best = {**MIDDLE, "sft": {"lr": 1.5e-2}, "dpo": {"lr": 1.5e-3, "beta": 12.0}}
    trials, rounds = tuned(best)
    assert 1 < rounds < ROUNDS
    for name, every in trials.items():
        chosen = choice(every)
        assert not ends([t.values for t in every], chosen.values)
        for axis, value in chosen.values.items():
            assert 0.4 < value / best[name][axis] < 2.5, (name, axis)


def test_without_a_choice_at_an_end_there_is_one_round():
    """An axis of two values has nothing but ends."""
    trials = {}
    for name, axes in GRIDS.items():
        second = {axis: values[1] for axis, values in axes.items()}  # is preferred
        if all(len(values) > 2 for values in axes.values()):
            trials[name] = [Trial(v, (float(v == second),), (0.0,)) for v in first_round()[name]]
    assert len(trials) == 4 and not next_round(trials, 1)
    with_pairs = {**trials, "dpo": [Trial(v, (0.0,), (0.0,)) for v in first_round()["dpo"]]}
    assert next_round(with_pairs, 1) and not next_round(with_pairs, ROUNDS)


def test_an_end_is_passed_by_steps_of_the_grid_and_an_inner_choice_refined_by_half_ways():
    trials = {
        "sft": [Trial({"lr": lr}, (lr,), (0.0,)) for lr in GRIDS["sft"]["lr"]],  # the highest is best
        "rwr": [Trial({"lr": lr}, (float(lr == 1e-3),), (0.0,)) for lr in GRIDS["rwr"]["lr"]],
        "dpo": [Trial(v, (v["lr"] - v["beta"],), (0.0,)) for v in first_round()["dpo"]],  # both axes at an end
    }
    following = next_round(trials, 1)
    assert [v["lr"] for v in following["sft"]] == [0.016, 0.032, 5.66e-3]
    assert [v["lr"] for v in following["rwr"]] == [7.07e-4, 1.41e-3, 8.41e-4]
    assert following["dpo"] == [{"lr": 2e-3, "beta": 30.0}, {"lr": 1e-3, "beta": 9.0}, {"lr": 2e-3, "beta": 9.0}]


def test_of_equal_trials_the_first_is_taken():
    trials = [Trial({"lr": lr}, (0.5, 0.6), (lr,)) for lr in (1.0, 2.0)]
    assert choice(trials).values == {"lr": 1.0} and choice(trials, "oracle").values == {"lr": 2.0}


def test_the_page_says_what_the_judges_choice_loses_by_the_oracle():
    """Differences seed by seed, and their interval."""
    numbers = [
        {"values": {"lr": 1e-3}, "judge": [0.6, 0.6, 0.6], "oracle": [0.5, 0.52, 0.51], "number": 0},
        {"values": {"lr": 2e-3}, "judge": [0.5, 0.6, 0.6], "oracle": [0.6, 0.62, 0.64], "number": 0},
        {"values": {"lr": 4e-3}, "judge": [0.4, 0.4, 0.4], "oracle": [0.4, 0.4, 0.4], "number": 1},
    ]
    tried = {"seeds": [1000, 1001, 1002], "trials": {"sft": numbers}}
    row = next(line for line in tuning_tables({}, tried).splitlines() if line.startswith("| sft"))
    assert "| 3 | lr 0.001, 0.002, 0.004 | lr 0.001 | 0.600 ± 0.000 | 0.510 ± 0.025 | lr 0.002 | 0.620" in row
    assert "| 0.110 ± 0.043 |" in row  # differences .1, .1, .13: t(2) = 4.303 times .01
    assert "2 of at most 4 rounds" in tuning_text(tried) and "still lie at an end of what was tried: sft (lr)" in (
        tuning_text(tried)
    )


def test_before_any_trial_the_table_says_so():
    assert tuning_tables(None, None).count("not yet") == len(GRIDS)
    assert "lr 0.001" in tuning_tables({"sft": {"lr": 1e-3}}, None)


def test_results_of_other_trials_are_refused(tmp_path):
    from videoalign.miniature.study.tuning import planned, tuning_place
    from videoalign.models.files import write_json

    for seed in (1000, 1001, 1002):
        write_json(tmp_path / tuning_place(seed) / "cells/trials0/comparison.json", {"arms": {}})
    with pytest.raises(VideoAlignError, match=r"no trial sft-0: .*other --out"):
        planned(tmp_path)

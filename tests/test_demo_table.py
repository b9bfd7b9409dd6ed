"""The demo's one table and one sentence: what they say about made-up comparisons."""

import copy
import json

import pytest
import torch

from helpers import doubles
from videoalign.commands.comparison import COLUMNS, RatedArm, found_of
from videoalign.miniature.study.demo_table import ORACLE, REWARD_MODEL, as_text, best_algorithm, one_table, summary
from videoalign.models.files import read_results, write_json

P, N = 8, 4


def compared(tmp_path, changes, prompts=P, samples=N):
    """A comparison as the demo reads it back, whose arms differ from the base by (VQ, MQ, TA) in the oracle's eyes.

    The reward model sees the opposite.
    """
    base = 0.5 + 0.02 * doubles(prompts, samples, 3)
    judged = {}
    for number, (name, change) in enumerate({"base": (0, 0, 0), **changes}.items()):
        noise = 0.02 * doubles(prompts, samples, 3, seed=number) if number else 0
        rated = base + torch.tensor(change, dtype=torch.float64) + noise
        rated = torch.cat([rated, rated.sum(-1, keepdim=True)], -1)
        judged[name] = RatedArm({ORACLE: rated, REWARD_MODEL: -rated, "own view": rated}, 1.0 + number)
    swept = {"nrg": ({"VQ": 0.5, "MQ": 0.5, "TA": 0.0}, ["base", *(n for n in changes if "@" in n)])}
    write_json(tmp_path / "comparison.json", found_of(judged, swept if len(swept["nrg"][1]) > 1 else {}))
    return read_results(tmp_path / "comparison.json", "a comparison")


CHANGES = {
    "control": (0.3, 0.3, 0.3),
    "sft": (0.1, 0.0, 0.0),
    "dpo": (0.1, 0.15, 0.0),
    "nrg@3": (0.0, 0.1, 0.0),
    "nrg@30": (0.2, -0.1, 0.0),
}


def test_the_sentence_names_the_largest_rise_and_all_falls(tmp_path):
    found = compared(tmp_path, CHANGES)
    row = found["arms"]["dpo"]["differences"][ORACLE]["MQ"]
    low, high = row["interval"]
    text = summary(found)
    assert text.startswith("Motion quality rose with 2 of 5 ways to use the reward model, most with dpo (Flow-DPO, ")
    assert f"{row['difference']:+z.2f} ({low:+.2f} to {high:+.2f})" in text
    assert "It fell with nrg@30." in text
    assert "over 8 prompts; of 5 that change nothing, 0.1 would seem to rise by chance" in text
    assert summary(found, "VQ").startswith("Visual quality rose with 4 of 5 ")


def test_a_rise_that_is_none_is_called_none(tmp_path):
    """Training on unselected samples is no algorithm, and what its interval does not part from 0 did not rise."""
    found = compared(tmp_path, {**CHANGES, "dpo": (0.1, 0.0, 0.0), "nrg@3": (0.0, 0.001, 0.0)}, samples=1)
    text = summary(found)
    assert text.startswith(
        "Motion quality rose with none of 4 ways to use the reward model; the largest difference has "
    )
    assert "control" not in text


def test_the_best_algorithm_wins_most_often_by_the_oracle(tmp_path):
    changes = {"control": (0.3, 0.3, 0.3), "sft": (0.0, 0.0, 0.0), "dpo": (0.0, 0.03, 0.0)}
    assert best_algorithm(compared(tmp_path, changes)) == "dpo"
    assert best_algorithm(compared(tmp_path, {**changes, "rwr": (0.3, 0.0, 0.0)})) == "rwr"
    assert best_algorithm(compared(tmp_path, changes, samples=1)) == "dpo"  # no other noise: of the same one
    alike = {"sft": (0.5, 0.5, 0.5), "dpo": (0.5, 0.5, 0.5)}
    assert best_algorithm(compared(tmp_path, alike)) == "sft"  # both always win: the first


def test_the_table_holds_the_comparisons_numbers(tmp_path):
    found = compared(tmp_path, CHANGES)
    head, rows = one_table(found)
    assert head == ["arm", "VQ", "MQ", "TA", "wins: oracle", "wins: reward model", "cost"]
    assert [row[0].text for row in rows] == [*found["arms"], "best-of-4"]
    by_name = {row[0].text: row for row in rows[:-1]}
    for name, row in by_name.items():
        for cell, column in zip(row[1:4], COLUMNS):
            assert cell.text == f"{found['arms'][name]['means'][ORACLE][column]:.2f}"
        assert row[6].text == f"{found['arms'][name]['cost']:.2f}x"
    assert all(not cell.note and not cell.sign for cell in by_name["base"][1:])
    dpo, hacked = by_name["dpo"], by_name["nrg@30"]
    assert [cell.sign for cell in dpo[1:6]] == [1, 1, 0, 1, -1]
    assert [cell.sign for cell in hacked[1:3]] == [1, -1]
    won = found["arms"]["dpo"]["against_base"][REWARD_MODEL]["Overall"]
    assert dpo[5].text == f"{won['superiority']:.2f}"
    assert dpo[5].note == "({:.2f} to {:.2f})".format(*won["superiority_interval"])
    assert hacked[0].note == "Flow-NRG, guided to VQ, MQ, strength 30"


def test_the_best_of_all_samples_is_a_row_and_counts_as_a_way(tmp_path):
    """What it gains is a mean over prompts of the best sample's quality over that of all; one sample has no best."""
    found = compared(tmp_path, CHANGES)
    row = one_table(found)[1][-1]
    assert row[0].note == "the best of 4 samples of the base, by the reward model" and row[6].text == "4.00x"
    assert [cell.text for cell in row[4:6]] == ["", ""]  # it has no clips of its own
    for cell, column in zip(row[1:4], COLUMNS):
        change = found["best_of_differences"]["4"][column]
        assert cell.text == f"{found['best_of']['4'][column]:.2f}" and cell.note.startswith(
            f"{change['difference']:+.2f} "
        )
        gain = found["best_of"]["4"][column] - found["best_of"]["1"][column]
        assert change["difference"] == pytest.approx(gain) and change["interval"][0] <= gain <= change["interval"][1]
    assert "best-of-4 (the best of 4 " in summary(compared(tmp_path, {"sft": (-0.3, -0.3, -0.3)}))
    del found["best_of_differences"]  # a comparison of an earlier release
    assert len(one_table(found)[1]) == len(found["arms"]) and " of 4 ways" in summary(found)
    assert len(one_table(compared(tmp_path, CHANGES, samples=1))[1]) == len(found["arms"])


def test_a_terminal_shows_the_same_numbers_in_lines_of_one_length(tmp_path):
    found = compared(tmp_path, CHANGES)
    head, *lines = as_text(found).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(head) == len(lines[0]) <= 140
    for line, row in zip(lines, one_table(found)[1]):
        assert all(cell.text in line for cell in row) and all(cell.note in line for cell in row[1:4])


def test_a_single_prompt_has_no_intervals_and_decides_nothing(tmp_path):
    found = compared(tmp_path, CHANGES, prompts=1)
    assert "null" in (tmp_path / "comparison.json").read_text()
    assert summary(found).startswith("Motion quality rose with none of 5 ")
    dpo = next(row for row in one_table(found)[1] if row[0].text == "dpo")
    assert [cell.sign for cell in dpo[1:6]] == [0] * 5
    assert "nan" not in as_text(found)


def test_the_other_judge_decides_nothing(tmp_path):
    """The reward model may be fooled: neither the sentence nor the choice of the best reads its ratings."""
    found = compared(tmp_path, CHANGES)
    other = copy.deepcopy(found)
    for row in other["arms"].values():
        row.get("against_base", {}).pop(REWARD_MODEL, None)
        row.get("differences", {}).pop(REWARD_MODEL, None)
        row["means"].pop(REWARD_MODEL)
    assert json.dumps(other) != json.dumps(found)
    assert (summary(other), best_algorithm(other)) == (summary(found), best_algorithm(found))


@pytest.mark.parametrize("dimension", ["VQ", "MQ", "TA"])
def test_each_quality_has_its_sentence(tmp_path, dimension):
    change = tuple(0.2 if name == dimension else 0.0 for name in ("VQ", "MQ", "TA"))
    assert " rose with 1 of 1 " in summary(compared(tmp_path, {"dpo": change}, samples=1), dimension)

"""The numbers of a comparison: best-of-N, gains, hacking, and the table and charts for people."""

import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from compare_kit import DIMENSIONS
from helpers import doubles
from videoalign.commands.comparison import COLUMNS, RatedArm, bars, found_of, table, trade_off
from videoalign.models.win_rates import best_of

# --- best of N ------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 2, 3, 4, 5])
def test_best_of_is_the_mean_over_all_subsets(draws):
    scores, values = doubles(3, 5), doubles(3, 5, 4, seed=1)
    want = torch.zeros(3, 4, dtype=torch.float64)
    for p in range(3):
        chosen = [values[p, max(s, key=lambda i: scores[p, i])] for s in itertools.combinations(range(5), draws)]
        want[p] = torch.stack(chosen).mean(0)
    torch.testing.assert_close(best_of(scores, values, draws), want)


def test_one_draw_is_the_mean_and_all_draws_the_best():
    scores, values = doubles(4, 6), doubles(4, 6, 4, seed=1)
    torch.testing.assert_close(best_of(scores, values, 1), values.mean(1))
    assert torch.equal(best_of(scores, values, 6), values[torch.arange(4), scores.argmax(1)])


def test_own_values_rise_with_the_draws_and_those_of_others_need_not():
    scores = doubles(50, 6)
    values = torch.stack([scores, -scores, torch.ones_like(scores)], -1)
    means = torch.stack([best_of(scores, values, n).mean(0) for n in range(1, 7)])
    assert (means[:, 0].diff() > 0).all()
    assert (means[:, 1].diff() < 0).all()
    torch.testing.assert_close(means[:, 2], torch.ones(6, dtype=torch.float64))


def test_between_whole_draws_the_neighbours_are_mixed():
    scores, values = doubles(3, 4), doubles(3, 4, 4, seed=1)
    for whole, share in itertools.product((1, 2, 3), (0.25, 0.5, 0.9)):
        mixed = (1 - share) * best_of(scores, values, whole) + share * best_of(scores, values, whole + 1)
        torch.testing.assert_close(best_of(scores, values, whole + share), mixed)


@pytest.mark.parametrize("draws", [0, 0.99, 4.01, 5, -1, math.nan])
def test_more_draws_than_samples_or_less_than_one_raise(draws):
    with pytest.raises(ValueError, match="among 4 samples"):
        best_of(doubles(3, 4), doubles(3, 4, 4), draws)


def test_float_rewards_are_summed_in_double():
    scores, values = doubles(2, 3), torch.full((2, 3, 4), 0.1)
    assert best_of(scores, values, 2).dtype == torch.float64


# --- numbers of a comparison ----------------------------------------------------------------------


def judged(seconds=1.0, **ratings):
    """An arm with ratings (P, N, 3) by judge; a judge's name has underscores for spaces."""
    whole = {name.replace("_", " "): torch.cat([r, r.sum(-1, keepdim=True)], -1) for name, r in ratings.items()}
    return RatedArm(whole, seconds)


P, N = 40, 3
BASE = doubles(P, N, 3)


def swept(steps, own, judge="oracle", prompts=P, weights=None, jitter=0.0):
    """A sweep over 0, 1, 3, 10 in which a judge's ratings rise by ``steps`` and the own view by ``own``."""
    names, weights = ["base", "s@1", "s@3", "s@10"], weights or {"TA": 1.0}
    base, view = BASE[:prompts], 2 * doubles(prompts, N, 3, seed=5)
    arms = {
        name: judged(
            1.0 + number,
            **{
                judge: base + rise + (jitter * doubles(prompts, 1, 1, seed=number) if number else 0),
                "own_view": view + mine,
            },
        )
        for number, (name, rise, mine) in enumerate(zip(names, (0.0, *steps), (0.0, *own)))
    }
    found = found_of(arms, {"s": (weights, names)})
    return found, found["sweeps"]["s"]


def test_strengths_of_a_sweep_have_one_cost_and_what_costs_more_than_all_samples_has_no_rival():
    arms = {
        name: judged(seconds, oracle=BASE, own_view=BASE)
        for name, seconds in {"base": 1.0, "s@1": 2.5, "s@3": 1.5, "s@10": 9.0, "dear": N + 1.0}.items()
    }
    found = found_of(arms, {"s": ({"TA": 1.0}, ["base", "s@1", "s@3", "s@10"])})["arms"]
    assert {name: row["cost"] for name, row in found.items()} == {
        "base": 1.0,
        "s@1": 2.5,
        "s@3": 2.5,
        "s@10": 2.5,
        "dear": N + 1.0,
    }
    assert [name for name, row in found.items() if "best_of" in row] == ["s@1", "s@3", "s@10"]
    assert found["s@3"]["best_of"]["draws"] == 2.5 and found["s@3"]["seconds"] == 1.5


def test_costs_are_ratios_of_seconds_and_means_are_means():
    arms = {"base": judged(2.0, oracle=BASE), "slow": judged(3.0, oracle=BASE + 1), "fast": judged(1.0, oracle=BASE)}
    found = found_of(arms, {})
    assert {name: row["cost"] for name, row in found["arms"].items()} == {"base": 1.0, "slow": 1.5, "fast": 0.5}
    assert {name: row["seconds"] for name, row in found["arms"].items()} == {"base": 2.0, "slow": 3.0, "fast": 1.0}
    assert (found["judge"], found["prompts"], found["samples"], found["sweeps"]) == ("oracle", P, N, {})
    for i, column in enumerate(DIMENSIONS):
        assert found["arms"]["slow"]["means"]["oracle"][column] == pytest.approx(float(BASE[..., i].mean()) + 1)
    assert found["arms"]["slow"]["means"]["oracle"]["Overall"] == pytest.approx(float(BASE.sum(-1).mean()) + 3)


def test_win_rates_against_the_base_are_those_of_loops():
    other = BASE + 0.3 * doubles(P, N, 3, seed=1)
    found = found_of(
        {"base": judged(oracle=BASE, reward_model=-BASE), "arm": judged(oracle=other, reward_model=-other)}, {}
    )
    row = found["arms"]["arm"]["against_base"]
    assert row.keys() == {"oracle", "reward model"}
    assert "against_base" not in found["arms"]["base"]
    for i, column in enumerate(COLUMNS):
        mine, theirs = (r.sum(-1) if i == 3 else r[..., i] for r in (other, BASE))
        wins = [float(mine[p, n] > theirs[p, n]) for p in range(P) for n in range(N)]
        apart = [float(mine[p, a] > theirs[p, b]) for p in range(P) for a in range(N) for b in range(N) if a != b]
        assert row["oracle"][column]["win_rate"] == pytest.approx(np.mean(wins))
        assert row["oracle"][column]["superiority"] == pytest.approx(np.mean(apart))
        assert row["reward model"][column]["win_rate"] == pytest.approx(1 - np.mean(wins))


def test_differences_to_the_base_have_intervals_over_prompts():
    """A prompt's noises are no independent votes: its own difference counts once, however many noises it has."""
    shift = 0.4 + 0.5 * doubles(P, 1, 3, seed=1)  # one for each prompt
    found = found_of(
        {"base": judged(oracle=BASE, reward_model=BASE), "arm": judged(oracle=BASE + shift, reward_model=BASE)}, {}
    )
    row = found["arms"]["arm"]["differences"]
    assert "differences" not in found["arms"]["base"]
    assert all(cell == {"difference": 0.0, "interval": [0.0, 0.0]} for cell in row["reward model"].values())
    for i, column in enumerate(COLUMNS):
        each = (shift.sum(-1) if i == 3 else shift[..., i]).squeeze(1).numpy()
        low, high = row["oracle"][column]["interval"]
        assert row["oracle"][column]["difference"] == pytest.approx(each.mean())
        assert low < each.mean() < high
        assert high - low == pytest.approx(2 * 2.02 * each.std(ddof=1) / math.sqrt(P), rel=0.15)


def test_best_of_n_is_chosen_by_the_reward_model_and_valued_by_the_judge():
    model = doubles(P, N, 3, seed=2)
    found = found_of({"base": judged(oracle=BASE, reward_model=model)}, {}, "reward model")
    assert [*found["best_of"]] == ["1", "2", "3"]
    chosen = model.sum(-1).argmax(1)
    best = BASE[torch.arange(P), chosen]
    for i, column in enumerate(DIMENSIONS):
        assert found["best_of"]["1"][column] == pytest.approx(float(BASE[..., i].mean()))
        assert found["best_of"]["3"][column] == pytest.approx(float(best[:, i].mean()))
    assert found["best_of"]["3"]["Overall"] == pytest.approx(float(best.sum(-1).mean()))


@pytest.mark.parametrize(
    ("cost", "there"), [(0.9, True), (1.0, True), (1.25, True), (2.0, True), (3.0, True), (3.1, False)]
)
def test_an_arm_is_held_against_the_best_of_its_cost(cost, there):
    model = doubles(P, N, 3, seed=2)
    mine = BASE + 1 + doubles(P, N, 3, seed=3)
    arms = {
        "base": judged(2.0, oracle=BASE, reward_model=model),
        "arm": judged(2.0 * cost, oracle=mine, reward_model=model),
    }
    row = found_of(arms, {}, "reward model")["arms"]["arm"]
    assert ("best_of" in row) == there
    if not there:
        return
    of = {}
    for n in (1, 2, 3):
        subsets = [*itertools.combinations(range(N), n)]
        of[n] = [
            np.mean([float(BASE[p, max(s, key=lambda i: model[p, i].sum())].sum()) for s in subsets]) for p in range(P)
        ]
    cost = max(cost, 1.0)  # faster than the base by chance: held against one of its samples
    whole = min(int(cost), 2)
    rival = (1 - (cost - whole)) * np.array(of[whole]) + (cost - whole) * np.array(of[whole + 1])
    differences = mine.sum(-1).mean(1).numpy() - rival
    assert row["best_of"]["draws"] == cost
    assert row["best_of"]["difference"] == pytest.approx(differences.mean())
    low, high = row["best_of"]["interval"]
    error = differences.std(ddof=1) / math.sqrt(P)
    assert low < differences.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_gains_are_in_the_bases_deviations_under_the_weights():
    weights = {"VQ": 0.5, "TA": -1.5}
    rise = torch.tensor([2.0, 100.0, 1.0], dtype=torch.float64)
    found, curve = swept((rise, 2 * rise, 0 * rise), (rise, rise, rise), weights=weights)
    std = BASE[..., [0, 2]].flatten(0, 1).std(0)
    want = float((0.5 * 2.0 / std[0] - 1.5 * 1.0 / std[1]) / 2.0)
    assert curve["gains"]["oracle"] == pytest.approx([0.0, want, 2 * want, 0.0], abs=1e-12)
    assert curve["strengths"] == [0.0, 1.0, 3.0, 10.0] and curve["weights"] == weights
    view = (2 * doubles(P, N, 3, seed=5))[..., [0, 2]].flatten(0, 1).std(0)
    assert curve["gains"]["own view"][1] == pytest.approx(float((0.5 * 2.0 / view[0] - 1.5 / view[1]) / 2.0))
    assert found["sweeps"].keys() == {"s"}


def test_gains_do_not_depend_on_a_judges_units():
    _, one = swept((1.0, 0.5, -1.0), (1.0, 2.0, 3.0))
    arms = {
        name: judged(oracle=100 * BASE + 100 * rise - 7, own_view=BASE)
        for name, rise in (("base", 0.0), ("s@1", 1.0), ("s@3", 0.5), ("s@10", -1.0))
    }
    other = found_of(arms, {"s": ({"TA": 3.0}, [*arms])})["sweeps"]["s"]
    assert other["gains"]["oracle"] == pytest.approx(one["gains"]["oracle"])


def test_a_dimension_without_spread_does_not_drown_the_others():
    """The oracle calls every video of a poor base 0 in visual quality."""
    base = BASE * torch.tensor([0.0, 1.0, 1.0])
    arms = {"base": judged(oracle=base), "s@1": judged(oracle=base + torch.tensor([0.01, 0.5, 0.5]))}
    gains = found_of(arms, {"s": (dict.fromkeys(DIMENSIONS, 1 / 3), [*arms])})["sweeps"]["s"]["gains"]["oracle"]
    assert 0 < gains[1] < 10


@pytest.mark.parametrize(
    ("steps", "own", "jitter", "best", "limit"),
    [
        ((1.0, 0.5, -1.0), (1.0, 2.0, 3.0), 0.1, 1.0, 3.0),  # judge falls after 1, own view goes on rising
        ((1.0, 2.0, -1.0), (1.0, 2.0, 3.0), 0.1, 3.0, 10.0),
        ((-0.5, -0.6, -1.0), (1.0, 2.0, 3.0), 0.1, 0.0, 1.0),  # bad from the start
        ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), 0.1, 10.0, None),  # both rise
        ((1.0, 0.5, -1.0), (1.0, 0.5, -1.0), 0.1, 1.0, None),  # guidance fails, also in its own view: no hacking
        ((1.0, 0.5, -1.0), (1.0, 0.5, 3.0), 0.1, 1.0, 10.0),  # the own view rises later
        ((1.0, 0.9, -1.0), (1.0, 2.0, 3.0), 2.0, 1.0, 10.0),  # the first fall is within noise, the second is not
        ((1.0, 0.95, 0.9), (1.0, 2.0, 3.0), 2.0, None, None),  # no fall beyond noise
        ((-0.5, 1.0, 2.0), (5.0, 2.0, 3.0), 0.1, 10.0, None),  # what lies below the best is no hacking
    ],
)
def test_hacking_is_a_significant_fall_while_the_own_view_rises(steps, own, jitter, best, limit):
    _, curve = swept(steps, own, jitter=jitter)
    assert best is None or curve["best"] == best
    assert curve["stay_under"] == limit


def test_the_reward_model_judges_where_there_is_no_oracle():
    found, curve = swept((1.0, 0.5, -1.0), (1.0, 2.0, 3.0), judge="reward_model")
    assert found["judge"] == "reward model"
    assert (curve["best"], curve["stay_under"]) == (1.0, 3.0)


def test_the_oracle_judges_before_the_reward_model():
    names = ["base", "s@1", "s@3"]
    arms = {
        n: judged(oracle=BASE + o, reward_model=BASE + m, own_view=BASE + v)
        for n, o, m, v in zip(names, (0.0, 1.0, -1.0), (0.0, 1.0, 2.0), (0.0, 1.0, 2.0))
    }
    curve = found_of(arms, {"s": ({"VQ": 1.0}, names)})["sweeps"]["s"]
    assert (curve["best"], curve["stay_under"]) == (1.0, 3.0)
    assert curve["gains"].keys() == {
        "oracle",
        "reward model",
        "own view",
    }


def test_without_an_own_view_nothing_is_called_hacking():
    names = ["base", "s@1"]
    arms = {n: judged(oracle=BASE + o) for n, o in zip(names, (0.0, -1.0))}
    assert found_of(arms, {"s": ({"VQ": 1.0}, names)})["sweeps"]["s"]["stay_under"] is None


def test_a_sweep_of_strength_nought_alone_is_the_base():
    curve = found_of({"base": judged(oracle=BASE, own_view=BASE)}, {"s": ({"VQ": 1.0}, ["base"])})["sweeps"]["s"]
    assert curve["strengths"] == [0.0]
    assert curve["best"] == 0.0
    assert curve["gains"]["oracle"] == [0.0]
    trade_off("s", curve).canvas.draw()


# --- for people -----------------------------------------------------------------------------------


def cells(text, name):
    """The cells of an arm's row."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_every_arm_and_the_sentence():
    found, _ = swept((1.0, 0.5, -1.0), (1.0, 2.0, 3.0), jitter=0.1)
    text = table(found)
    head = [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]
    for name, row in found["arms"].items():
        line = dict(zip(head, cells(text, name), strict=True))
        for column in COLUMNS:
            assert line[f"oracle: {column}"] == f"{row['means']['oracle'][column]:.3f}"
        assert line["cost"] == f"{row['cost']:.2f}"
        assert line["own view"] == f"{row['means']['own view']['Overall']:+.2f}"
        won = row.get("against_base", {}).get("oracle", {}).get("Overall")
        assert line["wins, same noise (oracle)"] == (f"{won['win_rate']:.3f}" if won else "")
        assert line["wins, other noise (oracle)"] == (f"{won['superiority']:.3f}" if won else "")
        gap = row.get("best_of")  # the base has no rival
        text_of_gap = "{:+.3f} ({:+.3f} to {:+.3f})".format(gap["difference"], *gap["interval"]) if gap else ""
        assert line["minus best-of-cost"] == text_of_gap
    assert [name for name, row in found["arms"].items() if "best_of" in row] == ["s@1", "s@3", "s@10"]
    for number in ("2", "3"):
        line = dict(zip(head, cells(text, f"best of {number}"), strict=True))
        assert line["oracle: Overall"] == f"{found['best_of'][number]['Overall']:.3f}" and line["cost"] == number
    assert "best of 1" not in text
    assert f"{P} prompts, {N} noises each" in text
    assert "sweep s: best for the oracle at strength 1; **reward hacking from 3: stay under it**" in text


def test_the_table_says_where_no_hacking_is_shown():
    text = table(swept((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))[0])
    assert "sweep s: best for the oracle at strength 10; no reward hacking shown at these strengths" in text
    assert "stay under" not in text


def test_the_table_names_who_chose_the_best_of_n():
    text = table(found_of({"base": judged(oracle=BASE), "arm": judged(oracle=BASE)}, {}))
    assert "base samples by the oracle" in text
    assert "by the reward model" not in text


@pytest.mark.parametrize(("steps", "shaded"), [((1.0, 0.5, -1.0), True), ((1.0, 2.0, 3.0), False)])
def test_the_trade_off_shows_every_judge_and_the_hacked_strengths(steps, shaded):
    _, curve = swept(steps, (1.0, 2.0, 3.0), jitter=0.1)
    figure = trade_off("s", curve)
    figure.canvas.draw()
    (axis,) = figure.axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["oracle", "own view", *["reward hacking"] * shaded]
    drawn = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert all(np.allclose(drawn[judge], gains) for judge, gains in curve["gains"].items())
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "3", "10"]
    assert "TA 1" in axis.get_title()
    if shaded:
        (span,) = axis.patches
        assert span.get_extents().transformed(axis.transData.inverted()).x0 == pytest.approx(1.5)  # strength 3 is third
    plt.close(figure)


@pytest.mark.parametrize("samples", [1, N])
def test_bars_are_the_wins_of_every_arm(samples):
    other = BASE + 0.3 * doubles(P, N, 3, seed=1)
    arms = {
        "base": judged(oracle=BASE[:, :samples]),
        **{f"a{i}": judged(oracle=other[:, :samples] + 0.1 * i) for i in range(6)},
    }
    found = found_of(arms, {})
    figure = bars(found)
    figure.canvas.draw()
    (axis,) = figure.axes
    heights = [bar.get_height() for bars in axis.containers if hasattr(bars, "patches") for bar in bars.patches]
    kind = "superiority" if samples > 1 else "win_rate"
    want = [found["arms"][f"a{i}"]["against_base"]["oracle"][column][kind] for column in COLUMNS for i in range(6)]
    assert heights == pytest.approx(want)
    assert all(map(math.isfinite, heights))
    assert [tick.get_text() for tick in axis.get_xticklabels()] == [f"a{i}" for i in range(6)]
    plt.close(figure)


def test_one_sample_per_prompt_is_enough():
    names = ["base", "s@1", "s@3"]
    arms = {
        n: judged(oracle=BASE[:, :1] + o, own_view=BASE[:, :1] + v)
        for n, o, v in zip(names, (0.0, 1.0, -1.0), (0.0, 1.0, 2.0))
    }
    found = found_of(arms, {"s": ({"VQ": 1.0}, names)})
    row = found["arms"]["s@1"]["against_base"]["oracle"]["Overall"]
    assert row["win_rate"] == 1.0
    assert math.isnan(row["superiority"])
    assert [*found["best_of"]] == ["1"]
    assert found["arms"]["s@1"]["best_of"]["difference"] == pytest.approx(3.0)
    assert (found["sweeps"]["s"]["best"], found["sweeps"]["s"]["stay_under"]) == (1.0, 3.0)
    assert "best of" not in table(found).replace("best-of", "")
    assert "s@3" in table(found)

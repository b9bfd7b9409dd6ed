"""Losses, probabilities and accuracies of rated pairs, against definitions spelled out here."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from videoalign import VideoAlignError
from videoalign.models.preference import (
    LabelLosses,
    accuracy_at_threshold,
    accuracy_with_ties,
    accuracy_without_ties,
    bootstrap_interval,
    bt_losses,
    btt_losses,
    held_out_accuracy_with_ties,
    probabilities,
    reg_losses,
    tie_threshold,
)

NAN, INF = float("nan"), float("inf")
THETAS = (1.001, 1.5, 2.0, 5.0, 50.0)


def three_class(labels, margins, epsilon):
    """Accuracy by the definition, one pair at a time."""
    hits = 0
    for label, margin in zip(labels, margins):
        if abs(margin) <= epsilon:
            hits += label == 0
        else:
            hits += (label > 0 and margin > 0) or (label < 0 and margin < 0)
    return hits / len(labels)


def best_threshold(labels, margins):
    """(accuracy, smallest threshold that reaches it), -1 for none, over every threshold that makes a difference."""
    candidates = sorted({-1.0, *(abs(float(m)) for m in margins)})
    return max(((three_class(labels, margins, e), -e) for e in candidates), key=lambda pair: pair)


def random_pairs(seed, kind):
    """Labels and margins of one to twelve pairs."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    tie = rng.choice([0.0, 0.2, 0.6, 1.0])
    labels = rng.choice([-1, 0, 1], n, p=[(1 - tie) / 2, tie, (1 - tie) / 2])
    margins = {
        "integers": lambda: rng.integers(-3, 4, n).astype(float),
        "reals": lambda: rng.normal(size=n),
        "informative": lambda: labels * rng.integers(0, 4, n) + rng.integers(-1, 2, n) * 1.0,
        "zeros": lambda: np.zeros(n),
    }[kind]()
    return labels, margins


KINDS = ("integers", "reals", "informative", "zeros")


# --- accuracies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_accuracies_equal_brute_force(kind):
    for seed in range(200):
        labels, margins = random_pairs(seed, kind)
        best, minus_epsilon = best_threshold(labels, margins)
        assert accuracy_with_ties(labels, margins) == pytest.approx(best, abs=1e-12)
        assert tie_threshold(labels, margins) == -minus_epsilon
        decided = [(label, margin) for label, margin in zip(labels, margins) if label]
        if decided:
            share = sum(label * margin > 0 for label, margin in decided) / len(decided)
            assert accuracy_without_ties(labels, margins) == pytest.approx(share, abs=1e-12)
        else:
            assert math.isnan(accuracy_without_ties(labels, margins))


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_at_a_threshold_equals_its_definition(kind):
    for seed in range(50):
        labels, margins = random_pairs(seed, kind)
        for epsilon in (-1.0, 0.0, 0.5, 1.0, 10.0):
            want = three_class(labels, margins, epsilon)
            assert accuracy_at_threshold(labels, margins, epsilon) == pytest.approx(want, abs=1e-12)
        best = accuracy_at_threshold(labels, margins, tie_threshold(labels, margins))
        assert best == pytest.approx(accuracy_with_ties(labels, margins), abs=1e-12)


def test_no_predicted_tie_is_a_candidate():
    assert accuracy_with_ties([1], [0.5]) == 1.0
    assert tie_threshold([1], [0.5]) == -1.0
    assert accuracy_with_ties([1, -1, 0], [0.5, -0.5, 2.0]) == pytest.approx(2 / 3)
    assert tie_threshold([1, -1, 0], [0.5, -0.5, 2.0]) == -1.0


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_equal_margins_fall_on_the_same_side(order):
    """A threshold inside the run of equal margins would get 3 of 4 right, whatever the order of rows."""
    labels, margins = np.array([0, 1, 1, -1])[list(order)], np.array([1.0, 1.0, 1.0, -1.0])[list(order)]
    assert accuracy_with_ties(labels, margins) == 0.75
    assert tie_threshold(labels, margins) == -1.0


def test_order_of_pairs_does_not_matter():
    for seed, kind in itertools.product(range(20), KINDS):
        labels, margins = random_pairs(seed, kind)
        for arrange in (
            np.argsort(labels),
            np.argsort(-np.abs(labels)),
            np.random.default_rng(seed).permutation(labels.size),
        ):
            pairs, moved = (labels, margins), (labels[arrange], margins[arrange])
            for f in (accuracy_with_ties, accuracy_without_ties, tie_threshold, held_out_accuracy_with_ties):
                np.testing.assert_equal(f(*moved), f(*pairs))
            np.testing.assert_equal(
                bootstrap_interval(*moved, True, resamples=20), bootstrap_interval(*pairs, True, resamples=20)
            )


def test_swapping_sides_changes_no_accuracy():
    for seed, kind in itertools.product(range(30), KINDS):
        labels, margins = random_pairs(seed, kind)
        for f in (accuracy_with_ties, accuracy_without_ties, tie_threshold):
            np.testing.assert_equal(f(-labels, -margins), f(labels, margins))


def test_zero_margin_on_a_decided_pair_is_wrong():
    assert accuracy_without_ties([1, -1], [0.0, -0.0]) == 0.0
    assert accuracy_without_ties([1, -1, 1], [0.0, -1.0, 1.0]) == pytest.approx(2 / 3)
    assert accuracy_with_ties([1, -1], [0.0, -1.0]) == 0.5


def test_zero_margin_on_a_tie_is_right():
    assert accuracy_with_ties([0, 1], [0.0, 1.0]) == 1.0
    assert tie_threshold([0, 1], [0.0, 1.0]) == 0.0


def test_ties_are_left_out_of_accuracy_without_ties():
    assert accuracy_without_ties([1, 0, 0, -1], [1.0, -3.0, 0.0, 1.0]) == 0.5


def test_nothing_to_count_is_nan():
    for f in (accuracy_with_ties, accuracy_without_ties, held_out_accuracy_with_ties):
        assert math.isnan(f([], []))
    assert math.isnan(accuracy_without_ties([0, 0], [1.0, -1.0]))
    assert math.isnan(accuracy_at_threshold([], [], 1.0))
    assert math.isnan(held_out_accuracy_with_ties([1], [1.0]))
    assert all(map(math.isnan, bootstrap_interval([], [], True)))
    assert all(map(math.isnan, bootstrap_interval([0], [1.0], False)))


def test_always_calling_a_tie_is_the_floor():
    for seed, kind in itertools.product(range(50), KINDS):
        labels, margins = random_pairs(seed, kind)
        assert accuracy_with_ties(labels, margins) >= np.mean(labels == 0) - 1e-12
    labels = [1, -1, 0, 0, 0]
    assert accuracy_with_ties(labels, [-1.0, 1.0, 0.5, 3.0, -2.0]) == pytest.approx(
        3 / 5
    )  # all wrong: the floor itself


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.float32,
        np.float16,
        torch.tensor,
        lambda values: torch.tensor(values, dtype=torch.bfloat16),
        lambda values: torch.tensor(values, dtype=torch.float32, requires_grad=True),
    ],
)
def test_inputs_may_be_lists_arrays_or_tensors_of_any_precision(convert):
    labels, margins = [1, -1, 0, 0, 1, -1], [2.0, -1.5, 0.25, -0.5, -3.0, 0.0]
    for given in (labels, np.array(labels), torch.tensor(labels), torch.tensor(labels, dtype=torch.bfloat16)):
        assert accuracy_with_ties(given, convert(margins)) == pytest.approx(4 / 6)
        assert accuracy_without_ties(given, convert(margins)) == pytest.approx(2 / 4)
        assert tie_threshold(given, convert(margins)) == 0.5
        assert accuracy_at_threshold(given, convert(margins), 0.25) == pytest.approx(3 / 6)
        assert held_out_accuracy_with_ties(given, convert(margins)) == held_out_accuracy_with_ties(labels, margins)
        assert bootstrap_interval(given, convert(margins), True, resamples=50) == bootstrap_interval(
            labels, margins, True, resamples=50
        )


def test_results_are_plain_numbers():
    for f in (accuracy_with_ties, accuracy_without_ties, tie_threshold, held_out_accuracy_with_ties):
        assert type(f(torch.tensor([1, 0]), torch.tensor([1.0, 0.5]))) is float


ALL = (
    accuracy_with_ties,
    accuracy_without_ties,
    tie_threshold,
    held_out_accuracy_with_ties,
    lambda labels, margins: accuracy_at_threshold(labels, margins, 1.0),
    lambda labels, margins: bootstrap_interval(labels, margins, True, resamples=2),
)


@pytest.mark.parametrize("f", ALL)
def test_nan_margins_are_refused(f):
    with pytest.raises(VideoAlignError, match="1 of 3 margins are NaN"):
        f([1, 0, -1], [1.0, NAN, 2.0])
    with pytest.raises(VideoAlignError, match="2 of 2 margins are NaN"):
        f(torch.tensor([0, 0]), torch.tensor([NAN, NAN], dtype=torch.bfloat16))


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize("label", [NAN, 22, 2, 0.5])
def test_labels_that_mean_nothing_are_refused(f, label):
    with pytest.raises(VideoAlignError, match="labels must be"):
        f([1, label, -1], [1.0, 1.0, 2.0])


@pytest.mark.parametrize("f", ALL)
def test_shapes_that_do_not_fit_are_refused(f):
    for labels, margins in (([1, 0], [1.0]), ([[1, 0]], [[1.0, 2.0]]), (1, 1.0)):
        with pytest.raises(VideoAlignError, match="equally long"):
            f(labels, margins)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinite_margins_are_ordered_like_others():
    assert accuracy_without_ties([1, -1, 1], [INF, -INF, -INF]) == pytest.approx(2 / 3)
    assert accuracy_with_ties([1, -1, 0, 0], [INF, -INF, 0.1, -INF]) == 0.75


def test_held_out_threshold_is_judged_on_the_other_half():
    """Each half is judged at the threshold that is best for the other half."""
    rng = np.random.default_rng(0)
    labels = rng.choice([-1, 0, 1], 400)
    margins = labels + rng.normal(size=400)
    held_out, oracle = held_out_accuracy_with_ties(labels, margins), accuracy_with_ties(labels, margins)
    assert held_out == held_out_accuracy_with_ties(labels, margins)
    assert 0.5 < held_out <= oracle
    assert len({held_out_accuracy_with_ties(labels, margins, seed) for seed in range(10)}) > 1
    # with no information in margins or labels the oracle gains from choosing and the held-out threshold does not
    gains = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels, margins = rng.choice([-1, 0, 1], 40), rng.normal(size=40)
        gains.append(accuracy_with_ties(labels, margins) - held_out_accuracy_with_ties(labels, margins))
    assert np.mean(gains) > 0.02


def test_held_out_threshold_of_two_pairs():
    """Each half has one pair: the tie's threshold of 0.5 loses the win, and the win's threshold loses the tie."""
    assert held_out_accuracy_with_ties([0, 1], [0.5, 0.25]) == 0.0
    assert held_out_accuracy_with_ties([0, 1], [0.5, 0.75]) == 0.5
    assert held_out_accuracy_with_ties([0, 0], [0.5, 0.5]) == 1.0


def test_a_held_out_threshold_comes_from_other_prompts():
    """Brute force over the prompts of the halves; pairs of one prompt are never parted, whatever their order."""
    rng = np.random.default_rng(3)
    labels, prompts = rng.choice([-1, 0, 1], 60), rng.integers(7, size=60) * 1000 + 5
    margins = labels + rng.normal(size=60)
    found = held_out_accuracy_with_ties(labels, margins, prompts=prompts)
    names = np.unique(prompts)
    chosen = set(names[np.random.default_rng(0).permutation(7)[::2]])
    halves = [[i for i in range(60) if (prompts[i] in chosen) == side] for side in (True, False)]
    hits = 0.0
    for fit, test in (halves, halves[::-1]):
        epsilon = tie_threshold(labels[fit], margins[fit])
        hits += sum(
            (abs(margins[i]) <= epsilon and labels[i] == 0)
            or (abs(margins[i]) > epsilon and np.sign(margins[i]) == labels[i])
            for i in test
        )
    assert found == pytest.approx(hits / 60)
    order = rng.permutation(60)
    assert held_out_accuracy_with_ties(labels[order], margins[order], prompts=prompts[order]) == pytest.approx(found)
    assert math.isnan(held_out_accuracy_with_ties(labels, margins, prompts=np.zeros(60, int)))
    with pytest.raises(VideoAlignError, match=r"prompts \(3,\) must be as many as labels \(60,\)"):
        held_out_accuracy_with_ties(labels, margins, prompts=[1, 2, 3])


@pytest.mark.parametrize("ties", [False, True])
def test_bootstrap_interval_contains_the_estimate(ties):
    accuracy = accuracy_with_ties if ties else accuracy_without_ties
    for seed in range(10):
        rng = np.random.default_rng(seed)
        labels = rng.choice([-1, 0, 1], 300)
        margins = labels * 0.7 + rng.normal(size=300)
        low, high = bootstrap_interval(labels, margins, ties, resamples=300)
        assert low < accuracy(labels, margins) < high
        assert 0.05 < high - low < 0.2
        wider = bootstrap_interval(labels, margins, ties, confidence=0.999, resamples=300)
        assert wider[0] < low
        assert high < wider[1]


@pytest.mark.parametrize("ties", [False, True])
def test_bootstrap_interval_equals_resampling_by_hand(ties):
    """The margins are integers: a threshold inside a run of equal ones would give far more."""
    rng = np.random.default_rng(1)
    labels = rng.choice([-1, 0, 1], 150)
    margins = np.round(labels * 0.5 + rng.normal(size=150))
    kept = slice(None) if ties else labels != 0
    y, m = labels[kept], margins[kept]
    accuracy = accuracy_with_ties if ties else accuracy_without_ties
    draws = [accuracy(y[i], m[i]) for i in (rng.integers(0, y.size, y.size) for _ in range(3000))]
    want = np.quantile(draws, [0.05, 0.95])
    got = bootstrap_interval(labels, margins, ties, confidence=0.9, resamples=3000)
    np.testing.assert_allclose(got, want, atol=0.012)


def test_bootstrap_interval_depends_on_the_seed_alone():
    labels, margins = [1, -1, 0, 1, 0, -1, 1, 1], [1.0, 0.3, 0.2, -1.0, 0.1, -2.0, 0.4, 0.5]
    first = bootstrap_interval(labels, margins, True, seed=3, resamples=200)
    np.random.seed(5)
    assert bootstrap_interval(labels, margins, True, seed=3, resamples=200) == first
    intervals = {bootstrap_interval(labels, margins, True, seed=seed, resamples=7) for seed in range(10)}
    assert len(intervals) > 1


def test_bootstrap_interval_of_perfect_margins_is_a_point():
    assert bootstrap_interval([1, -1, 0], [1.0, -1.0, 0.0], True, resamples=50) == (1.0, 1.0)
    assert bootstrap_interval([1, -1, 0], [-1.0, 1.0, 0.0], False, resamples=50) == (0.0, 0.0)


# --- probabilities --------------------------------------------------------------------------------

GRID = torch.linspace(-40, 40, 801, dtype=torch.double)


@pytest.mark.parametrize("theta", (1.0, *THETAS))
def test_probabilities_sum_to_one(theta):
    p = probabilities(GRID, theta)
    assert p.shape == (801, 3) and p.dtype == torch.double
    torch.testing.assert_close(p.sum(-1), torch.ones_like(GRID), rtol=0, atol=1e-12)
    assert (p >= 0).all()


def test_probabilities_keep_the_shape_of_margins():
    margins = torch.randn(4, 3, dtype=torch.double)
    assert probabilities(margins, 5.0).shape == (4, 3, 3)
    torch.testing.assert_close(probabilities(margins, 5.0)[1, 2], probabilities(margins[1, 2], 5.0))


@pytest.mark.parametrize("theta", THETAS)
def test_probability_of_a_tie_between_equals(theta):
    p = probabilities(torch.zeros(1, dtype=torch.double), theta)[0]
    assert p[1].item() == pytest.approx((theta - 1) / (theta + 1), abs=1e-12)
    assert p[0] == p[2]


@pytest.mark.parametrize("theta", (2.5, 5.0, 50.0))
def test_a_win_overtakes_the_tie_where_the_formula_says(theta):
    at = math.log((theta**2 - 2) / theta)
    before, there, after = probabilities(torch.tensor([at - 0.01, at, at + 0.01], dtype=torch.double), theta)
    assert there[0].item() == pytest.approx(there[1].item(), abs=1e-12)
    assert before[0] < before[1]
    assert after[0] > after[1]


def test_theta_of_one_is_bradley_terry():
    p = probabilities(GRID, 1.0)
    torch.testing.assert_close(p[:, 0], torch.sigmoid(GRID))
    assert (p[:, 1] == 0).all()


def test_swapping_sides_swaps_probabilities():
    torch.testing.assert_close(probabilities(-GRID, 5.0), probabilities(GRID, 5.0).flip(-1))


# --- losses ---------------------------------------------------------------------------------------


def bt_loss(*args, **options):
    return bt_losses(*args, **options).mean()


def btt_loss(*args, **options):
    return btt_losses(*args, **options).mean()


def reg_loss(*args):
    return reg_losses(*args).mean()


def one_pair(margin, label):
    return torch.tensor([[margin]], dtype=torch.double), torch.tensor([[label]], dtype=torch.double)


@pytest.mark.parametrize("theta", THETAS)
def test_btt_loss_is_minus_the_log_of_the_probability(theta):
    for margin, (outcome, label) in itertools.product((-12.0, -1.3, 0.0, 0.4, 7.0), enumerate((1.0, 0.0, -1.0))):
        m, y = one_pair(margin, label)
        want = -probabilities(m, theta)[0, 0, outcome].log()
        torch.testing.assert_close(btt_loss(m, y, theta), want, rtol=1e-9, atol=1e-12)


def test_bt_loss_is_minus_the_log_of_the_probability():
    for margin, (outcome, label) in itertools.product((-12.0, -1.3, 0.0, 0.4, 7.0), ((0, 1.0), (2, -1.0))):
        m, y = one_pair(margin, label)
        torch.testing.assert_close(bt_loss(m, y), -probabilities(m)[0, 0, outcome].log(), rtol=1e-9, atol=1e-12)


def test_bt_loss_of_a_tie_is_half_a_win_each_or_nothing():
    margin, tie = one_pair(1.5, 0.0)
    halves = (bt_loss(margin, tie + 1) + bt_loss(margin, tie - 1)) / 2
    torch.testing.assert_close(bt_loss(margin, tie, ties=True), halves)
    assert bt_loss(margin, tie) == 0


def test_btt_loss_approaches_bt_loss_as_theta_approaches_one():
    margins, labels = torch.linspace(-5, 5, 40, dtype=torch.double).view(20, 2), torch.tensor([1.0, -1.0]).double()
    labels = labels.expand(20, 2)
    distances = [abs(btt_loss(margins, labels, theta) - bt_loss(margins, labels)) for theta in (1.1, 1.001, 1 + 1e-9)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-8


@pytest.mark.parametrize("theta", [1.0, 1, 0.5, 0.0, -5.0, NAN, INF])
def test_theta_without_ties_is_refused(theta):
    with pytest.raises(VideoAlignError, match="theta > 1"):
        btt_loss(torch.zeros(1, 3), torch.ones(1, 3), theta)


LOSSES = {
    "bt": bt_loss,
    "bt with ties": lambda m, y: bt_loss(m, y, ties=True),
    "btt": btt_loss,
    "btt without ties": lambda m, y: btt_loss(m, y, ties=False),
    "reg": reg_loss,
}
LEAVE_OUT_TIES = ("bt", "btt without ties")


@pytest.fixture(params=LOSSES)
def loss(request):
    return request.param, LOSSES[request.param]


def test_loss_is_the_mean_over_what_counts(loss):
    name, f = loss
    torch.manual_seed(0)
    values = torch.randn(5, 3, dtype=torch.double)
    targets = torch.tensor([[1, NAN, -1], [0, 1, NAN], [NAN, NAN, NAN], [-1, -1, -1], [1, 0, NAN]], dtype=torch.double)
    counts = ~targets.isnan() & ((targets != 0) | (name not in LEAVE_OUT_TIES))
    single = [f(v.view(1, 1), y.view(1, 1)) for v, y in zip(values[counts], targets[counts])]
    torch.testing.assert_close(f(values, targets), torch.stack(single).mean())
    assert counts.sum() < targets.numel()


def test_what_does_not_count_has_a_gradient_of_exactly_zero(loss):
    name, f = loss
    torch.manual_seed(0)
    values = torch.randn(4, 3).requires_grad_()
    targets = torch.tensor([[1, NAN, -1], [0, 1, NAN], [NAN, NAN, NAN], [-1, -1, -1]])
    counts = ~targets.isnan() & ((targets != 0) | (name not in LEAVE_OUT_TIES))
    f(values, targets).backward()
    assert (values.grad[~counts] == 0).all()
    assert (values.grad[counts] != 0).all()
    assert values.grad.isfinite().all()


def test_batch_without_a_label_costs_nothing(loss):
    _, f = loss
    values = torch.randn(2, 3).requires_grad_()
    value = f(values, torch.full((2, 3), NAN))
    value.backward()
    assert value == 0
    assert (values.grad == 0).all()


def test_empty_batch_costs_nothing(loss):
    values = torch.randn(0, 3).requires_grad_()
    value = loss[1](values, torch.zeros(0, 3))
    value.backward()
    assert value == 0


def test_extreme_values_keep_loss_and_gradient_finite(loss):
    values = torch.tensor([[300.0, -300.0, 0.0]]).requires_grad_()
    for target in (1.0, -1.0, 0.0):
        values.grad = None
        value = loss[1](values, torch.full((1, 3), target))
        value.backward()
        assert value.isfinite()
        assert values.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "reg"])
def test_swapping_sides_and_labels_leaves_losses_unchanged(name):
    torch.manual_seed(1)
    margins = torch.randn(6, 3, dtype=torch.double)
    labels = torch.tensor([[1, 0, -1], [NAN, -1, 1]], dtype=torch.double).repeat(3, 1)
    torch.testing.assert_close(LOSSES[name](-margins, -labels), LOSSES[name](margins, labels), rtol=1e-12, atol=0)


def test_a_right_margin_costs_less_than_a_wrong_one(loss):
    name, f = loss
    if name == "reg":
        assert f(*one_pair(1.0, 4.0)) == 0 and f(*one_pair(0.0, 5.0)) == 4
    else:
        assert f(*one_pair(2.0, 1.0)) < f(*one_pair(-2.0, 1.0))
        assert f(*one_pair(-2.0, -1.0)) < f(*one_pair(2.0, -1.0))


def test_btt_tie_is_cheapest_between_equals():
    costs = [btt_loss(*one_pair(margin, 0.0)).item() for margin in (-2.0, -0.5, 0.0, 0.5, 2.0)]
    assert min(costs) == costs[2] == pytest.approx(-math.log(4 / 6))
    assert costs[0] == pytest.approx(costs[4])


def test_means_divide_by_what_counts_or_by_what_there_is_room_for():
    values = torch.tensor([1.0, 7.0, 5.0, NAN], requires_grad=True)
    losses = LabelLosses(values, torch.tensor([True, False, True, False]))
    assert losses.mean() == 3.0 and losses.slot_mean() == 1.5
    none = LabelLosses(values, torch.zeros(4, dtype=torch.bool))
    assert none.mean() == 0.0 == none.slot_mean()
    losses.slot_mean().backward()
    assert values.grad.tolist() == [0.25, 0.0, 0.25, 0.0]


def test_broken_rewards_are_no_missing_labels():
    for losses in (bt_losses, btt_losses):
        assert losses(torch.tensor([[NAN, 1.0]]), torch.ones(1, 2)).slot_mean().isnan()
    assert reg_losses(torch.tensor([[NAN, 1.0]]), torch.ones(1, 2)).slot_mean().isnan()


LOSSES_EACH = {
    "bt": bt_losses,
    "bt with ties": partial(bt_losses, ties=True),
    "btt": btt_losses,
    "btt without ties": partial(btt_losses, ties=False),
    "reg": lambda m, y: reg_losses(m, y + 3),
}


@pytest.mark.parametrize("kind", LOSSES_EACH)
def test_the_gradient_does_not_depend_on_micro_batches(kind):
    """However 24 pairs with many labels missing are cut, the mean of the parts' gradients is the whole's."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 5, generator=generator, dtype=torch.double)
    labels = torch.randint(-1, 2, (24, 3), generator=generator).double()
    labels[torch.rand(24, 3, generator=generator) < 0.5] = NAN
    labels[:4] = NAN  # whole micro-batches without any label

    def gradient(size):
        weights = torch.ones(5, 3, dtype=torch.double, requires_grad=True)
        for part, y in zip(features.split(size), labels.split(size)):
            (LOSSES_EACH[kind](part @ weights, y).slot_mean() / (24 // size)).backward()
        return weights.grad

    whole = gradient(24)
    assert whole.abs().min() > 0
    for size in (1, 2, 3, 4, 6, 8, 12):
        torch.testing.assert_close(gradient(size), whole, rtol=0, atol=1e-12)

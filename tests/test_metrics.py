"""The torchmetrics of preferences: what they compute, and that neither batches nor ranks change it."""

import importlib
import math
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from videoalign import VideoAlignError
from videoalign.models import preference
from videoalign.models.metrics import Calibration, PreferenceAccuracy, RewardMoments
from videoalign.models.preference import probabilities

NAN = float("nan")


def pairs(n, seed=0):
    """Margins (n, 3) and labels (n, 4) with ties, gaps, and margins that repeat."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1.0, 0.0, 1.0, NAN], (n, 4), p=[0.3, 0.2, 0.3, 0.2])
    margins = np.nan_to_num(labels[:, :3]) + rng.normal(size=(n, 3)).round(1)
    return torch.tensor(margins, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)


def filled(metric, *values, cuts=(), order=None):
    """The metric after an update for each slice of the values."""
    if order is not None:
        values = [v[order] for v in values]
    for batch in zip(*(torch.tensor_split(v, list(cuts)) for v in values)):
        metric.update(*batch)
    return metric


# --- preference accuracy --------------------------------------------------------------------------


def test_preference_accuracy_is_the_functions_column_by_column():
    margins, labels = pairs(80)
    scale = torch.tensor([0.5, 2.0, 4.0])
    result = filled(PreferenceAccuracy(scale, resamples=30), margins, labels, cuts=(20, 25)).compute()
    assert list(result) == ["VQ", "MQ", "TA", "Overall"]
    columns = torch.cat([margins, (margins / scale).sum(1, keepdim=True)], 1)
    for i, row in enumerate(result.values()):
        has = ~labels[:, i].isnan()
        y, m = labels[has, i], columns[has, i]
        assert row == {
            "margin": pytest.approx(m.abs().mean().item()),
            "without_ties": preference.accuracy_without_ties(y, m),
            "with_ties": preference.accuracy_with_ties(y, m),
            "held_out": preference.held_out_accuracy_with_ties(y, m),
            "floor": pytest.approx((y == 0).double().mean().item()),
            "threshold": preference.tie_threshold(y, m),
            "pairs": int(has.sum()),
            "decided": int((y != 0).sum()),
            "interval": preference.bootstrap_interval(y, m, False, resamples=30),
            "interval_with_ties": preference.bootstrap_interval(y, m, True, resamples=30),
        }
        assert row["floor"] <= row["with_ties"]


def test_overall_divides_margins_by_the_scale():
    """VQ says A by 4 at a scale of 8, MQ says B by 1 at a scale of 1: B wins, unless the scales are left out."""
    margins, labels = torch.tensor([[4.0, -1.0, 0.0]]), torch.tensor([[NAN, NAN, NAN, -1.0]])
    scaled = filled(PreferenceAccuracy(torch.tensor([8.0, 1.0, 1.0]), resamples=0), margins, labels)
    plain = filled(PreferenceAccuracy(resamples=0), margins, labels)
    assert scaled.compute()["Overall"]["without_ties"] == 1.0
    assert plain.compute()["Overall"]["without_ties"] == 0.0


def test_scale_may_be_set_after_the_updates():
    metric = filled(
        PreferenceAccuracy(resamples=0), torch.tensor([[4.0, -1.0, 0.0]]), torch.tensor([[NAN] * 3 + [-1.0]])
    )
    metric.scale = torch.tensor([8.0, 1.0, 1.0])
    assert metric.compute()["Overall"]["without_ties"] == 1.0


def test_padding_does_not_count():
    margins, labels = pairs(12)
    valid = torch.arange(12) % 3 != 0
    poisoned = torch.where(valid[:, None], margins, torch.tensor(NAN))
    masked = PreferenceAccuracy(resamples=10)
    masked.update(poisoned, labels, valid)
    np.testing.assert_equal(
        masked.compute(), filled(PreferenceAccuracy(resamples=10), margins[valid], labels[valid]).compute()
    )
    assert masked.compute() != filled(PreferenceAccuracy(resamples=10), margins, labels).compute()


@pytest.mark.parametrize("cuts", [(), (1,), (7, 9, 30), range(1, 40), (10, 10, 40)])
def test_batches_in_any_size_and_order_give_identical_results(cuts):
    margins, labels = pairs(40)
    whole = filled(PreferenceAccuracy(resamples=20), margins, labels).compute()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(len(cuts)))
    split = filled(PreferenceAccuracy(resamples=20), margins, labels, cuts=cuts, order=order).compute()
    np.testing.assert_equal(split, whole)


def test_columns_without_a_label_are_absent():
    metric = PreferenceAccuracy(resamples=0)
    metric.update(torch.zeros(2, 3), torch.tensor([[NAN, 1.0, NAN, NAN], [NAN, NAN, NAN, NAN]]))
    assert list(metric.compute()) == ["MQ"]
    assert metric.compute()["MQ"]["pairs"] == 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_pair_gives_no_column():
    assert PreferenceAccuracy().compute() == {}
    metric = PreferenceAccuracy()
    metric.update(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool))
    assert metric.compute() == {}


def test_reset_forgets():
    margins, labels = pairs(10)
    metric = filled(PreferenceAccuracy(resamples=0), -margins, labels)
    metric.compute()
    metric.reset()
    np.testing.assert_equal(
        filled(metric, margins, labels).compute(), filled(PreferenceAccuracy(resamples=0), margins, labels).compute()
    )


def test_columns_give_labels_and_margins_of_what_is_labelled():
    margins, labels = pairs(15)
    columns = filled(PreferenceAccuracy(), margins, labels, cuts=(4,)).columns()
    for i, name in enumerate(("VQ", "MQ", "TA")):
        has = ~labels[:, i].isnan()
        assert torch.equal(columns[name][0], labels[has, i])
        assert torch.equal(columns[name][1], margins[has, i])


def test_no_bootstrap_leaves_intervals_out():
    row = filled(PreferenceAccuracy(resamples=0), *pairs(5)).compute()["VQ"]
    assert not any(name.startswith("interval") for name in row)


@pytest.mark.parametrize("shapes", [((2, 4), (2, 4)), ((2, 3), (2, 3)), ((2, 3), (3, 4)), ((3,), (4,))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(VideoAlignError, match="must be"):
        PreferenceAccuracy().update(*map(torch.zeros, shapes))


def test_broken_rewards_are_refused_rather_than_counted():
    metric = filled(PreferenceAccuracy(), torch.tensor([[NAN, 0.0, 0.0]]), torch.ones(1, 4))
    with pytest.raises(VideoAlignError, match="NaN"):
        metric.compute()


# --- calibration ----------------------------------------------------------------------------------


def reliability(p, labels, bins, outcomes=(0, 1, 2)):
    """Counts, mean forecasts, frequencies and errors, one forecast at a time."""
    d = labels.shape[1]
    members = [[[] for _ in range(bins)] for _ in range(d)]
    for n, i, o in np.ndindex(len(p), d, 3):
        label = labels[n, i]
        if math.isnan(label) or o not in outcomes or (1 not in outcomes and label == 0):
            continue
        members[i][min(int(p[n, i, o] * bins), bins - 1)].append((p[n, i, o], label == (1, 0, -1)[o]))
    count = np.array([[len(m) for m in row] for row in members])
    means = np.array([[np.mean(m, 0) if m else (NAN, NAN) for m in row] for row in members])
    errors = []
    for row, total in zip(members, count.sum(1)):
        gaps = [len(m) * abs(np.mean([x - hit for x, hit in m])) for m in row if m]
        errors.append(sum(gaps) / total if total else NAN)
    return count, means[..., 0], means[..., 1], np.array(errors)


@pytest.mark.parametrize("outcomes", [(0, 1, 2), (0, 2)])
@pytest.mark.parametrize("bins", [1, 4, 10])
def test_calibration_equals_brute_force(outcomes, bins):
    margins, labels = pairs(60, seed=3)
    labels = labels[:, :3].clone()
    labels[:, 2] = NAN
    p = probabilities(margins.double(), 5.0 if 1 in outcomes else 1.0)
    valid = torch.arange(60) % 7 != 0
    got = filled(Calibration(bins, outcomes), p, labels, valid, cuts=(11, 40)).compute()
    want = reliability(p[valid].numpy(), labels[valid].numpy(), bins, outcomes)
    for mine, brute in zip(got, want):
        np.testing.assert_allclose(mine.numpy(), brute, atol=1e-9)
    assert got.error[:2].isfinite().all()
    assert got.error[2].isnan()


def test_forecasts_at_the_ends_stay_in_the_bins():
    p = torch.tensor([1.0, 0.0, 0.0]).expand(2, 3, 3)
    got = filled(Calibration(5), p, torch.ones(2, 3), torch.ones(2, dtype=torch.bool)).compute()
    assert got.count[0].tolist() == [4, 0, 0, 0, 2]
    assert got.error.tolist() == [0, 0, 0]


def test_calibration_of_outcomes_drawn_from_the_forecasts():
    rng = np.random.default_rng(0)
    p = probabilities(torch.tensor(rng.normal(0, 2.5, (6000, 3))), 5.0)
    drawn = np.array([[rng.choice([1.0, 0.0, -1.0], p=x / x.sum()) for x in row] for row in p[:, :1].numpy()])
    labels, valid = torch.tensor(drawn).expand(-1, 3), torch.ones(6000, dtype=torch.bool)
    honest = filled(Calibration(), p[:, :1].expand(-1, 3, -1), labels, valid).compute()
    assert (honest.error < 0.02).all()
    sure = filled(Calibration(), (10 * p[:, :1].log()).softmax(-1).expand(-1, 3, -1), labels, valid).compute()
    assert (sure.error > 0.1).all()


def test_calibration_does_not_depend_on_batches():
    margins, labels = pairs(30)
    values = probabilities(margins, 5.0), labels[:, :3], torch.ones(30, dtype=torch.bool)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    whole, split = filled(Calibration(), *values), filled(Calibration(), *values, cuts=(1, 5), order=order)
    for a, b in zip(whole.compute(), split.compute()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, equal_nan=True)


# --- moments --------------------------------------------------------------------------------------


def test_moments_are_torchs():
    torch.manual_seed(0)
    rewards = torch.randn(50, 3) * torch.tensor([1.0, 5.0, 0.01]) + torch.tensor([0.0, 100.0, 3.0])
    valid = torch.arange(50) % 4 != 1
    poisoned = torch.where(valid[:, None], rewards, torch.tensor(NAN))
    got = filled(RewardMoments(), poisoned, valid, cuts=(7, 8, 30)).compute()
    kept = rewards[valid].double()
    torch.testing.assert_close(got[0], kept.mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[1], kept.std(0, unbiased=False), rtol=1e-6, atol=1e-9)
    assert (got[1] - kept.std(0)).abs().max() > 1e-6  # N and not N - 1 in the denominator


def test_deviation_of_equal_rewards_is_one():
    got = filled(RewardMoments(), torch.tensor([[3.0, 1.0, -2.0]]), torch.ones(1, dtype=torch.bool)).compute()
    assert got.tolist() == [[3.0, 1.0, -2.0], [1.0, 1.0, 1.0]]


def test_batch_of_padding_adds_nothing_to_moments():
    metric = filled(RewardMoments(), torch.randn(4, 3), torch.ones(4, dtype=torch.bool))
    before = metric.compute()
    metric.update(torch.full((2, 3), NAN), torch.zeros(2, dtype=torch.bool))
    assert torch.equal(metric.compute(), before)


# --- ranks ----------------------------------------------------------------------------------------

SHARES = {
    "uneven": [[(0, 23), (23, 24)], [(24, 30)]],
    "one rank with padding only": [[(0, 30)], []],
    "one rank without a batch": [[(0, 13), (13, 30)], []],
}
"""Slices of the thirty pairs that each of two ranks updates with."""


def update(metrics, start, stop, valid=True):
    margins, labels = (x[start:stop] for x in pairs(30))
    valid = torch.full((stop - start,), valid)
    metrics[0].update(margins, labels, valid)
    metrics[1].update(probabilities(margins.double(), 5.0), labels[:, :3], valid)
    metrics[2].update(margins, valid)


def computed(case, rank):
    """Values of the three metrics after a rank's updates, or after all updates where rank is None."""
    metrics = PreferenceAccuracy(torch.tensor([1.0, 2.0, 3.0]), 20), Calibration(), RewardMoments()
    for start, stop in [(0, 30)] if rank is None else SHARES[case][rank]:
        update(metrics, start, stop)
    if case == "one rank with padding only" and rank == 1:
        update(metrics, 0, 5, valid=False)
    accuracy, calibration, moments = (metric.compute() for metric in metrics)
    return {"accuracy": accuracy, "calibration": list(calibration), "moments": list(moments)}


def rank_main(rank, folder):
    """One of two processes; leaves what it computed, or what went wrong, in the folder."""
    torch.set_num_threads(1)
    for case in SHARES:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/{case}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        try:
            result = computed(case, rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, f"{folder}/{case} {rank}.pt")
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Folder of what two gloo processes computed in every case."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        # the processes import this file by name: under importlib mode pytest's own name for it may lead nowhere there
        patch.syspath_prepend(str(Path(__file__).parent))
        worker = importlib.import_module(Path(__file__).stem).rank_main
        try:
            torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
        except Exception as error:  # a process that died; the cases before left their results
            (folder / "error").write_text(str(error))
    return folder


@pytest.mark.parametrize("case", SHARES)
def test_two_processes_compute_what_one_does(case, two_processes):
    want = computed(case, None)
    for rank in range(2):
        file = two_processes / f"{case} {rank}.pt"
        assert file.exists(), (two_processes / "error").read_text()
        got = torch.load(file, weights_only=True)
        assert not isinstance(got, str), got
        np.testing.assert_equal(got["accuracy"], want["accuracy"])
        for name in ("calibration", "moments"):
            for mine, single in zip(got[name], want[name]):
                torch.testing.assert_close(mine, single, rtol=1e-9, atol=1e-12, equal_nan=True)

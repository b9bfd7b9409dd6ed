"""Flow-RWR, and preferences from rewards and labels."""

import math
import warnings
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from flow_kit import PROMPTS, SHAPE, close, data, fit, graded, kept, loaded, make, spoiled, write
from helpers import randn
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO, FlowRWR, FlowSFT
from videoalign.datamodules.judgements import Weights
from videoalign.models.flow_losses import RewardWeights
from videoalign.models.generator_folder import load_generator

# --- Flow-RWR -------------------------------------------------------------------------------------


def test_rwr_of_equal_rewards_is_sft(folders, wan, tmp_path):
    equal = write(
        tmp_path / "set",
        wan,
        of="videos",
        record=lambda i: {"prompt": PROMPTS[i % 3], "rewards": dict.fromkeys(("VQ", "MQ", "TA"), 1.3)},
    )
    rwr, sft = (fit(make(kind, folders["wan"]), data(equal)) for kind in (FlowRWR, FlowSFT))
    close(rwr.gradients, sft.gradients, rtol=1e-5, atol=1e-7)
    assert rwr.steps[0]["train/loss"] == pytest.approx(sft.steps[0]["train/loss"], rel=1e-6)
    assert rwr.steps[0]["train/weights/effective_sample_size"] == pytest.approx(1.0)


def test_rwr_takes_both_videos_of_a_pair(folders, pairs):
    """The loss equals a sum by hand over errors and exp(r), with r z-scored by prompt."""
    model = make(FlowRWR, folders["wan"])
    batch = next(iter(loaded(data(pairs["wan"]), model).train_dataloader()))
    with torch.no_grad():
        errors, _ = model.errors(batch["latents"], batch["seeds"], batch["conditions"])
    groups = {}
    kept = [i for i in range(8) if sum(graded(i)["rewards"]["A"].values()) != sum(graded(i)["rewards"]["B"].values())]
    assert len(kept) == 8
    for i in kept:
        for row in graded(i)["rewards"].values():
            groups.setdefault(PROMPTS[i % 3], []).append(sum(row.values()) / 3)

    def weight(prompt, row):
        values = torch.tensor(groups[prompt])
        z = (sum(row.values()) / 3 - values.mean()) / values.std(correction=0)
        return min(math.exp(z), 10.0)

    rows = {(i, side): weight(PROMPTS[i % 3], row) for i in kept for side, row in graded(i)["rewards"].items()}
    mean = sum(rows.values()) / len(rows)
    want = 0.0
    for n, key in enumerate(batch["keys"]):
        i = int(key[1:])
        order = sorted("AB", key=lambda side: -sum(graded(i)["rewards"][side].values()))
        want += sum(rows[i, side] / mean * errors[s, n].item() for s, side in enumerate(order)) / 8
    steps = fit(model, data(pairs["wan"])).steps
    assert steps[0]["train/loss"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("least", [2, 4])  # no prompt has four samples: then all of them are the group
@pytest.mark.parametrize(
    "rewards",
    [
        RewardWeights(),
        RewardWeights(temperature=0.3, clip=2.0),
        RewardWeights(normalise=False, temperature=5.0, clip=None),
    ],
    ids=["default", "sharp", "raw"],
)
def test_rwr_weights_have_mean_one_over_the_training_set(rewards, least, folders, videos, monkeypatch):
    monkeypatch.setattr("videoalign.alignment.flow_rwr.LEAST", least)
    model, seen = make(FlowRWR, folders["wan"], rewards=rewards), {}

    class Collect(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.update(zip(batch["keys"], module.weights(batch)[0].tolist()))

    watch = fit(model, data(videos), max_steps=-1, max_epochs=1, callbacks=[Collect()])
    assert len(seen) == 8
    assert sum(seen.values()) / 8 == pytest.approx(1.0, rel=1e-5)
    scores = [(i - 0.5 * i * i + i % 2) / 3 for i in range(8)]

    def z(i):
        if not rewards.normalise:
            return scores[i]
        group = torch.tensor([scores[j] for j in range(8) if least == 4 or i == 7 or (j < 7 and j % 3 == i % 3)])
        return float((scores[i] - group.mean()) / group.std(correction=0))

    raw = [min(math.exp(z(i) / rewards.temperature), rewards.clip or math.inf) for i in range(8)]
    want = {f"k{i}": w / (sum(raw) / 8) for i, w in enumerate(raw)}
    assert seen == pytest.approx(want, rel=1e-4)
    last = [want[f"k{i}"] for i in range(4, 8)]
    size = sum(last) ** 2 / sum(w * w for w in last) / 4
    assert watch.steps[-1]["train/weights/effective_sample_size"] == pytest.approx(size, rel=1e-4)
    assert watch.steps[-1]["train/weights/max"] == pytest.approx(max(last), rel=1e-4)


@pytest.mark.parametrize("missing", ["all", "one", "dimension"])
def test_rwr_without_rewards_is_refused(missing, folders, wan, tmp_path):
    def record(i):
        made = {**graded(i), "labels": {"VQ": "A", "MQ": "A", "TA": "A"}}
        if missing == "all" or (missing == "one" and i == 5):
            del made["rewards"]
        elif missing == "dimension":
            del made["rewards"]["B"]["TA"]
        return made

    path = write(tmp_path / "set", wan, record=record)
    with pytest.raises(VideoAlignError, match="Flow-RWR weighs videos by their rewards"):
        fit(make(FlowRWR, folders["wan"]), data(path))
    if missing == "dimension":  # which may be missing where it does not count
        fit(make(FlowRWR, folders["wan"]), data(path, weights=Weights(TA=0.0)))


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("kind", [FlowSFT, FlowRWR, FlowDPO])
def test_a_batch_without_a_usable_sample_is_passed_over(kind, place, folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, tensors=partial(spoiled, place))
    model = make(kind, folders["wan"], optimizer=partial(torch.optim.SGD, lr=1e-4))
    watch = fit(model, data(path, batch_size=1, max_dropped=0.2), max_steps=-1, max_epochs=1)
    assert len(watch.steps) == 8
    logged = [step.get("train/loss") for step in watch.steps]
    assert logged[place] == (logged[place - 1] if place else None)  # nothing is logged of a step without a sample
    assert all(value > 0 for i, value in enumerate(logged) if i != place)


def test_more_unusable_samples_than_allowed_stop_the_training(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, tensors=partial(spoiled, 3))
    with pytest.raises(VideoAlignError, match=r"1 of 8 samples.*'k3' holds NaN"):
        fit(make(FlowDPO, folders["wan"]), data(path, batch_size=1), steps=8)


def test_unusable_samples_do_not_count_in_the_mean(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, tensors=partial(spoiled, 3))
    model = make(FlowSFT, folders["wan"])
    batch = next(iter(loaded(data(path, max_dropped=0.2), model).train_dataloader()))
    assert batch["valid"].tolist() == [True, True, True, False]
    with torch.no_grad():
        errors, _ = model.errors(batch["latents"][:1, :3], batch["seeds"][:3], batch["conditions"][:3])
    step = fit(model, data(path, max_dropped=0.2)).steps[0]
    assert step["train/loss"] == step["train/velocity_error/chosen"] == pytest.approx(errors.mean().item(), rel=1e-5)


# --- preferences ----------------------------------------------------------------------------------


def test_dimension_weights_decide_what_is_preferred(folders, pairs):
    for weights in (Weights(), Weights(2.0, 1.0, 0.0), Weights(0.0, 0.0, 3.0)):
        found = kept(pairs["wan"], folders["wan"], weights=weights)
        for i in range(8):
            rows = graded(i)["rewards"]
            a, b = (sum(getattr(weights, d) * rows[s][d] for d in rows[s]) for s in "AB")
            margin = (a - b) / (weights.VQ + weights.MQ + weights.TA)
            assert found[f"k{i}"] == (margin > 0, pytest.approx(abs(margin), abs=1e-6))


def test_text_alignment_alone_needs_no_other_dimension(folders, wan, tmp_path):
    def record(i):
        return {"prompt": "a", "labels": {}, "rewards": {"A": {"TA": float(i)}, "B": {"TA": 2.5}}}

    path = write(tmp_path / "set", wan, record=record)
    found = kept(path, folders["wan"], weights=Weights(0.0, 0.0, 1.0))
    assert found == {f"k{i}": (i > 2.5, abs(i - 2.5)) for i in range(8)}
    batch = next(
        iter(loaded(data(path, weights=Weights(0.0, 0.0, 1.0)), SimpleNamespace(generator=wan)).train_dataloader())
    )
    for n, key in enumerate(batch["keys"]):  # the better one comes first, and its rewards with it
        i = int(key[1:])
        first, second = randn(*SHAPE, seed=100 * i + (i < 2.5)), randn(*SHAPE, seed=100 * i + (i > 2.5))
        assert torch.equal(batch["latents"][0, n], first)
        assert torch.equal(batch["latents"][1, n], second)
        assert batch["rewards"][:, n, 2].tolist() == [max(i, 2.5), min(i, 2.5)]


def test_pairs_with_rewards_need_no_labels(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, record=lambda i: {k: v for k, v in graded(i).items() if k != "labels"})
    assert len(kept(path, folders["wan"])) == 8


def test_labels_stand_in_for_rewards(folders, wan, tmp_path):
    words = [
        ("A", "A", "B"),
        ("B", "same", "B"),
        ("same", "same", "same"),
        ("A", "B", "same"),
        ("A", "A", "invalid"),
        ("A", "A", "A"),
        ("same", "B", "same"),
        ("B", "B", "B"),
    ]

    def record(i):
        return {"prompt": "a", "labels": dict(zip(("VQ", "MQ", "TA"), words[i]))}

    path = write(tmp_path / "set", wan, record=record)
    third = pytest.approx(1 / 3)
    assert kept(path, folders["wan"]) == {
        "k0": (True, third),
        "k1": (False, pytest.approx(2 / 3)),
        "k5": (True, 1.0),
        "k6": (False, third),
        "k7": (False, 1.0),
    }
    assert set(kept(path, folders["wan"], min_margin=0.4)) == {"k1", "k5", "k7"}
    assert set(kept(path, folders["wan"], weights=Weights(1.0, 0.0, 0.0))) == {"k0", "k1", "k3", "k4", "k5", "k7"}


def test_pairs_below_the_margin_are_left_out(folders, wan, tmp_path):
    def record(i):
        rows = {"A": dict.fromkeys(("VQ", "MQ", "TA"), 0.25 * (i // 2)), "B": dict.fromkeys(("VQ", "MQ", "TA"), 0.0)}
        return {"prompt": "a", "labels": {}, "rewards": rows}

    path = write(tmp_path / "set", wan, record=record)
    assert set(kept(path, folders["wan"])) == {f"k{i}" for i in range(2, 8)}  # equal ones never count
    assert set(kept(path, folders["wan"], min_margin=0.25)) == {f"k{i}" for i in range(4, 8)}
    datamodule = loaded(data(path, batch_size=1, min_margin=0.25), SimpleNamespace(generator=wan))
    keys = [key for batch in datamodule.train_dataloader() for key in batch["keys"]]
    assert keys == [f"k{i}" for i in range(4, 8)]
    with pytest.raises(VideoAlignError, match=r"no pair has a margin above 0.75"):
        kept(path, folders["wan"], min_margin=0.75)


def test_a_generator_whose_positions_depend_on_the_frame_rate_tells_another_one(folders, tmp_path):
    words = "latents of videos of 24 frames per second, and model.fps is 25"
    for family, told in (("ltx", True), ("wan", False)):
        path = write(tmp_path / family, load_generator(folders[family]), fps=24.0)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            loaded(data(path), SimpleNamespace(generator=load_generator(folders[family])))
        assert any(words in str(one.message) for one in found) == told


def test_pairs_that_prefer_no_side_are_refused_where_one_is_taken_as_preferred(folders, wan, tmp_path):
    """`data.min_margin: null` keeps ties, and pairs without labels, for modules that read labels by dimension."""
    words = [("A", "A", "A"), ("same", "same", "same"), ("A", "B", "same")]

    def record(i):
        return {"prompt": "a", "labels": dict(zip(("VQ", "MQ", "TA"), words[i % 3]))}

    path = write(tmp_path / "set", wan, record=record)
    for kind in (FlowSFT, FlowDPO):
        with pytest.raises(VideoAlignError, match=rf"in 5 of 8 no side is preferred, and {kind.__name__} takes one"):
            fit(make(kind, folders["wan"]), data(path, min_margin=None))
        fit(make(kind, folders["wan"]), data(path, batch_size=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": (-1.0, 1.0, 1.0)}, "negative"),
        ({"weights": (0.0, 0.0, 0.0)}, "positive"),
        ({"min_margin": -0.1}, "min_margin"),
        ({"min_margin": math.nan}, "min_margin"),
        ({"weights": (math.nan, 1.0, 1.0)}, "weights"),
    ],
)
def test_preference_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(VideoAlignError, match=words):
        data("none", **{name: Weights(*value) if name == "weights" else value for name, value in options.items()})


@pytest.mark.parametrize("labelled", [False, True], ids=["rewards", "labels"])
def test_swapping_a_and_b_leaves_the_training(labelled, folders, wan, tmp_path):
    opposite = {"A": "B", "B": "A", "same": "same"}

    def record(i, swap):
        if labelled:
            words = ("A", "B", "B") if i % 2 else ("A", "A", "same")
            return {"prompt": "a", "labels": {d: opposite[w] if swap else w for d, w in zip(("VQ", "MQ", "TA"), words)}}
        rows = graded(i)["rewards"]
        return {**graded(i), "rewards": {"A": rows["B"], "B": rows["A"]} if swap else rows}

    runs = []
    for swap in (False, True):
        path = write(
            tmp_path / f"{swap}",
            wan,
            record=partial(record, swap=swap),
            tensors=lambda i, t, swap=swap: {**t, "a": t["b"], "b": t["a"]} if swap else t,
        )
        runs.append(fit(make(FlowDPO, folders["wan"]), data(path), steps=3))
    assert runs[0].steps == runs[1].steps
    close(runs[0].gradients, runs[1].gradients, rtol=0, atol=0)

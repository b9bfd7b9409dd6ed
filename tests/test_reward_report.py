"""What a reward model gets right and wrong: tables, matrices and the choice of pairs, against brute force."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import randn
from test_reward_model import fit, network, world  # noqa: F401  fixtures
from videoalign import VideoAlignError
from videoalign.callbacks import ExamplePairs, RewardReport
from videoalign.callbacks.held_out import OUTCOMES, HeldOut, confusion, source_accuracies, surprises
from videoalign.callbacks.reward_report import MOST_SOURCES, confusion_table, source_table
from videoalign.datamodules.shards import ShardSet
from videoalign.models.preference import accuracy_with_ties, probabilities

WORDS = {1.0: "A", 0.0: "same", -1.0: "B"}


def drawn(count=60, seed=0, whole=False) -> HeldOut:
    """Pairs with missing labels; whole rewards make equal margins, zero among them."""
    rewards = randn(count, 2, 3, seed=seed) * 2
    source = np.random.default_rng(seed)
    labels = torch.tensor(source.choice([1.0, 0.0, -1.0, math.nan], (count, 3), p=[0.35, 0.25, 0.3, 0.1])).float()
    names = [tuple(source.choice(["x", "y", "z", ""], 2)) for _ in range(count)]
    return HeldOut([f"k{n:03d}" for n in range(count)], names, labels, rewards.round() if whole else rewards)


@pytest.mark.parametrize("whole", [False, True])
def test_confusion_is_counted_at_the_best_threshold(whole):
    for seed in range(8):
        pairs = drawn(seed=seed, whole=whole)
        labels, margins = pairs.labels[:, 0], pairs.margins[:, 0]
        threshold, counts = confusion(labels, margins)
        want = {(a, b): 0 for a in OUTCOMES for b in OUTCOMES}
        for label, margin in zip(labels.tolist(), margins.tolist()):
            if not math.isnan(label):
                said = "same" if abs(margin) <= threshold or margin == 0 else "A" if margin > 0 else "B"
                want[WORDS[label], said] += 1
        assert counts.flatten().tolist() == list(want.values())
        known = ~labels.isnan()
        best = accuracy_with_ties(labels[known], margins[known])
        assert int(counts.diagonal().sum()) / int(counts.sum()) == pytest.approx(best)
        head, rows = confusion_table({"VQ": confusion(labels, margins)})
        assert len(head) == len(rows[0]) == 7 and [row[1] for row in rows] == list(OUTCOMES)
        assert {row[-1] for row in rows} == {f"{best:.3f}"}


def test_no_tie_is_predicted_where_none_helps():
    threshold, counts = confusion(torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert threshold == -1 and counts.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert confusion_table({"VQ": (threshold, counts)})[1][0][-2] == "no ties"


def test_sources_have_accuracies_of_their_own():
    pairs = drawn(count=80, seed=3)
    found = source_accuracies(pairs)
    want: dict = {}
    for number, (a, b) in enumerate(pairs.sources):
        if a or b:
            want.setdefault(" | ".join(sorted((a or "unknown", b or "unknown"))), []).append(number)
    assert set(found) == set(want)
    assert [len(want[name]) for name in found] == sorted((len(part) for part in want.values()), reverse=True)
    for name, numbers in want.items():
        for d in range(3):
            rows = [(pairs.labels[n, d].item(), pairs.margins[n, d].item()) for n in numbers]
            decided = [(label, margin) for label, margin in rows if label in (1, -1)]
            accuracy, count = found[name][d]
            assert count == len(decided)
            assert accuracy == pytest.approx(np.mean([label * margin > 0 for label, margin in decided]))


def test_many_sources_are_cut():
    found = {f"s{n}": [(0.5, 2)] * 2 + [(math.nan, 0)] for n in range(MOST_SOURCES + 5)}
    head, rows = source_table(found)
    assert len(rows) == MOST_SOURCES + 1 and rows[-1][0] == "and 5 more" and {len(row) for row in rows} == {len(head)}
    assert rows[0] == ["s0", "0.500", "2", "0.500", "2", "", "0"]


@pytest.mark.parametrize("theta", [1.0, 5.0])
def test_surprises_are_ordered_by_what_the_model_gave_to_the_label(theta):
    pairs = drawn(seed=5)
    given = []
    for labels, margins in zip(pairs.labels.tolist(), pairs.margins.double()):
        outcomes = probabilities(margins, theta).tolist()
        counted = [d for d in range(3) if not math.isnan(labels[d]) and (labels[d] != 0 or theta > 1)]
        values = [math.log(outcomes[d][{1: 0, 0: 1, -1: 2}[labels[d]]]) for d in counted]
        wrong = any(value < math.log(max(outcomes[d])) for value, d in zip(values, counted))
        given.append((values, any(labels[d] for d in counted), wrong))
    mistakes, agreements = surprises(pairs, theta)
    assert mistakes == sorted((n for n, (_, _, wrong) in enumerate(given) if wrong), key=lambda n: min(given[n][0]))
    assert agreements == sorted(
        (n for n, (_, decided, _) in enumerate(given) if decided), key=lambda n: -np.mean(given[n][0])
    )
    assert len(mistakes) < 60 or theta > 1


def test_a_report_is_of_all_pairs_of_a_validation(network, world, tmp_path):  # noqa: F811
    report = RewardReport(mistakes=2, agreements=1)
    model, trainer = fit(network, world, tmp_path, steps=6, callbacks=[report, ExamplePairs(count=1)])
    folder = Path(trainer.log_dir)
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()
    assert {"val/confusion", "val/mistakes/1", "val/mistakes/2", "val/agreements/1"} <= set(events.Tags()["images"])
    (histogram,) = events.Histograms("val/rewards/TA")
    assert histogram.histogram_value.num == 18  # both videos of 9 pairs
    # one at a time, in another order
    pairs, rewards = [], {}
    data, model = trainer.datamodule, model.eval()
    records = {raw.key: raw.record() for raw in ShardSet(world / "val")}
    for pair in data.find_pairs(sorted(records)):
        with torch.no_grad():
            rewards[pair.key] = network(**network.processor(list(pair.videos), [pair.prompt] * 2))
        pairs.append(pair)
    whole = HeldOut(
        [pair.key for pair in pairs],
        [pair.sources for pair in pairs],
        torch.stack([pair.labels[:3] for pair in pairs]),
        torch.stack([rewards[pair.key] for pair in pairs]),
    )
    mistakes, agreements = surprises(whole, model.theta)
    clips = {clip["tag"]: clip for clip in json.loads((folder / "samples/000006/clips.json").read_text())}
    for tag, number in (("mistakes/1", mistakes[0]), ("mistakes/2", mistakes[1]), ("agreements/1", agreements[0])):
        clip, record = clips[f"val/{tag}"], records[whole.keys[number]]
        assert clip["prompt"] == record["prompt"]
        assert [side["label"] for side in clip["sides"]] == [f"{s} {record['sources'][s]}" for s in "AB"]
        for row, name in zip(clip["table"][1:], ("VQ", "MQ", "TA")):
            assert row[:2] == [name, record["labels"][name]]
        for row, (a, b) in zip(clip["table"][1:], whole.rewards[number].T.tolist()):
            assert [float(cell) for cell in row[-2:]] == pytest.approx([a, b], abs=0.011)
    text = events.Tensors("val/confusion/text_summary")[0].tensor_proto.string_val[0].decode()
    for i, name in enumerate(("VQ", "MQ", "TA")):
        if not whole.labels[:, i].isnan().all():
            row = next(line for line in text.splitlines() if line.startswith(f"| {name} | A |"))
            counts = confusion(whole.labels[:, i], whole.margins[:, i]).counts[0].tolist()
            assert [int(cell) for cell in row.split("|")[3:6]] == counts
    assert "val/sources/text_summary" in events.Tags()["tensors"]
    tags = {tag.partition("/")[0] for kind in ("scalars", "images", "histograms") for tag in events.Tags()[kind]}
    assert tags == {"epoch", "train", "val", "vitals"}  # epoch is moved by the command line's trainer


def test_counts_below_zero_are_refused():
    with pytest.raises(VideoAlignError, match="at least 0"):
        RewardReport(mistakes=-1)

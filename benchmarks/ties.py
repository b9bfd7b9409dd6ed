"""Accuracy with ties: one sorted pass against loops over the thresholds."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import row, timed

from videoalign.models import accuracy_with_ties
from videoalign.models.metrics import PreferenceAccuracy


def python_with_ties(labels: list[int], margins: list[float]) -> float:
    """A straightforward loop over the pairs sorted by absolute margin: one threshold after the other."""
    order = sorted(range(len(labels)), key=lambda i: abs(margins[i]))
    correct = sum(1 for label, margin in zip(labels, margins) if label != 0 and label * margin > 0)
    best = correct
    for place, i in enumerate(order):
        if labels[i] == 0:
            correct += 1
        elif labels[i] * margins[i] > 0:
            correct -= 1
        last = place + 1 == len(order) or abs(margins[order[place + 1]]) != abs(margins[i])
        if last and correct > best:
            best = correct
    return best / len(labels)


def torch_with_ties(labels: torch.Tensor, margins: torch.Tensor) -> float:
    """The same loop over tensors, as the official script's runs over array elements."""
    order = margins.abs().argsort()
    labels, margins = labels[order], margins[order]
    correct = int(((labels != 0) & (labels * margins > 0)).sum())
    best = correct
    for place in range(len(labels)):
        if labels[place] == 0:
            correct += 1
        elif labels[place] * margins[place] > 0:
            correct -= 1
        last = place + 1 == len(labels) or margins[place + 1].abs() != margins[place].abs()
        if last and correct > best:
            best = correct
    return best / len(labels)


def ties(folder: Path) -> None:
    """Time the accuracy with ties of as many pairs as VideoGen-RewardBench has.

    Args:
        folder: Folder for files; none are needed.
    """
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.choice([1, -1, 0], 26457, p=[0.27, 0.26, 0.47]))
    margins = torch.tensor(rng.normal(0, 1, 26457) + labels.numpy(), dtype=torch.float32)
    lists = labels.tolist(), margins.tolist()
    assert accuracy_with_ties(labels, margins) == python_with_ties(*lists) == torch_with_ties(labels, margins)
    fast = partial(accuracy_with_ties, labels, margins)
    loop, ours = timed(lambda: python_with_ties(*lists), fast)
    row("accuracy with ties, 26,457 pairs: loop over Python lists", loop, ours)
    loop, ours = timed(lambda: torch_with_ties(labels, margins), fast, repeats=3)
    row("accuracy with ties, 26,457 pairs: loop over tensors", loop, ours)
    metric, columns = PreferenceAccuracy(), rng.choice([1.0, -1.0, 0.0], (26457, 4), p=[0.27, 0.26, 0.47])
    rewards = torch.tensor(rng.normal(0, 1, (26457, 3)) + columns[:, :3], dtype=torch.float32)
    prompts = torch.tensor(rng.integers(0, 420, 26457))
    metric.update(rewards, torch.tensor(columns, dtype=torch.float32), prompts=prompts)

    def intervals() -> dict[str, dict]:
        metric._computed = None  # or it would give what it computed before
        return metric.compute()

    def loops() -> list[float]:
        return [torch_with_ties(labels.long(), margins) for labels, margins, _ in metric.columns().values()]

    assert loops() == [found["with_ties"] for found in intervals().values()]
    name = "four columns, intervals of 1,000 resamples: loop without intervals"
    row(name, *timed(loops, intervals, repeats=3))

"""Accuracy with ties: one sorted pass against loops over the thresholds."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import row, timed

from videoalign.models import accuracy_with_ties


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

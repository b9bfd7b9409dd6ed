"""`make bench` runs: its preparations and its checks that both ways of a row give the same, each way once."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import decoding
import generators
import ratios
import rewards
import rollouts
import ties

MODULES = (ties, decoding, rewards, rollouts, generators)
ROWS = {"ties": (3, 0), "decoding": (5, 10), "scoring": (3, 1), "one_forward": (1, 0), "frames_at_once": (2, 0)}
"""Rows of a section, and how often each frame of its clips is repeated: `decoding` takes them for five seconds long."""


def once(*ways, repeats=0):
    """Each way once; what it takes is measured by `make bench`."""
    for way in ways:
        way()
    return [[1.0] for _ in ways]


def plain_waves(times, rng):
    """A clip of the benchmark's size that is made and coded in no time."""
    shades = rng.integers(0, 120, (12, 1, 1, 3)) + np.arange(832)[None, None, :, None] // 8
    return np.broadcast_to(shades, (12, 480, 832, 3)).astype(np.uint8).repeat(times, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_section_prints_its_rows(name, tmp_path, monkeypatch, capsys):
    rows, times = ROWS[name]
    for module in MODULES:
        monkeypatch.setattr(module, "timed", once)
    monkeypatch.setattr(decoding, "_waves", partial(plain_waves, times))
    threads = torch.get_num_threads()
    try:
        ratios.SECTIONS[name](tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("x  (range ") == rows

"""Logged means count every sample of a step or an epoch, however many processes share them and however unevenly."""

import math
import socket

import pytest
import torch
import torch.multiprocessing as multiprocessing

from videoalign.alignment.means import Means

VALUES = torch.tensor(
    [0.3, -1.7, 2.0, 5.5, 0.1, 0.2, -4.0, 8.0, 1.0, 3.0, 0.7, 0.9, 4.4, 2.2, 6.1, 0.05, 1.5, 2.5, 9.0]
)
"""There are 19 samples, which no number of processes here divides."""


def brute(values: torch.Tensor) -> dict[str, float]:
    values = values.double()
    return {"loss": values.mean().item(), "weights/max": values.max().item()}


def test_one_process_equals_brute_force():
    means = Means()
    for part in VALUES.split(4):
        means.add("loss", part)
        means.add("weights/max", part)
        means.add("masked", part, part > 1)
        means.add("never", part, torch.zeros_like(part, dtype=torch.bool))
    found = means.compute()
    assert found.pop("masked") == pytest.approx(VALUES[VALUES > 1].double().mean().item(), rel=1e-12)
    assert found == pytest.approx(brute(VALUES), rel=1e-12)
    means.reset()
    assert means.compute() == {}


def test_a_mask_of_samples_covers_both_sides_of_a_pair():
    means = Means()
    means.add("loss", torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]), torch.tensor([True, False, True]))
    assert means.compute() == {"loss": 4.0}


def test_what_is_not_finite_is_not_hidden():
    means = Means()
    means.add("loss", torch.tensor([1.0, torch.nan]))
    means.add("weights/max", torch.tensor([1.0, torch.inf]))
    found = means.compute()
    assert math.isnan(found["loss"])
    assert found["weights/max"] == math.inf


def _rank(rank: int, world: int, port: int, cuts: list[int]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    means = Means()
    for part in VALUES.tensor_split(cuts)[rank].split(2):
        if len(part):  # the last rank has nothing at all, not even names
            means.add("loss", part)
            means.add("weights/max", part)
    assert means.compute() == pytest.approx(brute(VALUES), rel=1e-12)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("cuts", [[11], [1, 19]], ids=["two ranks", "three ranks, the last with nothing"])
def test_several_processes_equal_brute_force(cuts):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The processes are forked, so that nothing is imported anew.
    multiprocessing.start_processes(_rank, (len(cuts) + 1, port, cuts), len(cuts) + 1, start_method="fork")

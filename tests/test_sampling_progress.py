"""Callbacks that sample say how far they are, and warn before they take long."""

import re

import pytest
import torch

from flow_kit import data, fit, make
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO, FlowSFT, OnlineDPO
from videoalign.callbacks import SideBySide, prompt_sampler
from videoalign.callbacks.prompt_sampler import Sampling, SamplingProgress
from videoalign.commands.arms import compare


class Clock:
    """A clock that each look moves on."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def monotonic(self):
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize(
    ("seconds", "said"), [(30.1, "about 10 minutes each time: 2 times 10 steps of 30.1 s on cpu"), (29.9, None)]
)
def test_the_second_step_tells_how_long_all_of_them_take(seconds, said, monkeypatch, recwarn):
    monkeypatch.setattr(prompt_sampler, "time", Clock(seconds))
    count = SamplingProgress("SideBySide", 2, 10, torch.device("cpu"), shown=True)
    for _ in range(20):
        count()
    warned = [str(w.message) for w in recwarn if "SideBySide will sample" in str(w.message)]
    assert len(warned) == (said is not None)
    assert not said or said in warned[0]


def test_another_rank_says_nothing(capsys):
    count = SamplingProgress("WinRate", 1, 2, torch.device("cpu"), shown=False)
    count()
    count()
    assert capsys.readouterr().err == ""


def test_side_by_side_counts_every_step_and_takes_the_size_of_the_latents(folders, pairs, capsys, monkeypatch):
    monkeypatch.setattr(prompt_sampler, "LONG", 0.0)
    side = SideBySide(["a red circle", "b"], Sampling(steps=3, cfg_scale=2.0))
    module = make(FlowDPO, folders["wan"])
    with pytest.warns(UserWarning, match=r"SideBySide will sample for about 0 minutes each time: 4 times 3 steps"):
        fit(module, data(pairs["wan"], val=pairs["wan"]), 1, [side], limit_val_batches=1, val_check_interval=1)
    lines = re.findall(r"SideBySide, sampling steps: (\d+)/12", capsys.readouterr().err)
    assert lines[-1] == "12"
    assert tuple(side.sampler.shape) == (16, 2, 4, 4)  # SHAPE of the latents
    assert (side.sampling.num_frames, side.sampling.height, side.sampling.width) == (5, 32, 32)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_reference_that_never_changes_is_sampled_once(fixed, folders, pairs, capsys, monkeypatch):
    monkeypatch.setattr(FlowDPO, "reference_is_fixed", fixed)
    side, module = SideBySide(["a red circle", "b"], Sampling(steps=3)), make(FlowDPO, folders["wan"])
    found, both = [], prompt_sampler.PromptSampler.both
    monkeypatch.setattr(prompt_sampler.PromptSampler, "both", lambda *given: found.append(both(*given)) or found[-1])
    fit(module, data(pairs["wan"], val=pairs["wan"]), 2, [side], limit_val_batches=1, val_check_interval=1)
    counted = re.findall(r"SideBySide, sampling steps: (\d+/\d+)", capsys.readouterr().err)
    assert [last for last in counted if len({*last.split("/")}) == 1] == ["12/12", "6/6" if fixed else "12/12"]
    assert len(found) == 4
    for (before, reference), (after, again) in zip(found[:2], found[2:]):
        assert torch.equal(reference, again) and not torch.equal(before, after)  # the policy has learnt


def test_a_moving_reference_says_so(folders):
    assert make(FlowDPO, folders["wan"]).reference_is_fixed
    assert make(FlowDPO, folders["wan"], lora=None).reference_is_fixed  # a copy of the first weights
    assert not make(FlowSFT, folders["wan"], lora=None).reference_is_fixed
    own = {"rewards": {"any": None}, "sampling": Sampling(num_frames=5, height=32, width=32)}
    assert make(OnlineDPO, folders["wan"], **own).reference_is_fixed
    assert make(OnlineDPO, folders["wan"], **own, refresh=2).reference_is_fixed  # its loss has another one


def test_a_size_is_given_whole_or_not_at_all():
    with pytest.raises(
        VideoAlignError, match=r"sampling\.height is missing: give num_frames, height and width, or none"
    ):
        Sampling(num_frames=9, width=32)
    with pytest.raises(VideoAlignError, match="sampling needs num_frames, height, width"):
        Sampling().complete()


def test_a_negative_prompt_that_nothing_reads_is_refused():
    with pytest.raises(VideoAlignError, match=r"sampling\.negative: .* raise sampling\.cfg_scale"):
        Sampling(negative="blurry")
    assert Sampling(negative="blurry", cfg_scale=2.0).negative == "blurry"
    assert Sampling(negative="blurry", cfg_scale_2=2.0).negative == "blurry"


def test_a_comparison_needs_a_size(folders, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(VideoAlignError, match="sampling needs num_frames, height, width"):
        compare(folders["wan"], str(tmp_path / "p.txt"), str(tmp_path / "out"), Sampling(), {"x": None})
    assert not (tmp_path / "out").exists()

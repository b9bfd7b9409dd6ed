"""`videoalign plan`: what it counts is what a step holds, and what it cannot count it says."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from flow_kit import SMALL, folders, pairs  # noqa: F401  fixtures
from helpers import call
from videoalign.alignment import FlowDPO, FlowSFT, NoisyRewardModel
from videoalign.alignment.footprint import measure, without_storage
from videoalign.commands.planned_batch import Clip, batch_of
from videoalign.models.generator_folder import load_generator
from videoalign.models.known_generators import KNOWN, write_configs
from videoalign.models.live_memory import LiveMemory, size_of
from videoalign.models.noisy_reward import NoisyRewardShape
from videoalign.models.whole import shapes_only

HERE = Path(__file__).parent
SIZE = ("--num-frames", "5", "--height", "32", "--width", "32")
CLIP = Clip((16, 2, 4, 4), 2, {"prompt": (12, 32)}, "")
DPO = ("--config", "experiments/flow/wan_sft.yaml", "--config", "experiments/flow/wan_dpo.yaml")
ON_POLICY = ("--config", "experiments/flow/wan_on_policy.yaml")


# --- what is counted ------------------------------------------------------------------------------


def test_live_memory_knows_what_is_held_for_what():
    memory = LiveMemory()
    weight = torch.ones(250, requires_grad=True)
    with memory:
        memory.mark("weights", [weight, weight.view(25, 10)])
        assert memory.live == {"activations": 0, "weights": 1000}
        out = weight * 2  # 1000 bytes
        other = out.view(5, 50) + 1
        assert memory.live["activations"] == 2000
        del out
        assert memory.live["activations"] == 1000
        other.sum().backward()
        memory.mark("gradients", [weight.grad])
    assert memory.live["gradients"] == 1000
    assert 3000 <= memory.highest <= 4100
    del other
    memory.reset()
    assert memory.highest == 2000


def test_size_counts_a_storage_once():
    weight = torch.empty(10, dtype=torch.bfloat16, device="meta")
    assert size_of([weight, weight.view(2, 5), torch.empty(3)]) == 32


def step_of(kind, folder, real=False, cached=False, **options):
    clip = Clip(CLIP.latents, 1 + max(getattr(kind, "sides", (1,))), CLIP.encoded, "")
    count = lambda module: measure(module, partial(batch_of, clip, 2, cached))  # noqa: E731
    if real:
        return count(kind(generator=folder, **options))
    with shapes_only():
        module = kind(generator=folder, **options)
    with without_storage(module):
        return count(module)


@pytest.mark.parametrize("family", ["wan", "ltx"])
@pytest.mark.parametrize("lora", [SMALL, None])
def test_shapes_count_as_tensors_do(family, lora, folders):  # noqa: F811
    planned, held = (step_of(FlowDPO, folders[family], real, lora=lora) for real in (False, True))
    assert planned.weights == held.weights
    assert (planned.gradients, planned.moments, planned.flops) == (held.gradients, held.moments, held.flops)
    assert planned.activations == pytest.approx(held.activations, rel=0.02)
    trained = planned.weights.trained
    assert planned.gradients == trained
    assert planned.moments == pytest.approx(2 * trained, rel=0.01)  # AdamW's, and its step counts
    assert planned.weights.reference == (0 if lora else trained + planned.weights.frozen)  # its buffers are copied, too


def test_a_noisy_reward_is_counted(folders):  # noqa: F811
    shape = NoisyRewardShape(blocks=1, hidden=16)
    planned, held = (step_of(NoisyRewardModel, folders["wan"], real, shape=shape) for real in (False, True))
    assert planned.weights.trained == held.weights.trained
    assert planned.activations == pytest.approx(held.activations, rel=0.02)


def test_what_saves_memory_is_seen(folders):  # noqa: F811
    kept, again = (step_of(FlowSFT, folders["wan"], lora=SMALL, gradient_checkpointing=c) for c in (False, True))
    assert again.activations < kept.activations
    assert again.flops > kept.flops
    live, cached = (step_of(FlowDPO, folders["wan"], lora=SMALL, cached=c) for c in (False, True))
    assert cached.flops < live.flops
    # two of its two blocks are gathered, so that sharding this miniature saves little
    assert again.peak(shards=2) > again.peak(shards=4) > again.weights.apart + again.activations
    assert again.peak(buckets=True) == again.peak() + again.gradients


@pytest.mark.slow
def test_the_peak_is_the_one_that_a_process_has(tmp_path):
    """Of a training by Lightning, the peak of its second step, as the system counts it."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", ""), *map(str, sys.path)])
    # every tensor from the system and back to it: a heap keeps holes
    plain = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}
    plain |= {"MALLOC_TOP_PAD_": "0", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(
        [sys.executable, HERE / "peak_of_steps.py", tmp_path],
        env={**os.environ, "PYTHONPATH": paths, **plain},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert len(rows) == 6
    for row in rows:
        assert row["planned"] == pytest.approx(row["measured"], rel=0.15), row


# --- the command ----------------------------------------------------------------------------------


def planned(*args, capsys, out):
    assert call("plan", *args, "--json", out) == 0, capsys.readouterr().err
    return capsys.readouterr().out, json.loads(out.read_text())


def test_an_experiment_is_planned(folders, pairs, tmp_path, capsys):  # noqa: F811
    given = [*DPO, "--model.generator", folders["wan"], "--model.lora.rank", "4"]
    said, sized = planned(*given, *SIZE, capsys=capsys, out=tmp_path / "a.json")
    assert "FlowDPO" in said and "LoRA of rank 4, reference errors computed in the step" in said
    assert "latents 16 x 2 x 4 x 4 (5 frames of 32 x 32), 1 x 2 videos" in said
    assert "checkpointing*" in said
    _, stored = planned(*given, "--data.train", pairs["wan"], capsys=capsys, out=tmp_path / "b.json")
    with_step = sized["steps"]["checkpointing"]
    assert stored["steps"]["checkpointing"]["weights"] == with_step["weights"]
    assert with_step["peak"]["DDP, 8 GPUs"] == with_step["peak"]["one GPU"] + with_step["gradients"]


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "plan needs an experiment"),
        (DPO, "plan needs the shape of the latents"),
        ((*DPO, "--data.train", "PAIRS", *SIZE), "has its own shapes"),
        ((*DPO, *SIZE, "--num-frames", "6"), "num_frames is 6"),
        ((*DPO, *SIZE, "--trainer.precision", "bf16-true"), "trainer.precision"),
        ((*DPO, *SIZE, "--model.lora.targets", "[to_x]"), "match no linear layer"),
        ((*DPO, *SIZE, "--data.train", "nowhere"), "has its own shapes"),
        ((*DPO, "--data.train", "nowhere"), "nowhere"),
        ((*DPO, *SIZE, "--gpus", "0"), "--gpus"),
        ((*DPO, *SIZE, "--image"), "takes no images"),
        ((*DPO, *SIZE, "--model.memory.quantization", "torchao_int8"), "not under model.memory.quantization"),
        ((*DPO, *SIZE, "--model.lorra", "1"), "lorra"),
        (("--config", "experiments/videoreward/qwen2vl_2b.yaml", *SIZE), "plan counts trainings on latents"),
        ((*ON_POLICY, *SIZE), "OnlineDPO samples before it"),
    ],
)
def test_what_cannot_be_planned(options, message, folders, pairs, capsys):  # noqa: F811
    options = [pairs["wan"] if option == "PAIRS" else option for option in options]
    mine = ["--model.generator", folders["wan"]] if {DPO[1], ON_POLICY[1]} & {*options} else []
    assert call("plan", *options, *mine) == 2
    assert message in capsys.readouterr().err


# --- released generators --------------------------------------------------------------------------

MILLIONS = {  # of the transformer, as cards and papers have them
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1419,
    "Lightricks/LTX-Video": 1923,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_a_released_generator_needs_no_download(name, tmp_path):
    write_configs(name, tmp_path)
    with shapes_only():
        generator = load_generator(tmp_path, "bfloat16", ("transformer", "vae"))
    parameters = list(generator.parameters())
    assert all(p.is_meta for p in parameters)
    assert round(sum(p.numel() for p in generator.transformer.parameters()) / 1e6) == MILLIONS[name]
    assert {p.dtype for p in generator.vae.parameters()} == {torch.float32}


def test_known_generators_are_whole():
    for pipeline, _, parts in KNOWN.values():
        assert pipeline.endswith("Pipeline")
        assert {"transformer", "vae", "scheduler"} <= parts.keys()

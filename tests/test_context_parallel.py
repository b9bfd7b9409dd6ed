"""The tokens of a sample over several processes, beside FSDP2; one process computes the same."""

from types import SimpleNamespace

import pytest
import torch

from flow_kit import close
from forked import forked
from videoalign import VideoAlignError
from videoalign.alignment import ContextParallel
from videoalign.datamodules.data_ranks import data_ranks
from videoalign.models.parallelize import _check_tokens, split_tokens

SCRIPT = """
import sys, torch, lightning as L
from functools import partial
from forked import THREE_STEPS, on_ranks
from videoalign.alignment import ContextParallel, FlowDPO, FlowSFT
from videoalign.datamodules.latents import LatentPairs
from videoalign.models.flow import draw
from videoalign.models.lora import LoRA
torch.set_num_threads(1)
torch.accelerator.device_count = lambda: 1  # diffusers divides by the number of accelerators, and a CPU has none
wan, wan_pairs, out = sys.argv[1:]
LORA = LoRA(rank=4, alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0"])

class Watch(L.Callback):
    def on_fit_start(self, trainer, module):
        self.steps = []
    def on_after_backward(self, trainer, module):
        if trainer.global_step == 0:
            whole = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            self.gradients = {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in whole.items()}
    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.batch = batch
    def on_train_end(self, trainer, module):
        generator, batch = module.generator, self.batch
        width = batch["conditions"][0]["prompt"].shape[1]
        condition = generator.condition([{"prompt": torch.full((5, width), 0.1)}])
        noise = draw(torch.tensor([3]), batch["latents"].shape[2:], torch.device("cpu"))[1]
        self.sample = generator.sample(condition, noise, 2)

def run(kind, data_size):
    devices, result = {"single": 1, "context": 2, "both": 4}[kind], {}
    for name, algorithm, options in [
        ("lora", FlowSFT, {"lora": LORA, "gradient_checkpointing": True}),
        ("full", FlowDPO, {"lora": None}),
    ]:
        L.seed_everything(0)
        model = algorithm(generator=wan, optimizer=partial(torch.optim.SGD, lr=0.05), **options)
        with torch.no_grad():
            for i, (n, p) in enumerate(model.policy.named_parameters()):
                if p.requires_grad and ".lora_A" not in n:
                    p += 0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        watch = Watch()
        strategy = "auto" if kind == "single" else ContextParallel(data_size, ulysses_degree=2)
        trainer = L.Trainer(devices=devices, strategy=strategy, callbacks=[watch], **THREE_STEPS)
        # the same global batch of all 8 pairs in each step, whoever computes it
        sizes = {"batch_size": 8 // data_size, "val_batch_size": 3, "workers": 0, "shuffle_buffer": 0}
        data = LatentPairs(wan_pairs, wan_pairs, **sizes)
        trainer.fit(model, data)
        weights = {}
        for n, p in model.named_parameters():
            if p.requires_grad:
                weights[n] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        val = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        found = {"weights": weights, "steps": watch.steps, "val": val, "sample": watch.sample}
        result[name] = {**found, "gradients": watch.gradients, "batches": trainer.num_training_batches}
        torch.save(result, f"{out}/{kind}-{trainer.global_rank}.pt")

for kind, processes, data_size in (("single", 1, 1), ("context", 2, 1), ("both", 4, 2)):
    on_ranks(processes, partial(run, kind, data_size))
"""


@pytest.mark.slow
def test_processes_that_share_samples_train_as_one(folders, pairs, tmp_path):
    """Losses, gradients, weights after three steps, held-out metrics and samples are those of one process."""
    done = forked(SCRIPT, folders["wan"], pairs["wan"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    def of(kind, rank=0):
        return torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True)

    single = of("single")
    for kind, ranks in (("context", 2), ("both", 4)):
        for rank in range(ranks):
            for name, found in of(kind, rank).items():
                want = single[name]
                scale = max(g.abs().max() for g in want["gradients"].values()).item()
                close(found["gradients"], want["gradients"], rtol=0, atol=1e-5 * scale)
                close(found["weights"], want["weights"], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(found["sample"], want["sample"], rtol=1e-4, atol=1e-4)
                assert found["batches"] == want["batches"]
                for step, plain in zip(found["steps"], want["steps"], strict=True):
                    assert step["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-5)
                    assert step == pytest.approx(plain, rel=1e-4)  # beta multiplies differences
                assert found["val"] == pytest.approx(want["val"], rel=1e-4)


# --- refusals -------------------------------------------------------------------------------------


def mesh(ring=1, ulysses=2):
    return {name: SimpleNamespace(size=lambda n=n: n) for name, n in (("ring", ring), ("ulysses", ulysses))}


def test_transformers_that_diffusers_cannot_split_are_refused(generator, family):
    net = generator.transformer
    if family == "ltx":
        with pytest.raises(VideoAlignError, match="masks of prompts do not follow; use FSDP2 alone"):
            split_tokens(net, mesh())
        return
    with pytest.raises(VideoAlignError, match="ulysses_degree 3 does not divide the 4 attention heads"):
        split_tokens(net, mesh(ulysses=3))
    with pytest.raises(VideoAlignError, match="needs accelerators"):
        split_tokens(net, mesh())
    net._cp_plan = None
    with pytest.raises(VideoAlignError, match="no plan to split the tokens of a WanTransformer3DModel"):
        split_tokens(net, mesh())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "both are 1"),
        ({"ulysses_degree": 0}, "ulysses_degree must be at least 1, got 0"),
        ({"data_parallel_size": 0, "ring_degree": 2}, "data_parallel_size must be at least 1"),
        ({"ulysses_degree": 2, "ring_degree": 2, "anything": True}, "not with both"),
        ({"ulysses_degree": 2, "minutes": 0.0}, "minutes must be above 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, said):
    with pytest.raises(VideoAlignError, match=said):
        ContextParallel(**options)


def test_clips_whose_tokens_the_devices_do_not_share_evenly_are_refused(wan):
    net = wan.transformer
    latents = torch.zeros(1, 16, 3, 6, 4)  # 3 x 3 x 2 tokens of 1 x 2 x 2 latents
    _check_tokens(2, net, (latents,), {})
    _check_tokens(9, net, (), {"hidden_states": latents})
    with pytest.raises(VideoAlignError, match="has 18 tokens, which 4 devices do not share evenly"):
        _check_tokens(4, net, (latents,), {})
    with pytest.raises(VideoAlignError, match="has 7 tokens"):  # of a family that packs them
        _check_tokens(2, net, (torch.zeros(1, 7, 16),), {})


def test_data_are_dealt_to_groups_that_share_samples():
    """Rank 5 of 8, in groups of 2 ranks that share samples, is in the third of four groups."""
    groups = SimpleNamespace(size=lambda: 4, get_local_rank=lambda: 2)
    module = SimpleNamespace(device_mesh={"data_parallel": groups})
    trainer = SimpleNamespace(lightning_module=module, global_rank=5, world_size=8)
    assert data_ranks(trainer) == (2, 4)
    module.device_mesh = None
    assert data_ranks(trainer) == (5, 8)

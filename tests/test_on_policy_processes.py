"""On-policy training on several processes: the same samples, advantages and weights as on one."""

import pytest
import torch

from flow_kit import PROMPTS, folders  # noqa: F401
from forked import forked

SCRIPT = """
import sys, torch, lightning as L
from dataclasses import replace
from functools import partial
from forked import THREE_STEPS, on_ranks, strategy
from test_on_policy import KINDS, SIZE, Bright
from videoalign.callbacks import HeldOutPrompts
from videoalign.datamodules.prompt_groups import PromptGroups
from videoalign.models.advantages import Advantages
from videoalign.models.lora import LoRA
generator, prompts, out = sys.argv[1:]
# proj_out lies outside of the blocks: FSDP2 keeps it whole after a forward without gradients
LORA = LoRA(rank=4, alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0", "proj_out"])

class Watch(L.Callback):
    def __init__(self):
        self.steps, self.samples = [], {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        if batch.first:
            for place, one in zip(module.rollout.places, module.rollout.latents):
                self.samples[batch.iteration, place] = one
            self.samples[batch.iteration, "advantages"] = module.rollout.advantages
            ends = module.latents_at([0, 7])  # of two ranks, both on each
            self.samples[batch.iteration, "ends"] = torch.stack([ends[0], ends[7]])

def run(kind):
    result, devices = {}, 1 if kind == "single" else 2
    average = partial(KINDS["awm"], kl_average=0.5, average_rise=None)
    for name, algorithm in {**KINDS, "awm with an average": average}.items():
        L.seed_everything(0)
        model = algorithm(generator=generator, rewards={"r": Bright()}, sampling=SIZE, lora=LORA, updates=2,
                          advantages=Advantages(weights={"r/first": 1.0}), optimizer=partial(torch.optim.SGD, lr=0.05))
        watch, look = Watch(), HeldOutPrompts(prompts, replace(SIZE, batch_size=1), samples=2, every=2)
        options = {**THREE_STEPS, "max_steps": 4, "limit_val_batches": 0, "val_check_interval": None}
        trainer = L.Trainer(devices=devices, strategy=strategy(kind), callbacks=[watch, look], **options)
        # as many rows of a step in one micro-batch on every number of ranks
        trainer.fit(model, PromptGroups(prompts, groups=2, samples=4, batch_size=8 // devices))
        weights = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
                   for n, p in model.trained().items()}
        result[name] = {"weights": weights, "steps": watch.steps, "samples": watch.samples}
        torch.save(result, f"{out}/{kind}-{trainer.global_rank}.pt")

for kind in ("single", "ddp", "fsdp2"):
    on_ranks(1 if kind == "single" else 2, partial(run, kind))
"""


@pytest.mark.slow
def test_two_processes_sample_and_train_as_one(folders, tmp_path):  # noqa: F811
    """Groups are spread over the ranks; best and worst of one may lie on different ones."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    done = forked(SCRIPT, folders["wan"], tmp_path / "prompts.txt", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one = torch.load(tmp_path / "single-0.pt", weights_only=True)
    for kind in ("ddp", "fsdp2"):
        ranks = [torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name, want in one.items():
            both = ranks[0][name]["samples"] | ranks[1][name]["samples"]
            assert both.keys() == want["samples"].keys()
            for place, sample in want["samples"].items():
                torch.testing.assert_close(both[place], sample, rtol=1e-4, atol=1e-5)
            for found in (ranks[0][name], ranks[1][name]):
                for weight, tensor in want["weights"].items():
                    same = found["weights"][weight]
                    torch.testing.assert_close(same, tensor, rtol=1e-4, atol=1e-6, msg=f"{kind} {name} {weight}")
            last, same = want["steps"][-1], ranks[0][name]["steps"][-1]
            assert same["train/loss"] == pytest.approx(last["train/loss"], rel=1e-3, abs=1e-6)
            for held in ("win_rate/r/first", "reward/policy/r/first", "reward/reference/r/second", "drift"):
                assert same[f"held_out/{held}"] == pytest.approx(last[f"held_out/{held}"], rel=1e-3, abs=1e-6), held
            assert same["groups/diversity"] == pytest.approx(last["groups/diversity"], rel=1e-4)
            assert same["reward/r/first/mean"] == pytest.approx(last["reward/r/first/mean"], rel=1e-4)

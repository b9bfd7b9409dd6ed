"""Trainings of generators against sums by hand, their draws and order, and several processes."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from flow_kit import LN2, PROMPTS, SHAPE, SMALL, close, data, fit, graded, loaded, make, write
from forked import forked
from helpers import QUIET, randn
from lora_kit import random_updates, skeleton, write_updates
from videoalign import VideoAlignError
from videoalign.alignment import CacheReference, FlowDPO, FlowIPO, FlowRWR, FlowSFT
from videoalign.datamodules.reference_errors import ReferenceDraws
from videoalign.models.flow import TimeLaw, draw, interpolate
from videoalign.models.flow_losses import ConstantBeta
from videoalign.models.generator_folder import load_generator

# --- trainings against sums by hand ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("wan", {}),
        ("ltx", {"gradient_checkpointing": True, "times": TimeLaw(law="logit_normal", shift=3.0)}),
        ("wan", {"lora": None, "gradient_checkpointing": True}),
    ],
    ids=["wan", "ltx-checkpointed", "wan-full"],
    indirect=["family"],
)
def test_dpo_step_equals_the_equation_over_separate_forwards(family, options, folders, pairs):
    """Loss, gradient and logs follow from four plain calls a pair, two of an untouched transformer."""
    model = make(FlowDPO, folders[family], beta=ConstantBeta(60.0), **options)
    datamodule = data(pairs[family])
    watch = fit(model, datamodule, max_epochs=1, accumulate_grad_batches=1)
    model = make(FlowDPO, folders[family], beta=ConstantBeta(60.0), **{**options, "gradient_checkpointing": False})
    reference = load_generator(folders[family])
    batch = next(iter(loaded(data(pairs[family]), model).train_dataloader()))
    u, noise = draw(batch["seeds"], torch.Size(SHAPE), torch.device("cpu"))
    t = model.times(u)
    losses, margins = [], []
    for n, key in enumerate(batch["keys"]):
        a, b = (randn(*SHAPE, seed=100 * int(key[1:]) + s) for s in range(2))
        record = graded(int(key[1:]))["rewards"]
        better = sum(record["A"].values()) > sum(record["B"].values())
        condition = reference.condition([batch["conditions"][n]])
        difference = []
        for video in (a, b) if better else (b, a):
            x = ((1 - t[n]) * video + t[n] * noise[n])[None]
            policy = model.generator.velocity(x, t[n : n + 1], condition)[0]
            with torch.no_grad():
                before = reference.velocity(x, t[n : n + 1], condition)[0]
            target = noise[n] - video
            difference.append((policy - target).pow(2).mean().double() - (before - target).pow(2).mean().double())
        margin = -30.0 * (difference[0] - difference[1])
        losses.append(torch.log(1 + torch.exp(-margin))), margins.append(margin.item())
    loss = sum(losses) / len(losses)
    loss.backward()
    assert max(abs(m) for m in margins) > 0.01
    assert watch.steps[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert watch.steps[0]["train/rewards/margins"] == pytest.approx(sum(margins) / 4, rel=1e-3, abs=1e-4)
    accuracy = sum(m > 0 for m in margins) / 4
    assert watch.steps[0]["train/rewards/accuracies"] == pytest.approx(accuracy)
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    scale = max(g.abs().max() for g in want.values()).item()
    close(watch.gradients, want, rtol=2e-3, atol=2e-4 * scale)


@pytest.mark.parametrize("lora", [SMALL, None], ids=["lora", "full"])
def test_policy_gradient_is_the_same_with_reference_errors_as_constants(lora, family, folders, pairs):
    """This holds under gradient checkpointing, too: the backward pass recomputes the policy."""

    def gradients(constants, checkpointing):
        model = make(FlowDPO, folders[family], lora=lora, gradient_checkpointing=checkpointing)
        if constants is not None:
            model.reference_errors = lambda batch, latents: constants
        else:
            kept, compute = [], model.reference_errors
            model.reference_errors = lambda *a: kept.append(compute(*a)) or kept[-1]
        watch = fit(model, data(pairs[family]))
        return watch.gradients, constants if constants is not None else kept[0]

    want, constants = gradients(None, False)
    assert not constants.requires_grad
    close(gradients(constants, False)[0], want, rtol=0, atol=0)
    close(gradients(None, True)[0], want, rtol=1e-5, atol=1e-7)
    assert any(g.abs().max() > 0 for g in want.values())


@pytest.mark.parametrize("lora", [SMALL, None], ids=["lora", "full"])
def test_dpo_begins_at_ln_2_with_no_margin(lora, family, folders, pairs):
    model = make(
        FlowDPO, folders[family], trained=False, lora=lora, gradient_checkpointing=True, beta=ConstantBeta(5000.0)
    )
    steps = fit(model, data(pairs[family]), steps=2).steps
    assert steps[0]["train/loss"] == LN2
    assert steps[0]["train/rewards/margins"] == 0.0 and steps[0]["train/rewards/accuracies"] == 0.5
    for side in ("chosen", "rejected"):
        assert steps[0][f"train/velocity_error/{side}"] == steps[0][f"train/velocity_error/{side}/reference"] > 0
    assert steps[1]["train/rewards/margins"] != 0.0


def test_dpo_begins_at_ln_2_in_bfloat16(folders, pairs, family):
    model = make(FlowDPO, folders[family], trained=False, dtype="bfloat16")
    steps = fit(model, data(pairs[family]), steps=2).steps
    assert steps[0]["train/loss"] == LN2 and steps[0]["train/rewards/margins"] == 0.0
    assert steps[1]["train/rewards/margins"] != 0.0


def test_adapters_of_a_bfloat16_transformer_are_fp32(folders, pairs, family):
    model = make(FlowDPO, folders[family], trained=False, dtype="bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_cached_reference_errors_train_as_computed_ones(folders, pairs, tmp_path):
    """Both use the same draws: those of the first epoch, again in each epoch."""
    draws = ReferenceDraws(pairs["wan"], str(tmp_path / "cache"), batch_size=3, workers=0)
    L.Trainer(**QUIET).predict(CacheReference(folders["wan"]), draws, return_predictions=False)
    cached, computed = (make(FlowDPO, folders["wan"], beta=ConstantBeta(50.0)) for _ in range(2))
    cached.as_reference = None  # never asked for
    found = fit(cached, data(pairs["wan"], batch_size=8, reference=str(tmp_path / "cache")), steps=2)
    want = fit(computed, data(pairs["wan"], batch_size=8), steps=2)
    close(found.gradients, want.gradients, rtol=1e-4, atol=1e-6)
    assert found.steps[0] == pytest.approx(want.steps[0], rel=1e-4, abs=1e-5)
    key = "train/velocity_error/chosen/reference"  # drawn anew in the second epoch, or not
    assert found.steps[1][key] == found.steps[0][key]
    assert want.steps[1][key] != want.steps[0][key]
    other = make(FlowDPO, folders["wan"], times=TimeLaw(shift=3.0))
    with pytest.raises(VideoAlignError, match="other times than this training"):
        fit(other, data(pairs["wan"], reference=str(tmp_path / "cache")))


def test_dpo_learns_the_preferences_it_is_given(folders, pairs):
    model = make(FlowDPO, folders["wan"], trained=False, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    steps = fit(model, data(pairs["wan"], batch_size=7), steps=15).steps
    assert steps[-1]["train/loss"] < 0.5 * LN2 and steps[-1]["train/rewards/accuracies"] == 1.0
    assert steps[-1]["train/rewards/margins"] == pytest.approx(
        steps[-1]["train/rewards/chosen"] - steps[-1]["train/rewards/rejected"], rel=1e-4
    )


def test_sft_is_flow_matching_on_the_preferred_video(folders, pairs):
    model = make(FlowSFT, folders["wan"])
    batch = next(iter(loaded(data(pairs["wan"]), model).train_dataloader()))
    with torch.no_grad():
        u, noise = draw(batch["seeds"], torch.Size(SHAPE), torch.device("cpu"))
        x = interpolate(batch["latents"][0], noise, u)
        v = model.generator.velocity(x, u, model.generator.condition(batch["conditions"]))
        want = (v - (noise - batch["latents"][0])).pow(2).mean()
    steps = fit(model, data(pairs["wan"])).steps
    assert steps[0]["train/loss"] == pytest.approx(want.item(), rel=1e-5)


def test_sft_needs_neither_pairs_nor_rewards(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, of="videos", record=lambda i: {"prompt": PROMPTS[0]})
    assert fit(make(FlowSFT, folders["wan"]), data(path), steps=2).steps[1]["train/loss"] > 0


@pytest.mark.parametrize("kind", [FlowSFT, FlowDPO, FlowIPO, FlowRWR])
@pytest.mark.parametrize("lora", [SMALL, None], ids=["lora", "full"])
def test_only_what_trains_changes(kind, lora, folders, pairs):
    model = make(kind, folders["wan"], trained=False, lora=lora, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    fit(model, data(pairs["wan"]), steps=3)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all(("lora_" in n) == (lora is not None) and n.startswith("generator.transformer.") for n in trained)
    assert any(n.startswith("generator.vae.") for n in frozen)
    assert any(n.startswith("reference.") for n in frozen) == (lora is None and kind in (FlowDPO, FlowIPO))
    after = model.state_dict()
    for name in frozen:
        assert torch.equal(after[name], before[name]), name
    for name in trained:
        assert not torch.equal(after[name], before[name]), name


# --- draws and order ------------------------------------------------------------------------------


def test_preferred_and_other_share_time_and_noise(family, folders, pairs, monkeypatch):
    model, calls = make(FlowDPO, folders[family]), []
    batch = next(iter(loaded(data(pairs[family]), model).train_dataloader()))
    monkeypatch.setattr(model.generator, "velocity", lambda x, t, *rest: calls.append((x, t)) or torch.zeros_like(x))
    errors, times = model.errors(batch["latents"], batch["seeds"], batch["conditions"])
    ((x, t),) = calls
    x, t = x.unflatten(0, (2, -1)), t.unflatten(0, (2, -1))
    assert torch.equal(t[0], t[1])
    assert torch.equal(t[0], times)
    assert len(set(times.tolist())) == 4
    noise = (x - (1 - t.view(2, 4, 1, 1, 1, 1)) * batch["latents"]) / t.view(2, 4, 1, 1, 1, 1)
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-3)
    assert (noise[0, 0] - noise[0, 1]).abs().max() > 1
    want = (noise - batch["latents"]).square().flatten(2).mean(2)  # velocity 0
    torch.testing.assert_close(errors, want, rtol=1e-3, atol=1e-3)


def test_draws_depend_on_seed_epoch_and_key_alone(wan, pairs):
    stub = SimpleNamespace(generator=wan)

    def seeds(epoch=0, world=1, **options):
        found = {}
        for rank in range(world):
            loader = loaded(data(pairs["wan"], **options), stub, world=world, rank=rank).train_dataloader()
            loader.epoch = epoch
            for batch in loader:
                found.update(zip(batch["keys"], batch["seeds"].tolist()))
        return found

    want = seeds()
    assert len(want) == 8 == len(set(want.values()))
    assert seeds(batch_size=2) == want
    assert seeds(batch_size=2, world=2) == want
    assert seeds(batch_size=1, workers=2) == want
    assert seeds(shuffle_buffer=5) == want
    for other in (seeds(epoch=1), seeds(seed=1)):
        assert other.keys() == want.keys()
        assert not set(other.values()) & set(want.values())


def test_held_out_samples_keep_their_noise_and_times(folders, pairs):
    """Otherwise val/loss would move while the weights stand still."""
    losses = []

    class Collect(L.Callback):
        def on_validation_end(self, trainer, module):
            losses.append(float(trainer.callback_metrics["val/loss"]))

    model = make(FlowDPO, folders["wan"], optimizer=partial(torch.optim.SGD, lr=0.0))
    datamodule = data(pairs["wan"], val=pairs["wan"], val_batch_size=3)
    fit(model, datamodule, callbacks=[Collect()], max_steps=-1, max_epochs=3, limit_val_batches=1.0)
    assert len(losses) == 3
    assert losses[0] != LN2
    assert losses == [losses[0]] * 3


@pytest.mark.parametrize(("kind", "lora"), [(FlowDPO, SMALL), (FlowDPO, None)], ids=["lora", "full"])
def test_resumption_in_the_middle_of_an_epoch_is_exact(kind, lora, folders, pairs, tmp_path):
    """A run of 8 pairs in batches of 2 is stopped after 6 of 9 steps and resumed; another runs through."""

    def run(steps, folder, checkpoint=None):
        model = make(
            kind, folders["wan"], trained=False, lora=lora, optimizer=partial(torch.optim.AdamW, lr=1e-2), warmup=0.3
        )
        if checkpoint:  # of another process, with other random adapters
            with torch.no_grad():
                for p in model.parameters():
                    p += p.requires_grad
        save = L.pytorch.callbacks.ModelCheckpoint(tmp_path / folder, every_n_train_steps=6, save_top_k=-1)
        watch = fit(model, data(pairs["wan"], 2, workers=2, shuffle_buffer=4), steps, [save], checkpoint)
        return model, watch, save.best_model_path

    # the schedule knows the number of steps, so the interrupted run must be told the same one
    through, watch, middle = run(9, "a")
    resumed, rest, _ = run(9, "b", middle)
    content = torch.load(middle, weights_only=True)
    assert content["global_step"] == 6
    assert len(rest.steps) == 3
    assert rest.steps == watch.steps[6:]
    assert set(content["state_dict"]) == through.trained().keys()
    for name, parameter in through.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name


# --- several processes ----------------------------------------------------------------------------

SCRIPT = """
import json, sys, torch, lightning as L
from forked import THREE_STEPS, on_ranks, strategy
from functools import partial
from videoalign.alignment import FlowDPO, FlowRWR, FlowSFT
from videoalign.callbacks import EMA
from videoalign.datamodules.latents import LatentPairs
from videoalign.models.fingerprint import fingerprint
from videoalign.models.lora import LoRA
torch.set_num_threads(1)
generator, latents, start, out = sys.argv[1:]
LORA = LoRA(rank=4, alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0"])
START = LoRA(rank=4, alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0"], start=start)

class Watch(L.Callback):
    def __init__(self):
        self.steps = []
    def on_train_batch_end(self, trainer, module, *rest):
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})

def trained(model):
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for n, p in model.named_parameters() if p.requires_grad}

def run(kind):
    devices = 1 if kind == "single" else 2
    result = {}
    for name, algorithm, options in [
        ("dpo-lora", FlowDPO, {"lora": LORA, "gradient_checkpointing": True}),
        ("dpo-full", FlowDPO, {"lora": None, "gradient_checkpointing": True}),
        ("dpo-bfloat16", FlowDPO, {"lora": LORA, "dtype": "bfloat16"}),
        ("dpo-start", FlowDPO, {"lora": START, "gradient_checkpointing": True}),
        ("rwr-lora", FlowRWR, {"lora": LORA}),
        ("sft-average", FlowSFT, {"lora": None}),  # validated after each step, with the average in place
    ]:
        L.seed_everything(0)
        made = options
        model = algorithm(generator=generator, optimizer=partial(torch.optim.SGD, lr=0.05), **made)
        watch = Watch()
        more = {"callbacks": [watch, EMA(0.5)], "val_check_interval": 1} if name == "sft-average" else {}
        options = {"devices": devices, "strategy": strategy(kind), "callbacks": [watch], **THREE_STEPS, **more}
        trainer = L.Trainer(**options)
        # the same global batch of all 8 pairs in each step
        data = LatentPairs(latents, latents, batch_size=8 // devices, val_batch_size=3, workers=0, shuffle_buffer=0)
        trainer.fit(model, data)
        weights = trained(model)
        val = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        result[name] = {"weights": weights, "steps": watch.steps, "val": val}
        if name in ("sft-average", "dpo-start"):  # a checkpoint gives the same weights, and those alone
            path = f"{out}/{kind}-{name}.ckpt"
            trainer.save_checkpoint(path)
            again = algorithm(generator=generator, optimizer=partial(torch.optim.SGD, lr=0.05), **made)
            tester = L.Trainer(**{**options, "strategy": strategy(kind), "callbacks": [average := EMA(0.5)]})
            tester.test(again, data, ckpt_path=path, verbose=False)
            with torch.inference_mode():  # in which Lightning tests where GPUs talk by NCCL
                average._swap_out(again)
                average._swap_in(again)
            result[name] |= {"tested": trained(again), "fingerprint": fingerprint(again.policy)}
            whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in again.policy.named_parameters()}
            result[name]["whole"] = fingerprint(whole)
        torch.save(result, f"{out}/{kind}-{trainer.global_rank}.pt")

for kind in ("single", "ddp", "fsdp2"):
    on_ranks(1 if kind == "single" else 2, partial(run, kind))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(folders, pairs, tmp_path):
    """One process, DDP and FSDP2 agree, and begin at ln 2: noise belongs to the sample and not to the rank."""
    updates = random_updates(skeleton(folders["wan"]), rank=4, alpha=8.0)
    start = write_updates(tmp_path / "start.safetensors", updates)
    done = forked(SCRIPT, folders["wan"], pairs["wan"], start, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {
        kind: [
            torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True)
            for rank in range(1 if kind == "single" else 2)
        ]
        for kind in ("single", "ddp", "fsdp2")
    }
    for kind, ranks in results.items():
        for rank in ranks:
            for name in ("dpo-lora", "dpo-full", "dpo-bfloat16", "dpo-start"):
                assert rank[name]["steps"][0]["train/loss"] == LN2, (kind, name)
                assert rank[name]["steps"][0]["train/rewards/margins"] == 0.0, (kind, name)
                assert rank[name]["steps"][2]["train/rewards/margins"] != 0.0, (kind, name)
            for name in ("dpo-start", "sft-average"):
                assert all(torch.equal(value, rank[name]["weights"][n]) for n, value in rank[name]["tested"].items())
                assert rank[name]["fingerprint"] == ranks[0][name]["fingerprint"] == rank[name]["whole"], (kind, name)
    single = results["single"][0]
    for kind in ("ddp", "fsdp2"):
        for name, want in single.items():
            tolerance = {"rtol": 2e-2, "atol": 2e-3} if "bfloat16" in name else {"rtol": 1e-4, "atol": 1e-5}
            close(results[kind][0][name]["weights"], want["weights"], **tolerance)
            mean = sum(rank[name]["steps"][1]["train/loss"] for rank in results[kind]) / 2
            if "rwr" not in name:
                assert mean == pytest.approx(want["steps"][1]["train/loss"], rel=1e-3), (kind, name)
            assert results[kind][0][name]["val"].keys() == want["val"].keys()
            for key, value in want["val"].items():
                relative = {"rel": 0.1, "abs": 0.3} if "bfloat16" in name else {"rel": 1e-3, "abs": 1e-4}
                assert results[kind][0][name]["val"][key] == pytest.approx(value, **relative), (kind, name, key)

"""The noisy reward on two processes: training, held-out numbers and guided generation."""

import json
import runpy
import sys
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from compare_kit import PROMPTS, generation, records, videos
from forked import started
from helpers import call, flags, write_latents
from videoalign.alignment import NoisyRewardModel
from videoalign.callbacks import Checkpoint
from videoalign.datamodules.latents import LatentPairs
from videoalign.datamodules.shards import ShardSet
from videoalign.models.generator_folder import load_generator
from videoalign.models.noisy_reward import NoisyRewardShape

# --- the noisy reward on two processes ------------------------------------------------------------

LATENT = (16, 3, 4, 4)
SCRIPT = """
import json, sys, torch, lightning as L
from functools import partial
from videoalign.alignment import NoisyRewardModel
from videoalign.datamodules.latents import LatentPairs
from videoalign.models.lora import LoRA
from videoalign.models.noisy_reward import NoisyRewardShape

ATTENTION = NoisyRewardShape(blocks=2, taps=(1, 2), pooling="attention", hidden=16)
QUIET = {
    "accelerator": "cpu", "max_steps": 3, "val_check_interval": 3, "check_val_every_n_epoch": None, "logger": False,
    "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    "enable_checkpointing": False, "use_distributed_sampler": False,
}

class Watch(L.Callback):
    def __init__(self):
        self.steps = []
    def on_train_batch_end(self, trainer, module, *rest):
        self.steps.append(float(trainer.callback_metrics["train/loss"]))

def train(generator, latents, out, devices):
    # the same global batch of all 8 pairs in each step; 7 held-out ones, so that a process has one to fill up with
    result = {}
    for name, options in {
        "bt": {},
        "btt": {"loss": "btt", "shared_noise": False, "gradient_checkpointing": True, "shape": ATTENTION},
        "lora": {"lora": LoRA(rank=4, alpha=8, targets=["to_q", "to_v"])},
    }.items():
        L.seed_everything(0, verbose=False)
        options = {"shape": NoisyRewardShape(blocks=2, hidden=16), **options}
        model = NoisyRewardModel(generator, optimizer=partial(torch.optim.SGD, lr=0.05), **options)
        watch = Watch()
        strategy = "auto" if devices == 1 else "ddp"
        trainer = L.Trainer(devices=devices, strategy=strategy, callbacks=[watch], **QUIET)
        decided = f"{latents}/{'tied' if name == 'btt' else 'decided'}"
        sizes = {"batch_size": 8 // devices, "val_batch_size": 2, "workers": 0, "shuffle_buffer": 0}
        data = LatentPairs(decided, f"{latents}/held", min_margin=None, **sizes)
        trainer.fit(model, data)
        result[name] = {
            "weights": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
            "steps": watch.steps,
            "val": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
            "statistics": [model.network.statistics.mean, model.network.statistics.std],
        }
        torch.save(result, f"{out}/{devices}-{trainer.global_rank}.pt")

if __name__ == "__main__":
    from videoalign.cli import main
    torch.set_num_threads(1)
    generator, latents, out, command = sys.argv[1:]
    train(generator, latents, out, 2)
    main(json.loads(command))
"""


def write_pairs(folder, identity, count, ties):
    """Pairs of random latents with labels; the first ``ties`` of them are tied in VQ and MQ."""

    def record(i):
        vq, mq = ("same", "same") if i < ties else ("AB"[i % 2], "AB"[i // 2 % 2])
        return {"prompt": PROMPTS[i % 2], "labels": {"VQ": vq, "MQ": mq, "TA": "AB"[i // 4 % 2]}}

    write_latents(folder, identity, LATENT, record, count)


@pytest.fixture(scope="module")
def pairs(world, tmp_path_factory):
    folder, identity = tmp_path_factory.mktemp("pairs"), load_generator(world / "wan").identity()
    write_pairs(folder / "decided", identity, 8, 0)
    write_pairs(folder / "tied", identity, 8, 3)
    write_pairs(folder / "held", identity, 7, 0)
    write_pairs(folder / "held_ties", identity, 7, 3)
    return folder


@pytest.fixture(scope="module")
def both(world, pairs, tmp_path_factory):
    """Trainings and a guided generation by one process and by two."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "run.py").write_text(SCRIPT)
    guide = {"noisy_reward": world / "nrg", "strength": 30, "weights": "TA=1"}

    def command(out, devices):
        return ["generate", *flags(**generation(world, folder / out), **guide, devices=devices)]

    script = folder / "run.py"
    done = started(sys.executable, script, world / "wan", pairs, folder, json.dumps(command("two", 2)))
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.random.fork_rng():
        runpy.run_path(str(folder / "run.py"))["train"](str(world / "wan"), str(pairs), str(folder), 1)
    assert call(*command("one", 1)) == 0
    trained = [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]
    return SimpleNamespace(folder=folder, one=trained[0], two=trained[1:], text=done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bt", "btt", "lora"])
def test_two_processes_train_a_noisy_reward_as_one(name, both):
    """Weights and losses agree, because noise and time belong to the pair and not to the process."""
    one, (first, second) = both.one[name], (ranks[name] for ranks in both.two)
    assert len(one["steps"]) == len(first["steps"]) == 3 and len(set(one["steps"])) == 3
    for step in range(3):
        mean = (first["steps"][step] + second["steps"][step]) / 2
        assert mean == pytest.approx(one["steps"][step], rel=1e-4)
    assert first["weights"].keys() == second["weights"].keys() == one["weights"].keys()
    assert one["weights"]
    for key, want in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], want, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        assert torch.equal(first["weights"][key], second["weights"][key])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bt", "btt", "lora"])
def test_two_processes_measure_a_noisy_reward_as_one(name, both):
    one, ranks = both.one[name], [rank[name] for rank in both.two]
    assert {"val/loss", "val/accuracy/TA", "val/accuracy_at_t/0.5/VQ", "val/calibration/MQ"} <= one["val"].keys()
    assert any(0 < value < 1 for key, value in one["val"].items() if "accuracy" in key)
    for rank in ranks:
        assert rank["val"] == pytest.approx(one["val"], rel=1e-4, abs=1e-5)
        for found, want in zip(rank["statistics"], one["statistics"]):
            assert found == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_two_processes_generate_the_same_guided_videos(both):
    one, two = (videos(both.folder / name) for name in ("one", "two"))
    assert one == two
    made, other = (records(both.folder / name) for name in ("one", "two"))
    for key, record in made.items():
        assert record["guide"]["strength"] == 30
        assert record["seconds"] > 0
        assert other[key]["seconds"] > 0
        assert other[key]["noisy_reward"] == pytest.approx(record["noisy_reward"], abs=1e-4)
        assert {**other[key], "seconds": 0, "noisy_reward": 0} == {**record, "seconds": 0, "noisy_reward": 0}
    assert both.text.count("videos in") == 1
    assert [shard.samples for shard in ShardSet(both.folder / "two").index.shards] == [2, 2]


def held_out(world, pairs, batch, **options):
    """Validation metrics of an untrained noisy reward."""
    torch.manual_seed(0)
    model = NoisyRewardModel(str(world / "wan"), shape=NoisyRewardShape(blocks=2, hidden=16), **options)
    data = LatentPairs(val=str(pairs / "held_ties"), batch_size=batch, workers=0, min_margin=None)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    return trainer.validate(model, data, verbose=False)[0]


@pytest.mark.parametrize("loss", ["bt", "btt"])
def test_held_out_numbers_do_not_depend_on_the_batches(loss, world, pairs):
    one, other = (held_out(world, pairs, batch, loss=loss) for batch in (7, 2))
    assert {k: v for k, v in one.items() if k != "val/loss"} == pytest.approx(
        {k: v for k, v in other.items() if k != "val/loss"}, abs=1e-5
    )
    assert one["val/loss"] == pytest.approx(other["val/loss"], rel=1e-5)


def fitted(world, pairs, steps, **options):
    """A noisy reward after some steps, the same for the same number whenever it validated."""
    torch.manual_seed(0)
    shape = NoisyRewardShape(blocks=2, hidden=16)
    model = NoisyRewardModel(str(world / "wan"), shape=shape, optimizer=partial(torch.optim.SGD, lr=0.5))
    data = LatentPairs(
        str(pairs / "held_ties"), str(pairs / "held_ties"), batch_size=2, workers=0, min_margin=None, shuffle_buffer=0
    )
    keep = Checkpoint(options.pop("folder"))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **options}
    L.Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=[keep], **quiet).fit(model, data)
    return model, torch.load(keep.last_model_path, weights_only=True)


@pytest.mark.parametrize("every", [2, 100], ids=["validated before the last step", "never validated"])
def test_statistics_are_those_of_the_weights_that_are_exported(every, world, pairs, tmp_path):
    """Not of an earlier validation, nor of the check of untrained weights before training."""
    often = {"check_val_every_n_epoch": None, "val_check_interval": every, "num_sanity_val_steps": 2}
    model, last = fitted(world, pairs, 3, folder=tmp_path / "a", **often)
    right, _ = fitted(world, pairs, 3, folder=tmp_path / "b", **{**often, "val_check_interval": 3})
    for name, parameter in right.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    found, want = model.network.statistics, right.network.statistics
    assert found.mean == pytest.approx(want.mean, rel=1e-5) and found.std == pytest.approx(want.std, rel=1e-5)
    assert last["reward_statistics"] == [found.mean, found.std]
    assert last["reward_statistics_step"] == last["global_step"] == 3

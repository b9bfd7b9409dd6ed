"""Training of the reward model: what trains, what is logged, checkpoints, resumption and several processes."""

import csv
import json
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch

from forked import forked
from videoalign import VideoAlignError
from videoalign.alignment import RewardModel
from videoalign.callbacks import EMA, ExamplePairs, ExportReward, ReliabilityDiagram, RewardBench, example_pairs
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.pairs import VideoPairs
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.miniature.world.rendered_sets import WorldSize, write_world
from videoalign.models import VideoReward
from videoalign.models.intervals import prompt_number
from videoalign.models.metrics import PreferenceAccuracy

QUIET = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0, "log_every_n_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "w"
    size = WorldSize(train=24, val=9, benchmark_videos=24, benchmark_pairs=20, captions=16, clips=12)
    for _ in write_world(folder, size, seed=3):
        pass
    return folder


@pytest.fixture
def network(backbone, sampling):
    return VideoReward(backbone, "plain", sampling, language="full")


def pairs(world, **options):
    options = {
        "batch_size": 4,
        "val_batch_size": 4,
        "workers": 0,
        "benchmarks": {"recent": str(world / "recent")},
        **options,
    }
    return VideoPairs(str(world / "train"), str(world / "val"), **options)


def fit(network, world, tmp_path, steps=3, callbacks=(), trainer=None, **options):
    model = RewardModel(network, optimizer=partial(torch.optim.AdamW, lr=1e-3), **options)
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, default_hp_metric=False)
    settings = {
        **QUIET,
        "max_steps": steps,
        "logger": logger,
        "callbacks": list(callbacks),
        "enable_checkpointing": False,
    }
    runner = L.Trainer(**{**settings, **(trainer or {})})
    runner.fit(model, pairs(world))
    return model, runner


@pytest.mark.parametrize("loss", ["btt", "bt", "reg"])
def test_fit_trains_logs_and_measures_statistics(loss, network, world, tmp_path):
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    model, trainer = fit(network, world, tmp_path, steps=6, loss=loss, callbacks=[RewardBench(resamples=20)])
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad != torch.equal(parameter, before[name]), name
    logged = set(trainer.callback_metrics)
    assert {"train/loss", "val/loss", "val/num_pairs", "vitals/dropped"} <= logged
    assert {
        f"val/{kind}/{d}" for kind in ("accuracy", "accuracy_with_ties", "calibration") for d in ("VQ", "MQ", "TA")
    } <= logged
    assert ("val/tie_probability/VQ" in logged) == (loss == "btt")
    assert {"val/bench/recent/accuracy/Overall", "val/bench/recent/accuracy_with_ties/TA"} <= logged
    assert trainer.callback_metrics["val/num_pairs"] == 9
    # statistics are those of the last weights on the held-out pairs
    network.eval()
    rewards = []
    with torch.no_grad():
        for batch in trainer.datamodule.val_dataloader()[0]:
            rewards.append(model._rewards(batch)[:, batch["valid"]].flatten(0, 1))
    rewards = torch.cat(rewards)
    torch.testing.assert_close(torch.tensor(network.statistics.mean), rewards.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(network.statistics.std), rewards.std(0, correction=0), rtol=1e-4, atol=1e-5)
    z = network.normalise(rewards)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3), rtol=1e-4, atol=1e-4)


def test_statistics_are_measured_when_fit_ends_between_validations(network, world, tmp_path):
    model, trainer = fit(network, world, tmp_path, steps=4)  # an epoch has 6 steps: no validation took place
    assert "val/loss" not in trainer.callback_metrics
    assert network.statistics.std != [1.0, 1.0, 1.0]
    assert model._measured_at == 4


def test_averaged_weights_have_statistics_of_their_own(network, world, tmp_path):
    """What is exported is the average, so its mean and deviation must not be those of the raw weights."""
    model, trainer = fit(network, world, tmp_path, steps=4, callbacks=[EMA(0.9)])
    (ema,) = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
    assert all(torch.equal(p, ema.average[n]) for n, p in model.named_parameters() if p.requires_grad)
    assert any(not torch.equal(p, ema.kept[n]) for n, p in model.named_parameters() if p.requires_grad)
    network.eval()
    rewards = []
    with torch.no_grad():
        for batch in trainer.val_dataloaders[0]:
            rewards.append(network(**batch["inputs"])[batch["valid"].repeat(2)])
    want = torch.cat(rewards)
    assert network.statistics.mean == pytest.approx(want.mean(0).tolist(), abs=1e-4)
    assert network.statistics.std == pytest.approx(want.std(0).tolist(), rel=0.05)  # by N or by N - 1


def test_examples_are_rated_by_the_averaged_weights(network, world, tmp_path, monkeypatch):
    shown, draw = [], example_pairs.rated_clip
    monkeypatch.setattr(example_pairs, "rated_clip", lambda *given: (shown.append(given[:2]), draw(*given))[1])
    model, trainer = fit(network, world, tmp_path, steps=6, callbacks=[EMA(0.9), ExamplePairs(count=1)])
    [(pair, rewards)] = shown  # of the validation at the end of the epoch, which is the run's end
    batch = model.processor(list(pair.videos), [pair.prompt] * 2)
    (ema,) = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(rewards, model(batch))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ema.kept[name])
        assert (rewards - model(batch)).abs().max() > 1e-3


def test_compiled_layers_train_as_the_plain_ones(backbone, sampling, world, tmp_path, monkeypatch):
    """Traced and split as always; no machine code is made of it. One graph serves all layers and lengths."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = VideoReward(backbone, "plain", sampling, gradient_checkpointing=True)
        assert len(network.backbone.language_model.layers) == 2
        _, runner = fit(network, world, tmp_path, steps=6, compile=compiled)
        losses.append([runner.callback_metrics[f"{stage}/loss"] for stage in ("train", "val")])
        names = [name for name, _ in network.named_parameters()]
        assert not any("_orig_mod" in name for name in names)  # folders and checkpoints stay as they are
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert 1 <= len(graphs) <= 3  # training, validation, and the last, smaller batch


def test_overfits_a_few_pairs(backbone, sampling, world, tmp_path):
    network = VideoReward(backbone, "plain", sampling, language="full")
    model = RewardModel(network, optimizer=partial(torch.optim.AdamW, lr=3e-3), decay="constant", warmup=0.0)
    trainer = L.Trainer(
        **QUIET, max_steps=60, logger=False, enable_checkpointing=False, limit_val_batches=0, overfit_batches=1
    )
    data = VideoPairs(str(world / "train"), str(world / "val"), batch_size=4, workers=0, swap=False, shuffle_buffer=0)
    trainer.fit(model, data)
    first = model.pair_losses(torch.zeros(2, 1, 3), torch.tensor([[1.0, -1.0, 0.0]]), torch.ones(2, 1, 3)).mean()
    assert trainer.callback_metrics["train/loss"] < 0.5 * first


def test_pair_in_one_forward_equals_two(network, world):
    data = pairs(world)
    data.trainer = type("T", (), {})()
    data.trainer.world_size, data.trainer.global_rank, data.trainer.accumulate_grad_batches = 1, 0, 1
    data.trainer.lightning_module = RewardModel(network)
    data.trainer.strategy = type("S", (), {"root_device": torch.device("cpu")})()
    data.setup("fit")
    raw = data.examples(3)
    both = network(
        **network.processor([p.videos[0] for p in raw] + [p.videos[1] for p in raw], [p.prompt for p in raw] * 2)
    )
    a = network(**network.processor([p.videos[0] for p in raw], [p.prompt for p in raw]))
    b = network(**network.processor([p.videos[1] for p in raw], [p.prompt for p in raw]))
    torch.testing.assert_close(both, torch.cat([a, b]), rtol=0, atol=1e-5)


def test_swapping_a_and_b_leaves_the_loss(network):
    model = RewardModel(network)
    rewards, labels = (
        torch.randn(2, 5, 3),
        torch.tensor([[1.0, 0, -1], [0, torch.nan, 1], [1, 1, 1], [-1, 0, 0], [0, 0, 0]]),
    )
    scores = 1 + 4 * torch.rand(2, 5, 3)
    for model.loss in ("btt", "bt", "reg"):
        one, other = (
            model.pair_losses(rewards, labels, scores),
            model.pair_losses(rewards.flip(0), -labels, scores.flip(0)),
        )
        torch.testing.assert_close(one.slot_mean(), other.slot_mean())


def test_dropped_and_padded_pairs_do_not_train(network):
    model = RewardModel(network)
    batch = {"labels": torch.ones(3, 4), "scores": torch.ones(2, 3, 3), "valid": torch.tensor([True, False, True])}
    labels, scores = model._masked(batch)
    assert labels[1].isnan().all()
    assert scores[:, 1].isnan().all()
    assert not labels[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"theta": 1.0}, "theta"),
        ({"theta": 0.5}, "theta"),
        ({"theta": float("nan")}, "theta"),
        ({"loss": "ctc"}, "loss"),
        ({"loss": "reg", "ties": True}, "ties"),
        ({"warmup": 1.0}, "warmup"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words, network):
    with pytest.raises(VideoAlignError, match=words):
        RewardModel(network, **options)


@pytest.mark.parametrize("batch_size", [4, 1])
def test_unusable_pairs_are_left_out_and_counted(batch_size, network, world, tmp_path):
    """Within max_dropped training goes on, also where a whole batch cannot be used."""
    with ShardWriter(tmp_path / "set", "pairs") as writer:
        for i, raw in enumerate(ShardSet(world / "train")):
            videos = {side: b"no video" if i in (5, 9) else raw.members[f"{side}.mp4"] for side in "ab"}
            writer.write(raw.key, videos, raw.record())
    model = RewardModel(network)
    trainer = L.Trainer(**QUIET, max_epochs=1, logger=False, enable_checkpointing=False, limit_val_batches=0)
    data = VideoPairs(str(tmp_path / "set"), str(world / "val"), batch_size=batch_size, workers=0, max_dropped=0.1)
    trainer.fit(model, data)
    assert trainer.global_step == 24 // batch_size and trainer.callback_metrics["vitals/dropped"] == 2
    data = VideoPairs(str(tmp_path / "set"), str(world / "val"), batch_size=batch_size, workers=0, max_dropped=0.05)
    with pytest.raises(VideoAlignError, match=r"2 of 24 samples could not be used.*max_dropped"):
        L.Trainer(**QUIET, max_epochs=1, logger=False, enable_checkpointing=False, limit_val_batches=0).fit(model, data)


def test_broken_loss_stops_with_the_pairs(network, world, tmp_path):
    with torch.no_grad():
        network.head.weight.fill_(torch.inf)
    with pytest.raises(VideoAlignError, match=r"loss is (nan|inf).*samples \['\d"):
        fit(network, world, tmp_path)


def test_a_diverged_model_is_told_at_validation(network, world):
    with torch.no_grad():
        network.head.weight.fill_(torch.inf)
    trainer = L.Trainer(**QUIET, logger=False, enable_checkpointing=False)
    with pytest.raises(VideoAlignError, match=r"the rewards of held-out pairs are not finite.* training has diverged"):
        trainer.validate(
            RewardModel(network), VideoPairs(val=str(world / "val"), batch_size=4, workers=0), verbose=False
        )


def test_callbacks_write_what_people_look_at(network, world, tmp_path):
    callbacks = [RewardBench(resamples=20), ReliabilityDiagram(), ExamplePairs(count=2), ExportReward(backbone=True)]
    _, trainer = fit(network, world, tmp_path, steps=6, callbacks=callbacks)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(trainer.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    images = events.Tags()["images"]
    assert {"val/examples/1", "val/examples/2", "val/reliability", "val/bench/recent"} <= set(images)
    assert events.Images("val/examples/1")[0].encoded_image_string[:6] in (b"GIF89a", b"GIF87a")
    assert "val/bench/recent/text_summary" in events.Tags()["tensors"]
    record = json.loads((Path(trainer.log_dir) / "reward_bench" / "recent.json").read_text())
    assert set(record["accuracies"]) == {"VQ", "MQ", "TA", "Overall"}
    assert record["step"] == 6
    loaded = VideoReward.from_pretrained(Path(trainer.log_dir) / "export")
    assert loaded.statistics == network.statistics
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=0)


def test_reward_bench_joins_on_both_videos(network, world):
    """Its numbers equal those from scoring each pair on its own."""
    bench = RewardBench(resamples=0)
    trainer = L.Trainer(**QUIET, logger=False, enable_checkpointing=False, callbacks=[bench])
    model = RewardModel(network)
    trainer.validate(
        model, VideoPairs(benchmarks={"recent": str(world / "recent")}, batch_size=5, workers=0), verbose=False
    )
    benchmark = Benchmark(world / "recent")
    frames = {raw.key: (raw, raw.record()["prompt"]) for raw in benchmark.shards}
    from videoalign.datamodules.frames import FrameReader

    read = FrameReader(benchmark.shards, network.processor.sampling, network.processor.factor)
    rows = list(csv.DictReader(open(world / "recent" / "pairs.csv")))
    metric = PreferenceAccuracy(torch.tensor(network.statistics.std), resamples=0)
    word = {"A": 1.0, "B": -1.0, "same": 0.0}
    with torch.no_grad():
        for row in rows:
            ends = [frames[row[k]] for k in ("key_A", "key_B")]
            a, b = (network(**network.processor(read(raw), [prompt]))[0] for raw, prompt in ends)
            prompt = torch.tensor([prompt_number(ends[0][1])])
            metric.update(
                (a - b)[None], torch.tensor([[word[row[c]] for c in ("VQ", "MQ", "TA", "Overall")]]), prompts=prompt
            )
    for column, want in metric.compute().items():
        found = {name: bench.results["recent"][column][name] for name in want}
        assert found == pytest.approx(want, rel=1e-4, nan_ok=True), column


def test_checkpoint_holds_what_trains_and_resumes_exactly(backbone, sampling, world, tmp_path):
    """A run stopped after 4 of 9 steps (in an epoch of 6) and resumed has the weights of one that ran through."""

    def run(steps, folder, ckpt=None):
        torch.manual_seed(0)  # head and token rows are drawn by it
        network = VideoReward(backbone, "plain", sampling, vision="frozen", language="full")
        model = RewardModel(network, optimizer=partial(torch.optim.AdamW, lr=1e-3))
        model.warmup = 0.0
        save = L.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
        trainer = L.Trainer(**QUIET, max_steps=steps, logger=False, callbacks=[save])
        trainer.fit(model, pairs(world, workers=2), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return network, save

    through, _ = run(9, tmp_path / "a")
    _, save = run(4, tmp_path / "b")
    content = torch.load(save.best_model_path, weights_only=True)
    assert set(content["state_dict"]) == {f"network.{n}" for n in through.trained_names()}
    resumed, _ = run(9, tmp_path / "c", save.best_model_path)
    for name, parameter in through.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter, rtol=0, atol=0, msg=name)


def test_foreign_checkpoint_is_refused(backbone, sampling, world, tmp_path):
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
    small = VideoReward(backbone, "plain", sampling, language="frozen", vision="frozen")
    trainer = L.Trainer(**QUIET, max_steps=1, logger=False, callbacks=[save], limit_val_batches=0)
    trainer.fit(RewardModel(small), pairs(world))
    with pytest.raises(VideoAlignError, match="does not fit"):
        full = RewardModel(VideoReward(backbone, "plain", sampling, language="full"))
        L.Trainer(**QUIET, max_steps=2, logger=False, limit_val_batches=0).fit(
            full, pairs(world), ckpt_path=save.best_model_path, weights_only=True
        )


SCRIPT = """
import os, sys, json, torch, lightning as L
from functools import partial
from forked import THREE_STEPS, on_ranks, strategy
from videoalign.alignment import RewardModel
from videoalign.callbacks import ExportReward, RewardBench
from videoalign.datamodules.pairs import VideoPairs
from videoalign.models import FrameSampling, LoRA, VideoReward
torch.set_num_threads(1)
backbone, world, folder = sys.argv[1:]

def run(kind, language):
    out, devices = f"{folder}/{kind}-{language}", 1 if kind == "single" else 2
    L.seed_everything(0)
    sampling, lora = FrameSampling(fps=8.0, min_pixels=0), LoRA(rank=4, alpha=8)
    network = VideoReward(backbone, "plain", sampling, language=language, lora=lora)
    model = RewardModel(network, loss="reg", optimizer=partial(torch.optim.SGD, lr=1e-2), warmup=0.0)
    bench = RewardBench(resamples=0)
    callbacks = [bench, ExportReward(out + "/export", backbone=True)]
    options = {"devices": devices, "strategy": strategy(kind), "callbacks": callbacks, "default_root_dir": out}
    trainer = L.Trainer(**options, **THREE_STEPS)
    # the same global batch of all 8 pairs in each step
    sizes = {"batch_size": 8 // devices, "val_batch_size": 2, "workers": 0}
    sets = (world + "/train", world + "/val", {"recent": world + "/recent"})
    data = VideoPairs(*sets, **sizes, swap=False, shuffle_buffer=0)
    trainer.fit(model, data)
    if trainer.is_global_zero:
        val = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        result = {"bench": bench.results, "val": val, "statistics": network.statistics.__dict__}
        json.dump(result, open(out + "/result.json", "w"))

for language in ("full", "lora"):
    for kind in ("single", "ddp", "fsdp2"):
        os.makedirs(f"{folder}/{kind}-{language}")
        on_ranks(1 if kind == "single" else 2, partial(run, kind, language))
"""


@pytest.fixture(scope="module")
def of_all_kinds(backbone, tmp_path_factory):
    """The folder of runs on one process, two under DDP, and two under FSDP2."""
    folder = tmp_path_factory.mktemp("kinds")
    size = WorldSize(train=8, val=9, benchmark_videos=24, benchmark_pairs=20, captions=16, clips=12)
    for _ in write_world(folder / "world", size, seed=3):
        pass
    done = forked(SCRIPT, backbone, folder / "world", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("language", ["full", "lora"])
def test_two_processes_train_and_measure_as_one(language, of_all_kinds):
    """DDP, FSDP2 and one process agree in clipped steps, counts over ranks, statistics and exported weights."""
    results = {
        kind: json.loads((of_all_kinds / f"{kind}-{language}" / "result.json").read_text())
        for kind in ("single", "ddp", "fsdp2")
    }
    assert all(found["val"]["val/num_pairs"] == 9 for found in results.values())
    weights = {
        k: VideoReward.from_pretrained(of_all_kinds / f"{k}-{language}" / "export").state_dict() for k in results
    }
    for kind in ("ddp", "fsdp2"):
        for name, tensor in weights["single"].items():
            torch.testing.assert_close(weights[kind][name], tensor, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")
        for name, value in results["single"]["val"].items():
            assert results[kind]["val"][name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), (kind, name)
        assert results[kind]["statistics"]["mean"] == pytest.approx(results["single"]["statistics"]["mean"], rel=1e-3)
        for column, row in results["single"]["bench"]["recent"].items():
            assert results[kind]["bench"]["recent"][column] == pytest.approx(row, rel=1e-3, abs=1e-4, nan_ok=True), (
                kind,
                column,
            )


RESUME = """
import sys, torch, lightning as L
from forked import on_ranks
from functools import partial
from pathlib import Path
from lightning.pytorch.strategies import ModelParallelStrategy
from videoalign.alignment import RewardModel
from videoalign.datamodules.pairs import VideoPairs
from videoalign.models import FrameSampling, LoRA, VideoReward
torch.set_num_threads(1)
backbone, world, out = sys.argv[1:]

def run(sharded, steps, folder, checkpoint=None):
    L.seed_everything(0)
    network = VideoReward(backbone, "plain", FrameSampling(fps=8.0, min_pixels=0), lora=LoRA(rank=4, alpha=8))
    model = RewardModel(network, optimizer=partial(torch.optim.AdamW, lr=1e-3), warmup=0.0)
    every = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    save = L.pytorch.callbacks.ModelCheckpoint(f"{out}/{sharded}/{folder}", **every)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=sharded)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
    steps = {"max_steps": steps, "limit_val_batches": 0}
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, callbacks=[save], **steps, **quiet)
    trainer.fit(model, VideoPairs(world + "/train", world + "/val", batch_size=4, workers=0), ckpt_path=checkpoint)
    return trainer, network.head.weight.full_tensor().detach().clone()

def compare(sharded):
    trainer, through = run(sharded, 4, "a")
    run(sharded, 2, "b")
    _, resumed = run(sharded, 4, "c", next(str(path) for path in Path(out, str(sharded), "b").iterdir()))
    if trainer.is_global_zero:
        print(f"sharded {sharded}: difference", (through - resumed).abs().max().item())

for sharded in (True, False):
    on_ranks(2, partial(compare, sharded))
"""


@pytest.mark.slow
def test_fsdp2_resumes_exactly(backbone, world, tmp_path):
    """This holds for sharded checkpoints and for whole ones."""
    done = forked(RESUME, backbone, world, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded True: difference 0.0\n" in done.stdout
    assert "sharded False: difference 0.0\n" in done.stdout

"""What a run shows besides its metrics: speed, gradient norms, rates, settings, charts, and the order of it all."""

import json
import time
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from forked import forked
from helpers import QUIET
from videoalign import VideoAlignError
from videoalign.callbacks import Dashboard
from videoalign.callbacks.dashboard import LAYOUT, settings
from videoalign.callbacks.run_folder import forget, own_folders
from videoalign.callbacks.vitals import gradient_norms, group_names, samples_of

WAIT = 0.03
"""Seconds for which a batch keeps the loop waiting."""


class Slow(torch.utils.data.IterableDataset):
    """Batches of 3 samples, 1 of them unusable; each takes a while."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self):
        for number in range(self.batches):
            time.sleep(WAIT)
            yield {"x": torch.full((3, 2), 1.0 + number), "keys": ["a", "b", "c"], "dropped": ["b"]}

    def __len__(self):
        return self.batches


class Module(L.LightningModule):
    """Two named groups, one of which has a part that does not decay."""

    def __init__(self, wait: float = 0.0, theta: float = 5.0) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.wait, self.theta, self.seen = wait, theta, []

    def training_step(self, batch, number):
        time.sleep(self.wait)
        loss = self.head(self.body(batch["x"])).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, number):
        time.sleep(10 * self.wait)
        self.log("val/loss", self.training_step(batch, number))

    def on_before_optimizer_step(self, optimizer):
        self.seen.append({n: p.grad.clone() for n, p in self.named_parameters()})

    def configure_optimizers(self):
        groups = [
            {"params": [self.body.weight], "name": "body", "lr": 0.02},
            {"params": [self.body.bias], "name": "body_undecayed", "lr": 0.02, "weight_decay": 0.0},
            {"params": self.head.parameters(), "name": "head", "lr": 0.01},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(tmp_path, module, batches=8, validate=False, **options):
    trainer = L.Trainer(
        **{
            **QUIET,
            "logger": TensorBoardLogger(tmp_path, "run"),
            "callbacks": [Dashboard()],
            "max_epochs": 1,
            **options,
        }
    )
    loader = partial(torch.utils.data.DataLoader, batch_size=None)
    own_folders(trainer).fit(module, loader(Slow(batches)), loader(Slow(2)) if validate else None)
    trainer.logger.experiment.flush()
    found = EventAccumulator(trainer.logger.log_dir, size_guidance={"tensors": 0, "scalars": 0}).Reload()
    return trainer, found


def scalars(found, tag):
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_speed_leaves_out_validation_and_unusable_samples(tmp_path):
    _, found = run(
        tmp_path, Module(wait=0.02), validate=True, val_check_interval=2, accumulate_grad_batches=2, log_every_n_steps=2
    )
    rates, shares = (scalars(found, f"vitals/{name}") for name in ("samples_per_second", "data_wait_share"))
    assert [step for step, _ in rates] == [1, 3]  # 8 micro-batches are 4 steps, every other one is logged
    for _, rate in rates:  # 2 usable samples of a micro-batch take 0.05 s and what the step itself takes
        assert 8 < rate <= 2 / (WAIT + 0.02)
    for _, share in shares:
        assert 0.2 < share <= WAIT / (WAIT + 0.02) * 1.1
    assert "vitals/gpu_memory_gib" not in found.Tags()["scalars"]


def test_gradients_are_those_of_the_whole_step_before_clipping(tmp_path):
    module = Module()
    _, found = run(tmp_path, module, accumulate_grad_batches=4, gradient_clip_val=1e-3)
    for step, grads in enumerate(module.seen):
        for name, prefix in (("all", ""), ("body", "body"), ("head", "head")):
            want = torch.cat([g.flatten() for n, g in grads.items() if n.startswith(prefix)]).norm()
            assert scalars(found, f"vitals/grad_norm/{name}")[step] == (step, pytest.approx(float(want), rel=1e-5))
    assert len(module.seen) == 2 and float(module.seen[0]["head.weight"].norm()) > 1e-3
    assert scalars(found, "vitals/learning_rate/body") == [(0, pytest.approx(0.02)), (1, pytest.approx(0.01))]
    assert scalars(found, "vitals/learning_rate/head") == [(0, pytest.approx(0.01)), (1, pytest.approx(0.005))]
    assert not [tag for tag in found.Tags()["scalars"] if "undecayed" in tag]


def test_a_run_that_goes_on_measures_its_own_time(tmp_path):
    """The window of the process before it is gone, and no step is counted twice."""
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    options = {"enable_checkpointing": True, "log_every_n_steps": 4, "max_epochs": -1}
    run(tmp_path / "a", Module(), max_steps=2, callbacks=[Dashboard(), save], **options)
    time.sleep(0.5)
    trainer = L.Trainer(**{**QUIET, **options, "logger": TensorBoardLogger(tmp_path, "b"), "callbacks": [Dashboard()],
                           "max_steps": 4})  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(Slow(8), batch_size=None), ckpt_path=save.best_model_path,
                weights_only=True)  # fmt: skip
    (rate,) = scalars(EventAccumulator(trainer.logger.log_dir).Reload(), "vitals/samples_per_second")
    assert rate[0] == 3 and 15 < rate[1] <= 2 / WAIT


def test_without_a_logger_nothing_is_measured():
    trainer = L.Trainer(**QUIET, callbacks=[Dashboard()], max_epochs=1)
    trainer.fit(Module(), torch.utils.data.DataLoader(Slow(1), batch_size=None))
    assert not [name for name in trainer.callback_metrics if name.startswith("vitals/")]


def test_settings_and_final_metrics_are_a_row_of_hparams(tmp_path):
    trainer, found = run(tmp_path, Module(), validate=True)
    session = HParamsPluginData.FromString(found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    experiment = HParamsPluginData.FromString(found.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    values = {name: getattr(v, v.WhichOneof("kind")) for name, v in session.session_start_info.hparams.items()}
    assert values["theta"] == 5 and values["lr/body"] == 0.02 and values["optimizer"] == "SGD"
    assert values["module"] == "Module" and values["weight_decay"] == 0.5 and "seen" not in values
    assert [info.name.tag for info in experiment.experiment.metric_infos] == ["val/loss"]
    assert "_hparams_/session_end_info" in found.summary_metadata
    tags = found.Tags()["scalars"]
    assert "hp_metric" not in tags and "val/loss" in tags  # TensorBoard takes the final value from the curve
    assert settings(trainer, trainer.lightning_module)["theta"] == 5.0


def test_charts_are_arranged_by_what_a_run_has(tmp_path):
    _, found = run(tmp_path, Module(), validate=True)
    (event,) = found.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {c.title: [chart.title for chart in c.chart] for c in layout.category}
    assert charts["Training"] == ["loss"] and "Held-out" not in charts
    assert charts["Vitals"] == [
        "gradient norm",
        "learning rate",
        "samples per second",
        "share of time waiting for data",
    ]
    assert set(charts) <= set(LAYOUT)


def test_loss_accuracies_and_rewards_come_first(tmp_path):
    """TensorBoard sorts groups and the tags in them by name."""
    _, found = run(tmp_path, Module(), validate=True)
    tags = found.Tags()["scalars"]
    assert {tag.partition("/")[0] for tag in tags} == {"train", "val", "vitals"}
    assert sorted(tags)[0] == "train/loss"


def test_groups_have_names():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": one.parameters()}, {"params": other.parameters(), "name": "b_undecayed"}])
    assert group_names(optimizer) == ["group0", "b"]
    assert gradient_norms(optimizer) == {}
    one.weight.grad = torch.full((2, 2), 2.0)
    assert {name: float(norm) for name, norm in gradient_norms(optimizer).items()} == {"all": 4.0, "group0": 4.0}


def test_samples_of_any_batch():
    assert samples_of({"keys": ["a", "b"], "dropped": ["a"]}) == 1
    assert samples_of([torch.zeros(5, 2), torch.zeros(5)]) == 5
    assert samples_of(torch.zeros(4)) == 4 and samples_of({"a": 1}) == 0


def test_validations_to_keep_are_at_least_one():
    with pytest.raises(VideoAlignError, match=r"dashboard\.keep_validations must be at least 1"):
        Dashboard(0)


RANKS = """
import json, sys
from functools import partial
from pathlib import Path
import lightning as L, torch
from lightning.pytorch.loggers import CSVLogger
import test_dashboard
from forked import on_ranks, strategy
from videoalign.callbacks import Dashboard
from videoalign.callbacks.held_out import Rows
from videoalign.callbacks.run_media import media_of
from videoalign.callbacks.run_folder import folder_of
from videoalign.callbacks.vitals import gradient_norms

def pair(number):
    return torch.tensor([[[number, 0.0, 1.0]], [[0.0, number, 2.0]]])

class Looks(L.Callback):
    def on_train_start(self, trainer, module):
        folder, media = folder_of(trainer), media_of(trainer)
        assert (media is not None) == (trainer.global_rank == 0)
        if media:
            media.text("a", str(folder))
        rows, rank = Rows(), trainer.global_rank
        labels = torch.tensor([[1.0, -1.0, float("nan"), 0.0]])
        for number, valid in ((rank, True), (9, False)):
            batch = {"keys": [f"k{1 - number}"], "labels": labels, "valid": torch.tensor([valid])}
            rows.add(batch | {"sources": [("a", f"b{number}")]}, pair(float(number)))
        pairs = rows.gathered()
        self.found = {"folder": str(folder), "keys": pairs.keys, "sources": pairs.sources,
                      "margins": pairs.margins[:, 0].tolist()}
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.found["norms"] = {name: float(norm) for name, norm in gradient_norms(optimizer).items()}
    def on_train_end(self, trainer, module):
        self.found["logged"] = {k: float(v) for k, v in trainer.logged_metrics.items() if "vitals" in k}
        (Path(sys.argv[1]) / f"{sys.argv[2]}{trainer.global_rank}").write_text(json.dumps(self.found))

class Sharded(test_dashboard.Module):
    def configure_model(self):
        from videoalign.models.parallelize import shard
        if self.device_mesh is not None:
            for part in (self.body, self.head):
                shard(part, [], self.device_mesh["data_parallel"])

class Ranked(test_dashboard.Slow):
    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for batch in super().__iter__():
            yield batch | {"x": batch["x"] * (1 + rank)}

def work(kind):
    torch.manual_seed(0)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy(kind), max_steps=2,
                        logger=CSVLogger(sys.argv[1], kind), callbacks=[Dashboard(), Looks()], log_every_n_steps=2,
                        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
                        use_distributed_sampler=False)
    trainer.fit(Sharded(), torch.utils.data.DataLoader(Ranked(2), batch_size=None))

on_ranks(2, partial(work, sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_are_one_run(kind, tmp_path):
    done = forked(RANKS, tmp_path, kind)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{kind}{rank}").read_text()) for rank in range(2)]
    assert found[0] == found[1]  # every rank knows the same, and the first one alone writes
    assert found[0]["folder"] == str(tmp_path / kind / "version_0") and len(list(tmp_path.rglob("*.md"))) == 1
    assert found[0]["keys"] == ["k0", "k1"] and found[0]["margins"] == [1.0, 0.0]
    assert found[0]["sources"] == [["a", "b1"], ["a", "b0"]]
    # brute force: the mean gradient of both ranks at the second step
    torch.manual_seed(0)
    module = Module()
    optimizer = module.configure_optimizers()["optimizer"]
    for step, rate in ((0, 1.0), (1, 0.5)):
        for group, lr in zip(optimizer.param_groups, (0.02, 0.02, 0.01)):
            group["lr"] = lr * rate
        optimizer.zero_grad()
        for rank in range(2):
            x = torch.full((3, 2), 1.0 + step) * (1 + rank)
            (module.head(module.body(x)).square().mean() / 2).backward()
        norms = {name: float(norm) for name, norm in gradient_norms(optimizer).items()}
        optimizer.step()
    assert found[0]["norms"] == pytest.approx(norms, rel=1e-4)
    logged = found[0]["logged"]
    assert logged["vitals/grad_norm/head"] == pytest.approx(norms["head"], rel=1e-4)
    # a rank waits for 2 WAIT, so this is a little less than the samples of two steps: 2 usable ones on each rank
    assert 4.5 < logged["vitals/samples_per_second"] * 2 * WAIT / logged["vitals/data_wait_share"] <= 8


def test_nothing_is_written_to_a_folder_that_was_forgotten(tmp_path):
    """TensorBoard writes in a thread, which would fail at its file, and that error hid why the run was refused."""
    logger = TensorBoardLogger(tmp_path, "run")
    logger.experiment.add_scalar("x", 1.0)
    trainer = L.Trainer(**{**QUIET, "logger": logger, "enable_checkpointing": False})
    forget(trainer)
    assert not (tmp_path / "run" / "version_0").exists()
    logger.experiment.add_scalar("x", 2.0)  # a writer of its own, where something is logged after all
    logger.finalize("failed")
    assert [path.name.split(".")[0] for path in (tmp_path / "run/version_0").iterdir()] == ["events"]

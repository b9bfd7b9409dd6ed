"""Checkpoints: whole or not there, the last one of the last step, exact when resumed, read without running anything."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

sys.path.insert(0, str(Path(__file__).parent))
from forked import forked
from videoalign import VideoAlignError
from videoalign.callbacks import EMA, Checkpoint
from videoalign.callbacks.checkpoint_io import WholeFiles, check_checkpoint, read_checkpoint, whole_checkpoints
from videoalign.datamodules.shards import ShardWriter
from videoalign.datamodules.video import encode

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Loader:
    """A loader of numbers, in another order in every epoch; it is resumable as the project's loaders are."""

    def __init__(self, length):
        self.length, self.epoch, self.batches, self.resumed = length, 0, 0, False

    def __len__(self):
        return self.length

    def __iter__(self):
        if not self.resumed and self.batches:
            self.epoch, self.batches = self.epoch + 1, 0
        self.resumed = False
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch))
        for number in order.tolist()[self.batches :]:
            epoch = self.epoch
            self.batches += 1
            if self.batches == self.length:
                self.epoch, self.batches = self.epoch + 1, 0
            yield torch.tensor([float(epoch), float(number)])

    def state_dict(self):
        return {"epoch": self.epoch, "batches": self.batches}

    def load_state_dict(self, state):
        self.epoch, self.batches, self.resumed = state["epoch"], state["batches"], True


class Line(L.LightningModule):
    """Two weights that depend on the order of all batches, and a buffer that validation alone changes."""

    def __init__(self, length=6, interval="step"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.register_buffer("measured", torch.zeros(2))
        self.length, self.interval, self.saw, self.epochs = length, interval, [], []

    def training_step(self, batch, batch_idx):
        self.saw.append(batch.tolist())
        self.epochs.append(self.current_epoch)
        return ((self.weight - batch) ** 2).sum()

    def validation_step(self, batch, batch_idx):
        self.measured.copy_(self.weight)

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7), "interval": self.interval}
        ]

    def train_dataloader(self):
        return Loader(self.length)

    val_dataloader = test_dataloader = lambda self: torch.utils.data.DataLoader(torch.zeros(1, 1))


def fit(folder, *callbacks, length=6, interval="step", ckpt=None, **options):
    module = Line(length, interval)
    trainer = L.Trainer(**{**QUIET, "default_root_dir": folder, "callbacks": list(callbacks), **options})
    whole_checkpoints(trainer).fit(module, ckpt_path=ckpt)
    return module, trainer


NO_VAL = {"limit_val_batches": 0}
RUNS = {
    "between two savings": ({"max_steps": 5}, {"max_steps": 11}, 2, NO_VAL),
    "at a saving": ({"max_steps": 4}, {"max_steps": 11}, 2, NO_VAL),
    "before the first saving": ({"max_steps": 3}, {"max_steps": 11}, 100, NO_VAL),
    "at an epoch's end": ({"max_steps": 6}, {"max_steps": 11}, 4, NO_VAL),
    "in the second epoch": ({"max_steps": 8}, {"max_steps": 15}, 5, NO_VAL),
    "epochs": ({"max_epochs": 1}, {"max_epochs": 3}, 4, NO_VAL),
    "epochs, two of them": ({"max_epochs": 2}, {"max_epochs": 3}, 4, NO_VAL),
    "epochs, then steps": ({"max_epochs": 1}, {"max_steps": 13}, 4, NO_VAL),
    "steps, then epochs": ({"max_steps": 4}, {"max_epochs": 2}, 3, NO_VAL),
    "accumulation": ({"max_steps": 2}, {"max_steps": 7}, 3, {**NO_VAL, "accumulate_grad_batches": 2}),
    "accumulation, odd epochs": ({"max_epochs": 1}, {"max_epochs": 3}, 3, {**NO_VAL, "accumulate_grad_batches": 4}),
    "accumulation, middle": ({"max_steps": 3}, {"max_steps": 8}, 2, {**NO_VAL, "accumulate_grad_batches": 4}),
    "validation in the middle": ({"max_steps": 5}, {"max_steps": 11}, 2, {"val_check_interval": 2}),
    "validation at the end": ({"max_steps": 4}, {"max_steps": 11}, 3, {"val_check_interval": 2}),
    "validation at a saving": ({"max_steps": 4}, {"max_steps": 11}, 2, {"val_check_interval": 2}),
    "validation each epoch": ({"max_epochs": 1}, {"max_epochs": 3}, 4, {}),
    "validation across epochs": (
        {"max_steps": 8},
        {"max_steps": 15},
        3,
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
    ),
    "schedule by epoch": ({"max_epochs": 1}, {"max_epochs": 4}, 4, {**NO_VAL, "interval": "epoch"}),
    "schedule by epoch, middle": ({"max_steps": 8}, {"max_steps": 20}, 5, {**NO_VAL, "interval": "epoch"}),
}


@pytest.mark.parametrize(("first", "then", "every", "options"), RUNS.values(), ids=RUNS)
def test_last_is_the_last_step_and_goes_on_exactly(first, then, every, options, tmp_path):
    """A run that goes on from last.ckpt has the weights, data, epochs and statistics of one that never stopped."""
    stopped, trainer = fit(tmp_path, Checkpoint(tmp_path / "a", every_n_train_steps=every), **first, **options)
    saved = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == trainer.global_step
    torch.testing.assert_close(saved["state_dict"]["weight"], stopped.weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(saved["state_dict"]["measured"], stopped.measured, rtol=0, atol=0)

    through, _ = fit(tmp_path, enable_checkpointing=False, **then, **options)
    last = str(tmp_path / "a" / "last.ckpt")
    resumed, _ = fit(tmp_path, Checkpoint(tmp_path / "b", every_n_train_steps=every), ckpt=last, **then, **options)
    assert resumed.saw == through.saw[len(stopped.saw) :]
    assert len(resumed.saw) > 0
    assert resumed.epochs == through.epochs[len(stopped.saw) :]
    torch.testing.assert_close(resumed.weight, through.weight, rtol=0, atol=0)
    torch.testing.assert_close(resumed.measured, through.measured, rtol=0, atol=0)


@pytest.mark.parametrize("after", [3, 5, 6])
def test_stopping_while_gradients_accumulate_loses_nothing(after, tmp_path):
    """The batches whose gradients no step has used come again."""
    stop = LambdaCallback(
        on_train_batch_end=lambda trainer, module, *rest: setattr(trainer, "should_stop", len(module.saw) == after)
    )
    options = {**NO_VAL, "accumulate_grad_batches": 4, "length": 10, "max_steps": 5}
    stopped, trainer = fit(tmp_path, stop, Checkpoint(tmp_path / "a", every_n_train_steps=100), **options)
    assert len(stopped.saw) == after
    if trainer.global_step == 0:  # nothing has been learnt
        assert not (tmp_path / "a" / "last.ckpt").exists()
        return
    through, _ = fit(tmp_path, enable_checkpointing=False, **options)
    resumed, _ = fit(tmp_path, ckpt=str(tmp_path / "a" / "last.ckpt"), enable_checkpointing=False, **options)
    torch.testing.assert_close(resumed.weight, through.weight, rtol=0, atol=0)


def test_stopping_before_the_first_step_after_a_resumption_writes_nothing(tmp_path):
    fit(tmp_path, Checkpoint(tmp_path / "a"), max_steps=2, limit_val_batches=0)
    stop = LambdaCallback(on_train_batch_end=lambda trainer, *rest: setattr(trainer, "should_stop", True))
    options = {"accumulate_grad_batches": 4, "max_steps": 5, "limit_val_batches": 0, "length": 10}
    save = Checkpoint(tmp_path / "b", every_n_train_steps=100)
    module, _ = fit(tmp_path, stop, save, ckpt=str(tmp_path / "a" / "last.ckpt"), **options)
    assert len(module.saw) == 1
    assert not (tmp_path / "b" / "last.ckpt").exists()


class Count(WholeFiles):
    def __init__(self):
        self.paths = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.paths.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize(
    ("options", "lasts"),
    [
        ({"max_steps": 4, "limit_val_batches": 0}, 2),  # at 2 and 4, and no more at the end
        ({"max_steps": 5, "limit_val_batches": 0}, 3),
        ({"max_steps": 4, "val_check_interval": 4}, 3),  # the validation at 4 came after the saving at 4
        ({"max_steps": 1, "limit_val_batches": 0}, 1),
        ({"max_steps": 5, "fast_dev_run": 2}, 0),
    ],
)
def test_how_often_last_is_written(options, lasts, tmp_path):
    count = Count()
    fit(tmp_path, Checkpoint(tmp_path / "a", every_n_train_steps=2), plugins=[count], **options)
    assert count.paths.count("last.ckpt") == lasts


def test_lightning_s_own_leaves_an_older_step(tmp_path):
    """When this fails, Lightning's ModelCheckpoint may do what :class:`Checkpoint` does."""
    fit(tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True), max_steps=5, limit_val_batches=0)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_finished_training_is_not_written_again(tmp_path):
    fit(tmp_path, Checkpoint(tmp_path / "a"), max_steps=3)
    count = Count()
    fit(tmp_path, Checkpoint(tmp_path / "b"), plugins=[count], max_steps=3, ckpt=str(tmp_path / "a" / "last.ckpt"))
    assert count.paths == []


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_link_becomes_a_file_of_the_last_step(save_last, tmp_path):
    save = Checkpoint(tmp_path, every_n_train_steps=2, save_last=save_last, save_top_k=-1, filename="{step}")
    fit(tmp_path, save, max_steps=5, limit_val_batches=0)
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")}
    assert steps == {"step=2.ckpt": 2, "step=4.ckpt": 4, "last.ckpt": 5}


def test_the_average_is_resumed_from_last(tmp_path):
    whole, again = EMA(0.3), EMA(0.3)
    fit(tmp_path, whole, max_steps=9, limit_val_batches=0, enable_checkpointing=False)
    fit(tmp_path, EMA(0.3), Checkpoint(tmp_path / "a", every_n_train_steps=2), max_steps=5, val_check_interval=5)
    last = str(tmp_path / "a" / "last.ckpt")
    fit(tmp_path, again, max_steps=9, limit_val_batches=0, ckpt=last, enable_checkpointing=False)
    torch.testing.assert_close(again.average["weight"], whole.average["weight"], rtol=0, atol=0)


# --- measured before it is written --------------------------------------------------------------------------------

MEASURED = """
import json, sys, torch, lightning as L
from forked import on_ranks
from functools import partial
from pathlib import Path
from videoalign.alignment import RewardModel
from videoalign.callbacks import EMA, Checkpoint
from videoalign.datamodules.pairs import VideoPairs
from videoalign.models import FrameSampling, VideoReward
torch.set_num_threads(1)
backbone, made, out = sys.argv[1:]

class Validated(L.Callback):
    def on_validation_end(self, trainer, module):
        self.mean = list(module.network.statistics.mean)

def run(world, every, averaged):
    L.seed_everything(0)
    folder = Path(out, f"{world}-{every}-{averaged}")
    network = VideoReward(backbone, "plain", FrameSampling(fps=4.0, min_pixels=0), language="full")
    model = RewardModel(network, loss="btt", optimizer=partial(torch.optim.SGD, lr=0.1), warmup=0.0)
    seen = Validated()
    saves = [Checkpoint(folder / name, every_n_train_steps=n) for name, n in (("a", every), ("b", 50))]
    averages = [EMA(0.9)] if averaged else []
    strategy = "ddp" if world > 1 else "auto"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    validated = {"val_check_interval": 2, "check_val_every_n_epoch": None, "use_distributed_sampler": False}
    trainer = L.Trainer(accelerator="cpu", devices=world, strategy=strategy, max_steps=3,
        callbacks=[seen, *saves, *averages], **validated, **quiet)
    sizes = {"batch_size": 4 // world, "val_batch_size": 2}
    data = VideoPairs(made + "/train", made + "/val", workers=0, swap=False, shuffle_buffer=0, **sizes)
    trainer.fit(model, data)
    if trainer.is_global_zero:
        for name in "ab":
            last = torch.load(folder / name / "last.ckpt", weights_only=True)
            kept = [network.statistics.mean, network.statistics.std]
            steps = [last["global_step"], last["reward_statistics_step"]]
            print(json.dumps({"world": world, "every": every, "averaged": averaged, "steps": steps,
                "validated": seen.mean, "saved": last["reward_statistics"], "kept": kept}))

for world in (1, 2):
    for every in (1, 100):
        for averaged in (False, True):
            on_ranks(world, partial(run, world, every, averaged))
"""


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """Twelve pairs to train on and five held-out ones."""
    folder, rng = tmp_path_factory.mktemp("rated"), np.random.default_rng(0)
    for name, count in (("train", 12), ("val", 5)):
        with ShardWriter(folder / name, "pairs") as writer:
            for number in range(count):
                clips = {side: encode(rng.integers(0, 255, (4, 32, 32, 3), np.uint8), 4) for side in "ab"}
                labels = {dimension: str(rng.choice(["A", "B", "same"])) for dimension in ("VQ", "MQ", "TA")}
                writer.write(f"{number}", clips, {"prompt": f"a red circle {number}", "labels": labels})
    return folder


@pytest.mark.slow
def test_last_holds_the_statistics_of_its_own_weights(backbone, rated, tmp_path):
    """Training ends at step 3, the last validation was at step 2; one process and two, with an average and without."""
    done = forked(MEASURED, backbone, rated, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(runs) == 16
    for run in runs:
        assert run["steps"] == [3, 3], run
        assert run["saved"] == run["kept"] and run["saved"][0] != run["validated"], run
    for one, two in zip(runs[:8], runs[8:]):
        assert (one["world"], two["world"], one["averaged"]) == (1, 2, two["averaged"])
        np.testing.assert_allclose(two["saved"], one["saved"], rtol=1e-3, atol=1e-5)


# --- written whole ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    fit(tmp_path, Checkpoint(tmp_path / "run", every_n_train_steps=2), max_steps=3, limit_val_batches=0)
    return tmp_path / "run" / "last.ckpt"


def test_every_trainer_of_the_command_line_writes_this_way(tmp_path, monkeypatch):
    for plugin in (None, AsyncCheckpointIO(), AsyncCheckpointIO(TorchCheckpointIO())):
        trainer = whole_checkpoints(L.Trainer(**QUIET, plugins=[plugin] if plugin else None))
        found = trainer.strategy.checkpoint_io
        assert isinstance(found if plugin is None else found.checkpoint_io, WholeFiles)
    mine = Count()
    assert whole_checkpoints(L.Trainer(**QUIET, plugins=[mine])).strategy.checkpoint_io is mine


def test_another_file_system_for_temporary_files_does_not_matter(checkpoint, monkeypatch, tmp_path):
    """TMPDIR is not used: it may be full or gone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    WholeFiles().save_checkpoint({"state_dict": {}, "pytorch-lightning_version": "2"}, checkpoint)
    assert read_checkpoint(checkpoint)["state_dict"] == {}
    assert [path.name for path in checkpoint.parent.iterdir() if path.name.startswith(".")] == []


def test_addresses_elsewhere_are_lightning_s_matter():
    WholeFiles().save_checkpoint({"state_dict": {}, "pytorch-lightning_version": "2"}, "memory://run/last.ckpt")
    assert WholeFiles().load_checkpoint("memory://run/last.ckpt")["state_dict"] == {}


def test_modes_are_those_of_the_umask(checkpoint):
    before = os.umask(0o027)
    try:
        WholeFiles().save_checkpoint({"state_dict": {}}, checkpoint)
    finally:
        os.umask(before)
    assert checkpoint.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("room", [0, 1000, 100_000, 250_000])
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(room, checkpoint, monkeypatch):
    """The disk has room for ``room`` bytes, and the checkpoint is larger."""
    before = checkpoint.read_bytes()
    write = io.FileIO.write

    class Full(io.BufferedWriter):
        written = 0

        def write(self, content):
            self.written += len(content)
            if self.written > room:
                raise OSError(28, "No space left on device")
            return super().write(content)

    monkeypatch.setattr(
        "videoalign.callbacks.checkpoint_io.open", lambda path, mode: Full(io.FileIO(path, mode)), raising=False
    )
    assert write is io.FileIO.write
    with pytest.raises(VideoAlignError, match=r"last\.ckpt cannot be written \(No space left on device\)"):
        WholeFiles().save_checkpoint({"state_dict": {"weight": torch.zeros(100_000)}}, checkpoint)
    assert checkpoint.read_bytes() == before
    assert len(list(checkpoint.parent.iterdir())) == 2


SAVE = """
import sys, torch
from videoalign.callbacks.checkpoint_io import WholeFiles
path = sys.argv[1]
for number in range(10_000):
    state = {"weight": torch.full((500_000,), float(number))}
    WholeFiles().save_checkpoint({"state_dict": state, "pytorch-lightning_version": "2"}, path)
    if number == 0:
        print("begun", flush=True)
"""


def test_killed_while_saving(tmp_path):
    """A checkpoint is always there and whole; what the dead process left goes with the next saving."""
    (tmp_path / "save.py").write_text(SAVE)
    path = tmp_path / "run" / "last.ckpt"
    for round_ in range(2):
        process = subprocess.Popen([sys.executable, tmp_path / "save.py", path], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"begun\n"
        time.sleep(0.05 + 0.037 * round_)
        process.send_signal(signal.SIGKILL)
        process.wait()
        weight = read_checkpoint(path)["state_dict"]["weight"]
        assert (weight == weight[0]).all()
    WholeFiles().save_checkpoint({"state_dict": {}, "pytorch-lightning_version": "2"}, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


# --- read -----------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello.txt", content)
    return buffer.getvalue()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def flipped(content, where):
    number = int(len(content) * where) if isinstance(where, float) else content.index(where)
    return content[:number] + bytes([content[number] ^ 4]) + content[number + 1 :]


def weight_in(content):
    """Bytes of the weight that a checkpoint holds."""
    return torch.load(io.BytesIO(content), weights_only=True)["state_dict"]["weight"].numpy().tobytes()


DAMAGE = {
    "cut to nothing": lambda c: b"",
    "cut to a byte": lambda c: c[:1],
    "cut to half": lambda c: c[: len(c) // 2],
    "cut by a byte": lambda c: c[:-1],
    "text": lambda c: b"version https://git-lfs.github.com/spec/v1\n",
    "zeros": lambda c: bytes(len(c)),
    "a pickle": lambda c: pickle.dumps({"state_dict": {}}),
    "a pickle with code": lambda c: pickle.dumps(Evil()),
    "a checkpoint with code": lambda c: saved({"state_dict": Evil(), "pytorch-lightning_version": "2"}),
    "a checkpoint of the old format": lambda c: _old(),
    "another zip": lambda c: zipped("hello"),
    "a list": lambda c: saved([1, 2]),
    "weights alone": lambda c: saved({"weight": torch.ones(2)}),
    "a byte flipped in the weights": lambda c: flipped(c, weight_in(c)),
    "a byte flipped in the pickle": lambda c: flipped(c, b"global_step"),
    "a byte flipped in the directory": lambda c: flipped(c, 0.995),
}


def _old():
    buffer = io.BytesIO()
    torch.save({"state_dict": {}}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_sentence(damage, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    for read in (
        lambda: read_checkpoint(checkpoint),
        lambda: fit(tmp_path, max_steps=5, ckpt=str(checkpoint)),
        lambda: whole_checkpoints(L.Trainer(**QUIET)).test(Line(), ckpt_path=str(checkpoint)),
    ):
        with pytest.raises(VideoAlignError, match=r"last\.ckpt cannot be used: it is damaged, or no") as caught:
            read()
        assert "weights_only" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.ckpt", "there is no such file"),
        ("folder", r"the folder has no meta\.pt"),
        ("last.ckpt/x", "Not a directory|no such"),
    ],
)
def test_what_is_no_checkpoint_at_all(path, message, checkpoint):
    (checkpoint.parent / "folder").mkdir()
    with pytest.raises(VideoAlignError, match=message):
        read_checkpoint(checkpoint.parent / path)


def test_objects_are_not_loaded_even_if_asked_for(checkpoint):
    with pytest.raises(VideoAlignError, match="leave weights_only out"):
        whole_checkpoints(L.Trainer(**QUIET)).test(Line(), ckpt_path=str(checkpoint), weights_only=False)


def test_another_user_s_checkpoint_is_not_called_damaged(checkpoint, tmp_path):
    if os.geteuid():
        pytest.skip("needs root, to stop being root")
    for folder in (checkpoint.parent, *checkpoint.parents):
        if folder.stat().st_uid == os.geteuid() and len(folder.parts) > 2:
            folder.chmod(0o755)
    checkpoint.chmod(0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(
            VideoAlignError, match=r"no permission to read it: .*last\.ckpt belongs to root, with mode 600"
        ):
            read_checkpoint(checkpoint)
    finally:
        os.seteuid(0)


# --- sharded --------------------------------------------------------------------------------------

SHARDED = """
import os, sys, torch, lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from pathlib import Path
from videoalign import VideoAlignError
from videoalign.callbacks import Checkpoint
from videoalign.callbacks.checkpoint_io import check_checkpoint, whole_checkpoints
torch.set_num_threads(1)
out = Path(sys.argv[1])

class Net(L.LightningModule):
    def configure_model(self):
        if not hasattr(self, "net"):
            torch.manual_seed(0)
            self.net = torch.nn.Linear(8, 8)
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.1)
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(80.0).reshape(10, 8) / 80, batch_size=1)

def run(steps, folder, ckpt=None):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
    save = Checkpoint(out / folder, every_n_train_steps=2)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=steps, callbacks=[save], **quiet)
    net = Net()
    whole_checkpoints(trainer).fit(net, ckpt_path=ckpt)
    return trainer, net.net.weight.full_tensor().detach().clone()

trainer, through = run(3, "a")
run(3, "a")  # over the folder of the first
last = out / "a" / "last.ckpt"
check_checkpoint(last)
trainer.strategy.barrier()
if trainer.is_global_zero:
    print("names", sorted(path.name for path in (out / "a").iterdir()))
    (shard,) = list(last.glob("__0_*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
trainer.strategy.barrier()
try:
    run(5, "b", str(last))
    raise SystemExit("it was read")
except VideoAlignError as error:
    print("refused", error)
"""


@pytest.mark.slow
def test_sharded_checkpoints_are_whole_too(tmp_path):
    (tmp_path / "run.py").write_text(SHARDED)
    command = [sys.executable, tmp_path / "run.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "names ['epoch=0-step=2-v1.ckpt', 'epoch=0-step=2.ckpt', 'last-v1.ckpt', 'last.ckpt']" in done.stdout
    assert "refused checkpoint" in done.stdout
    assert "is cut short" in done.stdout


def sharded(folder: Path, index: object) -> Path:
    """A folder of weights as several processes write it, with another index."""
    folder.mkdir()
    torch.save({"pytorch-lightning_version": "2"}, folder / "meta.pt")
    (folder / ".metadata").write_bytes(index if isinstance(index, bytes) else pickle.dumps(index))
    return folder


@pytest.mark.parametrize(
    "index",
    [Evil(), b"", b"text", {"no": "index"}, textwrap.dedent],
    ids=["code", "empty", "text", "a dict", "a function"],
)
def test_the_index_of_a_folder_runs_nothing(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoAlignError, match="it is damaged, or no checkpoint"):
        check_checkpoint(sharded(tmp_path / "last.ckpt", index))
    assert not (tmp_path / "ran").exists()

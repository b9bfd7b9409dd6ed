"""Schedules and small sets: what shrinks, what stays, and runs that would never validate."""

import logging
import random
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from flow_kit import data, fit, make, write
from helpers import QUIET
from videoalign import VideoAlignError
from videoalign.alignment import FlowSFT
from videoalign.alignment.training import Training
from videoalign.callbacks import SideBySide
from videoalign.callbacks.prompt_sampler import Sampling
from videoalign.models.generator_folder import load_generator


class Line(Training):
    """Counts its validations."""

    def __init__(self):
        super().__init__(partial(torch.optim.SGD, lr=0.1), 0.0, "constant")
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.validations = 0

    def training_step(self, batch, batch_idx):
        return (batch @ self.weight).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.weight.sum())

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.validations += not self.trainer.sanity_checking


def loader(batches):
    return torch.utils.data.DataLoader(torch.ones(batches, 2, 3), batch_size=None)


def run(batches=5, val=True, callbacks=(), **options):
    """Number of validations of a run, and what it warned of them."""
    options = {**QUIET, "max_steps": -1, "callbacks": list(callbacks), **options}
    options["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        L.Trainer(**options).fit(model := Line(), loader(batches), loader(1) if val else None)
    return model.validations, [str(w.message) for w in caught if "never validate" in str(w.message)]


def test_the_warning_comes_where_lightning_never_validates_and_nowhere_else():
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        batches = rng.randint(1, 6)
        every = rng.choice([None, 1, 2, 3])
        interval = rng.choice([0.25, 0.5, 1.0, rng.randint(1, batches), rng.randint(1, 9)])
        if isinstance(interval, int) and every is not None:
            interval = min(interval, batches)  # Lightning refuses more; see below
        elif every is None and isinstance(interval, float):
            interval = rng.randint(1, 9)
        ends = {"max_steps": rng.choice([-1, 1, 2, 5]), "max_epochs": rng.choice([1, 2, 3])}
        options = {
            "check_val_every_n_epoch": every,
            "val_check_interval": interval,
            "accumulate_grad_batches": rng.choice([1, 2, 4]),
            "limit_train_batches": rng.choice([1.0, 1.0, 3]) if not isinstance(interval, int) else 1.0,
            **ends,
        }
        count, said = run(batches, **options)
        assert bool(said) == (count == 0), (batches, options, count, said)
        seen.add(bool(said))
    assert seen == {True, False}


def test_the_warning_names_the_keys():
    _, (said,) = run(check_val_every_n_epoch=4, max_epochs=2)
    assert "trainer.check_val_every_n_epoch 4 asks for the first one in epoch 4 of 5 batches" in said
    assert "trainer.max_epochs 2 ends it after 10" in said
    _, (said,) = run(check_val_every_n_epoch=None, val_check_interval=8, max_steps=3, accumulate_grad_batches=2)
    assert "trainer.val_check_interval asks for the first one after 8 batches, and trainer.max_steps 3 ends it" in said
    _, (said,) = run(val_check_interval=0.8, max_steps=2)
    assert "after 4 of them (trainer.val_check_interval 0.8), and trainer.max_steps 2 ends it after 2" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"check_val_every_n_epoch": 3, "max_epochs": 2}, "check_val_every_n_epoch 3 asks"),
        ({"limit_val_batches": 0, "max_epochs": 1}, "trainer.limit_val_batches is 0"),
        ({"val": False, "max_epochs": 1}, r"there are no held-out data \(data\.val\)"),
    ],
)
@pytest.mark.parametrize("kind", [ModelCheckpoint, EarlyStopping])
def test_what_watches_a_validation_that_never_comes_is_refused(options, said, kind, tmp_path):
    watch = ModelCheckpoint(tmp_path, monitor="val/loss") if kind is ModelCheckpoint else EarlyStopping("val/loss")
    with pytest.raises(VideoAlignError, match=rf"{kind.__name__} monitors val/loss, .*never validate: .*{said}"):
        run(callbacks=[watch], **options)


def test_nothing_is_said_without_held_out_data_or_where_validation_is_off():
    assert run(val=False, max_epochs=1) == (0, [])
    assert run(limit_val_batches=0, max_epochs=1) == (0, [])


# --- small sets -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(folders, tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "set", load_generator(folders["wan"]), count=10)


class Steps(L.Callback):
    """Keeps the samples of each step."""

    def __init__(self):
        self.keys, self.steps = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.keys += batch["keys"]
        if trainer.global_step > len(self.steps):
            self.steps.append(self.keys)
            self.keys = []


def train(folders, latents, **options):
    model, steps = make(FlowSFT, folders["wan"]), Steps()
    fit(model, data(latents, batch_size=2), -1, [steps], max_epochs=2, **options)
    return model, steps.steps


@pytest.fixture(autouse=True)
def told(caplog):
    """Lines that ask nothing are heard, also behind a command that has silenced Lightning."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch")


def test_a_set_below_one_accumulation_is_one_smaller_step(folders, latents, caplog):
    """20 pairs under the recipe's 64 a step: the gradient is the mean over the 20."""
    small, steps = train(folders, latents, accumulate_grad_batches=8)
    assert [len(step) for step in steps] == [10, 10]
    assert (
        "the training set has 10 samples, fewer than one step takes (data.batch_size 2 x "
        "trainer.accumulate_grad_batches 8): in this run a step takes 10 of them, and an epoch is one step"
    ) in caplog.text
    assert caplog.text.count("fewer than one step") == 1
    five, _ = train(folders, latents, accumulate_grad_batches=5)
    assert all(torch.equal(a, b) for a, b in zip(small.policy.parameters(), five.policy.parameters()))


def test_a_larger_set_keeps_its_steps(folders, latents, caplog):
    _, steps = train(folders, latents, accumulate_grad_batches=2)
    assert [len(step) for step in steps] == [4, 4, 4, 4]  # two samples of each epoch are left out
    assert "fewer than one step" not in caplog.text


def test_an_interval_above_an_epoch_validates_at_its_end(folders, latents, caplog):
    count = []

    class Count(L.Callback):
        def on_validation_end(self, trainer, module):
            count.append(trainer.global_step)

    model, held = make(FlowSFT, folders["wan"]), data(latents, batch_size=2, val=latents)
    fit(model, held, -1, [Count()], max_epochs=2, limit_val_batches=1, val_check_interval=500)
    assert count == [5, 10]
    assert "trainer.val_check_interval 500 is larger than the 5 batches of an epoch" in caplog.text


def test_a_callback_that_would_show_nothing_is_named(folders, latents):
    side = SideBySide(["a"], Sampling(num_frames=5, height=32, width=32))
    model, held = make(FlowSFT, folders["wan"]), data(latents, val=latents)
    with pytest.warns(
        UserWarning, match=r"never validate, and SideBySide will show nothing: trainer\.limit_val_batches"
    ):
        fit(model, held, 1, [side], limit_val_batches=0)

"""Averages of the weights that train."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch

from generator_kit import TRAINER
from videoalign import VideoAlignError
from videoalign.callbacks import EMA


class Line(L.LightningModule):
    """Two weights, of which one trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.training_saw, self.validation_saw = [], []

    def training_step(self, batch, batch_idx):
        self.training_saw.append(self.weight.detach().clone())
        return ((self.weight - batch) ** 2).sum() * self.frozen

    def validation_step(self, batch, batch_idx):
        self.validation_saw.append(self.weight.detach().clone())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.full((40, 1), 3.0), batch_size=1)

    val_dataloader = test_dataloader = lambda self: torch.utils.data.DataLoader(torch.zeros(1, 1))


def line(folder: Path, steps: int, *callbacks, ckpt=None, **options):
    module = Line()
    trainer = L.Trainer(
        **{**TRAINER, "default_root_dir": folder, "max_steps": steps, "callbacks": list(callbacks), **options}
    )
    trainer.fit(module, ckpt_path=ckpt)
    return module, trainer


@pytest.mark.parametrize(("decay", "accumulate"), [(0.3, 1), (0.999, 1), (0.3, 2)])
def test_the_average_follows_its_formula(decay, accumulate, tmp_path):
    ema, after = EMA(decay), []
    record = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, *rest: after.append(
            (trainer.global_step, module.weight.detach().clone())
        )
    )
    module, _ = line(tmp_path, 5, ema, record, accumulate_grad_batches=accumulate)
    average = torch.tensor([1.0, -2.0])
    for step, weight in dict(after).items():
        if step:
            d = min(decay, (1 + step) / (10 + step))
            average = d * average + (1 - d) * weight
    assert max(dict(after)) == 5
    assert ema.average.keys() == {"weight"}
    torch.testing.assert_close(ema.average["weight"], average)
    torch.testing.assert_close(module.weight.detach(), average)  # what is exported
    assert not torch.allclose(after[-1][1], average)


def test_validation_sees_the_average_and_training_goes_on_with_the_weights(tmp_path):
    ema, averages = EMA(0.3), []
    note = L.pytorch.callbacks.LambdaCallback(
        on_validation_end=lambda trainer, module: averages.append(ema.average["weight"].clone())
    )
    module, _ = line(tmp_path, 6, ema, note, val_check_interval=2)
    without, _ = line(tmp_path, 6, val_check_interval=2)
    assert len(module.validation_saw) == 3
    assert all(map(torch.equal, module.validation_saw, averages))
    assert all(map(torch.equal, module.training_saw, without.training_saw))
    assert len(module.training_saw) == 6
    assert not torch.allclose(module.validation_saw[0], without.validation_saw[0])


def checkpoint(folder: Path, **options):
    return L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **options)


def test_a_checkpoint_resumes_the_average(tmp_path):
    whole = EMA(0.3)
    straight, _ = line(tmp_path, 6, whole)
    line(tmp_path, 3, EMA(0.3), checkpoint(tmp_path, every_n_train_steps=3), enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    again = EMA(0.3)
    resumed, _ = line(tmp_path, 6, again, ckpt=path)
    assert all(map(torch.equal, resumed.training_saw, straight.training_saw[3:]))
    assert len(resumed.training_saw) == 3
    torch.testing.assert_close(again.average["weight"], whole.average["weight"], rtol=0, atol=0)
    assert again.steps == 6


def test_testing_a_checkpoint_sees_its_average(tmp_path):
    ema = EMA(0.3)
    line(tmp_path, 3, ema, checkpoint(tmp_path, every_n_train_steps=3), enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    for stage in ("test", "validate"):
        module = Line()
        trainer = L.Trainer(**{**TRAINER, "callbacks": [EMA(0.3)], "default_root_dir": tmp_path})
        getattr(trainer, stage)(module, ckpt_path=path, verbose=False)
        assert all(torch.equal(seen, ema.average["weight"]) for seen in module.validation_saw)
        assert module.validation_saw


@pytest.mark.parametrize("every", [3, pytest.param(100)])
def test_the_last_checkpoint_holds_the_weights_that_trained(every, tmp_path):
    """A resumed training would go on from the average as if it were the weights."""
    seen = []
    note = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, *rest: seen.append(module.weight.detach().clone())
    )
    last = checkpoint(tmp_path, every_n_train_steps=every, save_last=True)
    line(tmp_path, 3, EMA(0.3), note, last, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 3
    assert torch.equal(saved["state_dict"]["weight"], seen[-1])


@pytest.mark.parametrize("decay", [0.0, 1.0, -1, math.nan])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(VideoAlignError, match=r"EMA\.decay must be in"):
        EMA(decay)


def test_the_export_holds_the_average(trained):
    run = trained["wan"]
    for name, average in run.ema.average.items():
        assert torch.equal(run.module.get_parameter(name).detach(), average), name
    weights = torch.load(run.checkpoint, weights_only=False)["state_dict"]
    assert weights.keys() == run.ema.average.keys()
    assert any(not torch.equal(weights[n], a) for n, a in run.ema.average.items())

"""What all trainings share: fp32 or refused, finite on every rank, averages with statistics of their own."""

from functools import partial

import lightning as L
import pytest
import torch

from videoalign import EverywhereError, VideoAlignError
from videoalign.alignment.training import Training, warmup_schedule
from videoalign.callbacks import EMA, Checkpoint

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Line(Training):
    """The smallest training: it fits a line."""

    def __init__(self, rate: float = 0.1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(partial(torch.optim.SGD, lr=rate), 0.0, "constant")
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        self.frozen = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
        self.poison: int | None = None

    def training_step(self, batch, batch_idx):
        losses = (batch.sum(1) - (batch * self.weight).sum(1)).square()
        self.step_means.add("loss", losses)
        broken = torch.nan if self.poison == batch_idx else 1.0
        return self.finite(losses.mean() * broken, [f"k{batch_idx}"])

    def validation_step(self, batch, batch_idx):
        self.held_out_means.add("loss", (batch.sum(1) - batch @ self.weight).square())


def batches(dtype: torch.dtype = torch.float32) -> torch.utils.data.DataLoader:
    """Six batches of two points."""
    points = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return torch.utils.data.DataLoader(points.to(dtype), batch_size=None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_what_trains_is_exact(precision):
    model = Line()
    L.Trainer(**QUIET, max_epochs=1, precision=precision, enable_checkpointing=False).fit(
        model, batches(torch.double if precision == "64-true" else torch.float32)
    )
    assert model.weight.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert model.weight.abs().min() > 0


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_low_precision_is_refused(precision):
    """In bf16 a step of 2e-6 would vanish: 0.0 % of the weights moved."""
    with pytest.raises(
        VideoAlignError, match=rf"1 tensors would train in torch.*such as weight.*{precision}.*use bf16-mixed"
    ):
        L.Trainer(**QUIET, max_epochs=1, precision=precision, enable_checkpointing=False).fit(Line(), batches())
    with pytest.raises(VideoAlignError, match=r"would train in torch\.float16"):
        L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False).fit(Line(dtype=torch.float16), batches())


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_step_logs_the_mean_of_all_its_batches(accumulate):
    logged = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *rest):
            if (rest[-1] + 1) % accumulate == 0:
                logged.append(float(trainer.callback_metrics["train/loss"]))

    trainer = L.Trainer(
        **QUIET, max_epochs=1, accumulate_grad_batches=accumulate, enable_checkpointing=False, callbacks=[Watch()]
    )
    trainer.fit(Line(rate=0.0), batches())
    losses = torch.stack([batch.sum(1).square() for batch in batches()])  # (6, 2)
    assert logged == pytest.approx(losses.view(-1, 2 * accumulate).mean(1).tolist(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_training():
    model = Line()
    model.poison = 4
    with pytest.raises(EverywhereError, match=r"the loss is nan at step 4, samples \['k4'\]"):
        L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False).fit(model, batches())


def test_dropout_belongs_to_the_step():
    """Draws from torch's own generator do not depend on earlier draws, so that a resumed run draws the same."""
    drawn = []

    class Draws(Line):
        def training_step(self, batch, batch_idx):
            drawn.append(torch.rand(1).item())
            return super().training_step(batch, batch_idx)

    for before in (0, 5):
        torch.rand(before)
        L.Trainer(**QUIET, max_epochs=2, enable_checkpointing=False).fit(Draws(), batches())
    assert drawn[:12] == drawn[12:]
    assert len(set(drawn)) == 12


def test_checkpoints_hold_the_weights_and_their_average(tmp_path):
    """This includes checkpoints that are written while the average replaces the weights: at the end of training."""
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    ema, model, seen = EMA(0.5), Line(), {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *rest):
            seen["weights"] = module.weight.detach().clone()

    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[save, ema, Watch()])
    trainer.fit(model, batches())
    average = model.weight.detach().clone()
    assert torch.equal(average, ema.average["weight"])
    assert not torch.equal(average, seen["weights"])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    ema.kept = None
    for path in tmp_path.glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        (state,) = [state for name, state in content["callbacks"].items() if name.startswith("EMA")]
        if content["global_step"] == 6 and path.name == "last.ckpt":
            assert torch.equal(content["state_dict"]["weight"], seen["weights"])
            assert torch.equal(state["average"]["weight"], average)


@pytest.mark.parametrize(
    ("decay", "values"), [("constant", [1 / 3, 2 / 3, 1, 1, 1]), ("linear", [1 / 3, 2 / 3, 1, 0.5, 0])]
)
def test_schedule(decay, values):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = warmup_schedule(optimizer, 4, 0.5, decay)
    found = []
    for _ in range(5):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(values)


class Counted:
    """Three batches an epoch, other ones in each; knows its place."""

    def __init__(self):
        self.epoch = self.done = 0

    def __len__(self):
        return 3

    def __iter__(self):
        for number in range(self.done, 3):
            seed = 10 * self.epoch + number
            self.done = number + 1
            if self.done == 3:
                self.epoch, self.done = self.epoch + 1, 0
            yield torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.epoch, self.done = state["epoch"], state["done"]


@pytest.mark.parametrize("saved", [1, 2])
@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 3}], ids=str)
def test_a_checkpoint_of_an_epochs_end_goes_on_with_the_next_epochs_data(every, saved, tmp_path):
    """Lightning takes no loader's place from it where epochs are counted, and would begin at the first epoch's data."""
    options = {**QUIET, "default_root_dir": tmp_path}
    through = Line()
    L.Trainer(**options, max_epochs=4, enable_checkpointing=False).fit(through, Counted())
    kept = Checkpoint(tmp_path / "run", save_top_k=-1, **every)
    L.Trainer(**options, max_epochs=saved, callbacks=[kept]).fit(Line(), Counted())
    (path,) = (tmp_path / "run").glob(f"*step={3 * saved}.ckpt")
    resumed = Line()
    L.Trainer(**options, max_epochs=4, enable_checkpointing=False).fit(resumed, Counted(), ckpt_path=path)
    assert torch.equal(resumed.weight, through.weight)

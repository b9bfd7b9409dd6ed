"""The base of every training: optimizer and schedule, checkpoints of trained tensors, finite losses, logged means."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .. import EverywhereError, VideoAlignError
from ..datamodules.data_ranks import merged
from ..models.fingerprint import fingerprint
from ..models.finite import is_finite
from ..models.flow import draw_seed
from .means import Means
from .parameter_groups import Groups, Patterns, assign, build_optimizer, check_same
from .validation_plan import check_validation

Decay = Literal["constant", "cosine", "linear"]
GROUP_ENTRIES = ("parameter_groups", "learning_rates")
"""Entries of a checkpoint that name the groups of its optimizer."""


class Training(L.LightningModule):
    """A LightningModule that trains some of its parameters.

    A checkpoint holds the tensors that train and nothing else; one that lacks any of them or has others is refused.
    (Sharded checkpoints keep everything: torch's loader wants every tensor of the sharded model.)

    Args:
        optimizer: Optimizer of the parameters that train.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        decay: Learning rate after warm-up: ``constant``, or falling to zero at the last step, ``linear`` or ``cosine``.
        groups: Rates of groups of parameters, by the group's name.
    """

    own_groups: Mapping[str, Patterns] = {"weights": ("*",)}
    """Groups that every optimizer of this module has, with patterns of their parameters' names; the first match
    decides. A group appears under its name in the logs, unless nothing of it trains."""

    def __init__(self, optimizer: OptimizerCallable, warmup: float, decay: Decay, groups: Groups | None = None) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise VideoAlignError(f"model.warmup is a share of the steps in [0, 1), got {warmup}")
        self.strict_loading = False
        self.optimizer, self.warmup, self.decay, self.groups = optimizer, warmup, decay, dict(groups or {})
        self._grouping: list[dict[str, Any]] = []
        """Groups of the optimizer, as checkpoints name them."""
        self._rates: dict[str, float] = {}
        """Learning rates of the groups, before warm-up and decay."""
        self._digests: dict[str, str] | None = None
        """Digests of what :meth:`base` gives, once they were computed."""
        self._resumed: dict[str, Any] | None = None
        """What the checkpoint that a run continues says of groups and rates."""
        self.step_means, self.held_out_means = Means(), Means()

    # --- trained parameters -----------------------------------------------------------------------------------------

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by their names in ``state_dict``."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def base(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Frozen parameters that the trained ones change or are compared with, by the network's name.

        No checkpoint holds them, so each keeps a digest. A subclass leaves out what may differ when a training is
        continued, such as an autoencoder.
        """
        frozen = {name: parameter for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return {"base": frozen}

    def _base_digests(self) -> dict[str, str]:
        """Digests of the base; in bfloat16, because a run may go on in another precision. Collective where sharded."""
        if self._digests is None:
            self._digests = {name: fingerprint(part, torch.bfloat16) for name, part in self.base().items() if part}
        return self._digests

    def on_fit_start(self) -> None:
        """Note what the base is, before a forward pass packs quantised weights. Collective where sharded."""
        self._base_digests()

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer of the parameters that train, in groups, and warm-up with the chosen decay.

        Raises:
            VideoAlignError: If a parameter would train in another precision than float32 (or float64), a group of the
                configuration does not fit the module, or a checkpoint's groups are other ones.
        """
        if low := {n: p.dtype for n, p in self.trained().items() if p.dtype not in (torch.float32, torch.float64)}:
            name, kind = next(iter(low.items()))
            raise VideoAlignError(
                f"{len(low)} tensors would train in {kind}, such as {name}; small steps vanish in that precision. With "
                f"trainer.precision {self.trainer.precision!r}: use bf16-mixed, which computes in bfloat16 and trains "
                "in float32"
            )
        optimizer, self._grouping = build_optimizer(self.optimizer, self.trained(), self.members(), self.groups)
        self._rates = {group["name"]: group["lr"] for group in optimizer.param_groups if "name" in group}
        if self._resumed is not None:
            self.compare_groups(self._resumed)
        schedule = warmup_schedule(optimizer, float(self.trainer.estimated_stepping_batches), self.warmup, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def members(self) -> dict[str, list[str]]:
        """Names of the parameters that train, by the group of the optimizer that they belong to."""
        return assign(self.trained(), self.own_groups, self.groups)

    def compare_groups(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose optimizer had other groups; say where its learning rates are other ones.

        Args:
            checkpoint: The checkpoint, or what it holds beside the state of model and optimizers.

        Raises:
            VideoAlignError: If groups, or their parameters, differ.
        """
        check_same(checkpoint.get("parameter_groups"), self._grouping)
        stored = checkpoint.get("learning_rates", {})
        if other := {name: rate for name, rate in self._rates.items() if stored.get(name, rate) != rate}:
            listed = ", ".join(f"{name}: {stored[name]:g}, not {rate:g}" for name, rate in other.items())
            rank_zero_warn(f"a continued training keeps the learning rates of its checkpoint ({listed})")
            self._rates |= {name: stored[name] for name in other}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen tensors out, and name the groups of the optimizer. Collective: every rank must call it.

        Raises:
            EverywhereError: On all ranks, if a trained weight is not finite: the checkpoint before is the last one.
        """
        own = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in self.trained().items()}
        bad = [name for name, tensor in own.items() if not is_finite(tensor)]
        if found := [name for names in merged({self.global_rank: bad}).values() for name in names]:
            raise EverywhereError(
                f"trained weights are not finite at step {self.global_step}, such as {found[0]}: this checkpoint is "
                "not written, and the last one is as it was. Begin anew with a lower learning rate, or with "
                "trainer.gradient_clip_val: a continued run keeps its rates"
            )
        checkpoint["base"] = self._base_digests()
        if self._grouping and "optimizer_states" in checkpoint:
            checkpoint["parameter_groups"] = self._grouping
            checkpoint["learning_rates"] = self._rates
        if self.device_mesh is None:
            trained = self.trained()
            checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model.

        Raises:
            VideoAlignError: If tensors are missing, unexpected or of other shapes, or were trained on another base.
        """
        if checkpoint.get("optimizer_states"):
            self._resumed = {name: checkpoint[name] for name in GROUP_ENTRIES if name in checkpoint}
        if "state_dict" in checkpoint:  # sharded ones are loaded, and checked, already
            self._check_tensors(checkpoint["state_dict"])
        self._check_base(checkpoint.get("base", {}))

    def _check_base(self, saved: Mapping[str, str]) -> None:
        """Refuse to go on, or to export, on another base; whoever only measures is told."""
        if not (other := [name for name, digest in saved.items() if self._base_digests().get(name, digest) != digest]):
            return
        text = (
            f"the checkpoint was trained on another {' and '.join(other)} than the one that is loaded here, whose "
            "weights were replaced or are quantised otherwise"
        )
        if self._trainer is not None and self.trainer.state.fn != "fit":
            rank_zero_warn(text)
            return
        raise VideoAlignError(f"{text}. Name the generator or backbone that it began with, or begin a training anew")

    def _check_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Refuse tensors of a checkpoint that are not those that train."""
        remedy = "Use the configuration that it was trained with."
        own = self.state_dict()
        want, known, have = self.trained().keys(), own.keys(), saved.keys()
        if misshapen := [name for name in have & known if own[name].shape != saved[name].shape]:
            name = sorted(misshapen)[0]
            raise VideoAlignError(
                f"the checkpoint does not fit this model: {len(misshapen)} tensors have other shapes, such as {name}, "
                f"{tuple(saved[name].shape)} in place of {tuple(own[name].shape)}. {remedy}"
            )
        if not want <= have <= known:
            missing, unexpected = sorted(want - have), sorted(have - known)
            raise VideoAlignError(
                f"the checkpoint does not fit this model: {len(missing)} tensors are missing (such as {missing[:3]}), "
                f"{len(unexpected)} are unexpected (such as {unexpected[:3]}). {remedy}"
            )

    # --- losses -----------------------------------------------------------------------------------------------------

    def finite(self, loss: Tensor, keys: Sequence[str]) -> Tensor:
        """Return the loss if it is finite on every rank. Collective: every rank must call it.

        Args:
            loss: Loss of a batch, a scalar.
            keys: Keys of the batch's samples, for the message.

        Raises:
            EverywhereError: On all ranks, if the loss is not finite on one of them.
        """
        broken = (~torch.isfinite(loss.detach())).int()
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several:
            torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
        if not broken:
            return loss
        where = f" on rank {self.global_rank}" if several and self.trainer.world_size > 1 else ""
        text = f"the loss is {loss.item()} at step {self.global_step}{where}, samples {list(keys)}"
        texts = [None if torch.isfinite(loss) else text]
        if several:
            mine, texts = texts[0], [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(texts, mine)
        raise EverywhereError(
            f"{next(t for t in texts if t)}; lower the learning rate or look at these samples. "
            "The last checkpoint is as it was."
        )

    # --- logged means -----------------------------------------------------------------------------------------------

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """The values to log for the means of a step or an epoch; an algorithm may add to them or replace them."""
        return means

    def logged(self, name: str) -> str:
        """The name under which a value is logged, behind ``train/``, ``val/`` or ``test/``."""
        return name

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the means of a step, over all its micro-batches. Collective."""
        for name, value in self.derived(self.step_means.compute()).items():
            bar = name.startswith("loss")
            self.log(f"train/{self.logged(name)}", value, prog_bar=bar, on_step=True, on_epoch=False, batch_size=1)
        self.step_means.reset()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch's own generator, which draws dropout, by step and rank: a resumed run then draws the same."""
        run = os.environ.get("PL_GLOBAL_SEED", "0")
        torch.manual_seed(draw_seed(run, self.global_step, batch_idx, self.global_rank))

    def on_train_start(self) -> None:
        """Reset the means, to which an unfinished step may have added; say if the run cannot validate."""
        self.step_means.reset()
        check_validation(self.trainer)
        loop = self.trainer.fit_loop
        if states := loop._combined_loader_states_to_load:
            # without max_steps Lightning (2.6) takes no loader's place from a checkpoint of the end of an epoch; where
            # somebody asked for trainer.estimated_stepping_batches, from none (its issue 20550)
            loop._combined_loader._load_state_dicts(states)
            loop._combined_loader_states_to_load = []
            iter(loop._data_fetcher)  # which was begun at the wrong place

    def on_validation_epoch_start(self) -> None:
        """Reset the means, to which a sanity check or an interrupted epoch may have added."""
        self.held_out_means.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the means of the held-out samples. Collective."""
        stage = "test" if self.trainer.testing else "val"
        for name, value in self.derived(self.held_out_means.compute()).items():
            self.log(f"{stage}/{self.logged(name)}", value, batch_size=1)

    def on_test_epoch_start(self) -> None:
        """Begin a test like a validation."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """End a test like a validation."""
        self.on_validation_epoch_end()


def warmup_schedule(optimizer: Optimizer, steps: float, warmup: float, decay: Decay) -> LambdaLR:
    """A linear rise over the first ``warmup * steps`` steps, then a constant rate or a decay to zero at ``steps``."""
    rise = warmup * steps if math.isfinite(steps) else 0

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        progress = min((step - rise) / max(steps - rise, 1), 1.0)
        return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[decay]

    return LambdaLR(optimizer, factor)

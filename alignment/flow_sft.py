"""Supervised fine-tuning of a flow-matching generator, the base of all alignment algorithms (VideoAlign, section 4)."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import VideoAlignError
from ..datamodules.contracts import HasNullPrompt, require
from ..models.checkpointing import Checkpointing, enable_checkpointing
from ..models.family import Encoded
from ..models.fingerprint import fingerprint
from ..models.flow import TimeLaw, draw, draw_seed, interpolate, squared_error
from ..models.generator import START
from ..models.generator_folder import load_generator
from ..models.hub import address_of, commit_of
from ..models.lora import LoRA
from ..models.lora_start import add_adapters
from ..models.memory import Memory
from .context_parallel import parallelize
from .experts import Expert, require_one_expert
from .export_uses import of_generator, quoted
from .parameter_groups import ParameterGroup
from .training import Decay, Training

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""Query, key, value and output of every attention, which the paper adapts (Table 10)."""


class FlowSFT(Training):
    r"""Flow matching on the preferred videos, :math:`E\,\|v_\theta(x_t, t, y) - v\|^2`; base of the other algorithms.

    An algorithm overrides :meth:`loss`, and sets :attr:`needs_reference` if its loss needs the reference's errors. All
    else is here: policy and reference, LoRA adapters, noise and times, precision, logging and checkpoints.

    Metrics: ``train/loss``, ``train/velocity_error/*`` and those of the algorithm; at validation the same under
    ``val/``, at fixed noise and times. Of a generator with two experts they are ``train/loss/high`` and so on.

    Args:
        generator: Folder or hub id of a diffusers pipeline.
        lora: LoRA adapters of the transformer; null trains all of its weights (and keeps a frozen copy where a
            reference is needed).
        times: Distribution of the training times.
        dtype: Dtype of the frozen weights; adapters are fp32.
        fps: Frame rate of the videos, where the family asks for it (LTX).
        optimizer: Optimizer of the parameters that train.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        decay: Learning rate after warm-up: ``constant``, or falling to zero at the last step, ``linear`` or ``cosine``.
        groups: Learning rates of groups of parameters by name, or all rates of one with a pattern of its parameters'
            names; the optimizer's if not given. Groups that need no pattern: ``adapters``, or ``transformer``
            where ``lora`` is null.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory; with
            ``attention`` all but the outputs of attention, which are its most expensive part at a video's length.
        compile: Whether torch.compile compiles the transformer's blocks; the same as ``memory.compile``.
        parts: Parts of the pipeline to load; the text encoder is not needed once prompts are encoded.
        null_share: Share of the samples whose prompt is replaced by the empty prompt, so that a generator that is
            trained from scratch can be sampled with classifier-free guidance. Fine-tuning leaves it at 0.
        family: Class of the generator's family, by import path (``package.module:Name``) or name; found by the
            pipeline's class if not given.
        expert: Which of two experts trains (Wan2.2-A14B): ``high``, for times above the generator's boundary, or
            ``low``. Times are those of its interval; the other expert is not loaded but to sample videos.
        memory: How the weights are held and computed: quantised, offloaded, compiled and so on.
    """

    own_groups = {"adapters": ("*.lora_*",), "transformer": ("*",)}
    needs_reference = False
    """Whether :meth:`loss` gets the reference's errors."""
    sides: tuple[int, ...] | None = (0,)
    """Sides of a pair that the loss reads, the preferred one being 0; None for all of them."""

    def __init__(
        self,
        generator: str,
        lora: LoRA | None = LoRA(targets=ATTENTION),  # noqa: B008  never changed
        times: TimeLaw = TimeLaw(),  # noqa: B008  frozen
        dtype: Literal["float32", "bfloat16"] = "float32",
        fps: float = 25.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.0,
        decay: Decay = "constant",
        groups: dict[str, float | ParameterGroup] | None = None,
        gradient_checkpointing: Checkpointing = False,
        compile: bool = False,
        parts: Sequence[str] = ("transformer", "vae"),
        null_share: float = 0.0,
        family: str | None = None,
        expert: Expert | None = None,
        memory: Memory = Memory(),  # noqa: B008  frozen
    ) -> None:
        super().__init__(optimizer, warmup, decay, groups)
        if not 0 <= null_share < 1:
            raise VideoAlignError(f"model.null_share is a share of the samples in [0, 1), got {null_share}")
        if null_share and self.needs_reference:
            raise VideoAlignError(
                f"model.null_share: {type(self).__name__} compares with a reference at the same prompt; leave it at 0"
            )
        self.null_share = null_share
        memory = replace(memory, compile=compile or memory.compile)
        if memory.compile and gradient_checkpointing == "attention":
            raise VideoAlignError(
                "model.gradient_checkpointing: attention looks at the operations of blocks, which compiled ones hide; "
                "choose true, or leave compile out"
            )
        self.memory = memory.for_training(lora is None, parts, bool(gradient_checkpointing))
        self.generator = load_generator(generator, dtype, parts, fps, family, expert, memory=self.memory)
        require_one_expert(self.generator, expert)
        self.family = family
        self.name, self.lora, self.times = generator, lora, times.within(*self.generator.interval())
        enable_checkpointing(self.policy, gradient_checkpointing)
        if lora is None:
            if self.policy.dtype != torch.float32:
                raise VideoAlignError(
                    "model.lora: null trains the weights themselves, which in bfloat16 loses small steps; "
                    "set model.dtype: float32"
                )
            # frozen, so that no checkpoint holds the copy
            self.reference = copy.deepcopy(self.policy).requires_grad_(False) if self.needs_reference else None
            for name, parameter in self.policy.named_parameters():
                parameter.requires_grad_(self.generator.adaptable(name))
        else:
            self.reference = None
            config = add_adapters(self.generator, lora)
            if address_of(generator):  # exported adapters name their base; a local path means nothing elsewhere
                config.base_model_name_or_path, config.revision = generator, commit_of(generator)
        self.policy.train()
        self.memory.compile_blocks(self.generator)
        if self.memory.stored:  # DDP would send them to all ranks, which have loaded the same files
            frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
            self._ddp_params_and_buffers_to_ignore = frozen

    @property
    def policy(self) -> nn.Module:
        """The transformer that trains, which is the generator's own."""
        return self.generator.transformer

    def setup(self, stage: str) -> None:
        """Refuse a DataModule without the empty prompt's embedding where :attr:`null_share` needs it; offload parts."""
        self.memory.place(self.generator, self.trainer.strategy.root_device, self.device_mesh)
        if stage == "fit" and self.null_share:
            self._null()

    def _null(self) -> Encoded:
        return require(self.trainer.datamodule, HasNullPrompt, f"{type(self).__name__} with model.null_share").null

    def configure_model(self) -> None:
        """Shard the transformer under ModelParallelStrategy, and its tokens under ContextParallel."""
        if self.device_mesh is None or isinstance(next(self.policy.parameters()), DTensor):
            return
        nets = [net for net in (self.policy, self.reference) if net is not None]
        parallelize({net: list(getattr(net, self.generator.blocks)) for net in nets}, self.trainer.strategy)

    def base(self) -> dict[str, dict[str, Tensor]]:
        """Frozen parameters of the transformer that trains, and of the reference where it is a copy."""
        nets = {"transformer": self.policy} | ({} if self.reference is None else {"reference": self.reference})
        return {net: {n: p for n, p in of.named_parameters() if not p.requires_grad} for net, of in nets.items()}

    # --- errors -----------------------------------------------------------------------------------------------

    @property
    def reference_is_fixed(self) -> bool:
        """Whether :meth:`as_reference` always gives the same network: callbacks then sample its videos once.

        A subclass whose reference changes overrides it. Without adapters and without a copy of the first weights, as in
        SFT of all weights, the policy itself stands in for the reference.
        """
        return self.lora is not None or self.reference is not None

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The reference's transformer for the time of a ``with`` block, without gradients."""
        with torch.no_grad():
            if self.reference is not None:
                yield self.reference
            else:
                with self.generator.without_adapters():
                    yield self.policy

    def errors(
        self, latents: Tensor, seeds: Tensor, conditions: Sequence[Encoded], net: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity errors; both sides of a pair share noise and time, and go through the network in one forward.

        Frames that are the image's are neither noised nor counted.

        Args:
            latents: Normalised latents (S, N, C, F, H, W).
            seeds: Seeds (N,) of noise and times.
            conditions: Prompt, and maybe image, of the N samples.
            net: Transformer whose errors are computed; the policy if not given.

        Returns:
            Errors (S, N) in fp32, and times (N,).
        """
        self.generator.check_latents(latents.shape)
        uniform, noise = draw(seeds, latents.shape[2:], latents.device)
        t = self.times(uniform)
        sides = len(latents)
        x0, x1 = latents.flatten(0, 1), noise.repeat(sides, *[1] * (noise.ndim - 1))
        condition = self.generator.condition(list(conditions) * sides, latents.device)
        x = self.generator.with_image(interpolate(x0, x1, t.repeat(sides)), condition)
        velocity = self.generator.velocity(x, t.repeat(sides), condition, net)
        clean = self.generator.clean_frames(condition)
        return squared_error(velocity, x0, x1, clean).unflatten(0, (sides, -1)), t

    def reference_errors(self, batch: dict[str, Any], latents: Tensor) -> Tensor:
        """Errors (S, N) of the reference, from the cache or computed now."""
        cached = self._sides(batch["reference"])
        if not cached.isnan().any():
            return cached
        with self.as_reference() as net:
            return self.errors(latents, batch["seeds"], batch["conditions"], net)[0]

    def _start(self) -> str | None:
        """Digest of the adapters that training went on from, which are the reference; None where it began anew."""
        start = {name: p for name, p in self.policy.named_parameters() if f".{START}." in name}
        return fingerprint(start) if start else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which adapters are the reference: no checkpoint holds them."""
        super().on_save_checkpoint(checkpoint)
        if (start := self._start()) is not None:
            checkpoint["lora_start"] = start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, or one whose reference is another one.

        Raises:
            VideoAlignError: If tensors do not fit, or ``model.lora.start`` holds other adapters than it did.
        """
        if checkpoint.get("lora_start") != self._start():
            raise VideoAlignError(
                "model.lora.start holds other adapters than when this training began, and they are its reference; name "
                "those, or begin a training anew"
            )
        super().on_load_checkpoint(checkpoint)

    def reference_made(self) -> dict[str, Any]:
        """Settings that the reference's errors depend on besides the latents, as plain values."""
        base = {name: p for name, p in self.policy.named_parameters() if ".lora_" not in name or f".{START}." in name}
        return {
            "transformer": fingerprint(base),
            "times": self.times.to_dict(),
            "dtype": str(self.policy.dtype),
            "fps": self.generator.fps,
            "precision": str(self.trainer.precision),
            "device": self.trainer.strategy.root_device.type,
        }

    def _some_without(self, conditions: Sequence[Encoded], seeds: Tensor) -> Sequence[Encoded]:
        """Conditions, the prompt of a share of them replaced by the empty one as the samples' seeds decide."""
        if not self.null_share:
            return conditions
        null, chosen = self._null(), [draw_seed("null", s) % 1000 < 1000 * self.null_share for s in seeds.tolist()]
        return [one | null if empty else one for one, empty in zip(conditions, chosen)]

    def _sides(self, values: Tensor) -> Tensor:
        """The part of values (sides, ...) that belongs to the sides that the loss reads."""
        return values if self.sides is None else values[list(self.sides)]

    # --- steps ------------------------------------------------------------------------------------------------

    def loss(
        self, batch: dict[str, Any], errors: Tensor, reference: Tensor | None, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of a batch, and values to log.

        Args:
            batch: Batch of :class:`~videoalign.datamodules.latents.LatentPairs`.
            errors: Velocity errors (S, N) of the policy.
            reference: Velocity errors (S, N) of the reference, if :attr:`needs_reference` is set.
            t: Times (N,).

        Returns:
            Losses (N,), and values by name, (N,) or (S, N). Their means over the valid samples are logged, or their
            maximum under a name that ends in ``/max``.
        """
        return errors[0], {}

    def _step(self, batch: dict[str, Any], stage: str) -> Tensor | None:
        if "latents" not in batch:
            if stage == "train":
                raise VideoAlignError(f"no sample of a batch could be used: {batch['dropped'][-1].reason}")
            return None
        if len(batch["latents"]) <= max(self.sides or [0]):
            raise VideoAlignError(
                f"{type(self).__name__} compares the two videos of a pair, but the latents are of single videos"
            )
        latents = self._sides(batch["latents"])
        reference = self.reference_errors(batch, latents) if self.needs_reference else None
        conditions = batch["conditions"]
        conditions = self._some_without(conditions, batch["seeds"]) if stage == "train" else conditions
        errors, t = self.errors(latents, batch["seeds"], conditions)
        losses, values = self.loss(batch, errors, reference, t)
        valid = batch["valid"]
        loss = None
        if stage == "train":  # a sample has the same weight whether or not another one of its batch was dropped
            loss = self.finite(torch.where(valid, losses, 0.0).sum() / len(valid), batch["keys"])
        values = {"loss": losses, "velocity_error/chosen": errors[0], **values}
        if len(errors) > 1:
            values["velocity_error/rejected"] = errors[1]
        if reference is not None:
            values |= {f"velocity_error/{name}/reference": row for name, row in zip(("chosen", "rejected"), reference)}
        means = self.step_means if stage == "train" else self.held_out_means
        for name, value in values.items():
            means.add(name, value, valid)
        return loss

    def logged(self, name: str) -> str:
        """The name of a logged value, with the expert that it belongs to.

        Errors of the two experts differ by their size alone, by tens of times; no chart may lay them over each other.
        """
        return f"{name}/{self.generator.expert}" if self.generator.expert else name

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the metrics of a held-out batch."""
        self._step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Run the validation step on test data."""
        self._step(batch, "test")

    def uses_of(self, export: Path) -> dict[str, str]:
        """Commands that use the export: adapters with the generator, or a whole pipeline."""
        if self.lora is not None:
            option = f"--lora {quoted(export)}"
            return of_generator(
                export, option, self.name, self.trainer, self.generator.image == "required", self.family
            )
        whole = (export / "model_index.json").exists()
        images = self.generator.image == "required"
        return of_generator(export, "", export, self.trainer, images, self.family) if whole else {}

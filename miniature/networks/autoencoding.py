"""Training of a miniature pipeline's autoencoder: it stands in for the pre-trained one of a real generator."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from ... import VideoAlignError
from ...alignment.training import Decay, Training
from ...models.files import check_free, new_folder
from ...models.finite import NOT_WRITTEN, require_finite
from ...models.generator_folder import load_generator
from ...models.locks import Hold

RECORD = "model_index.json"


class Autoencoding(Training):
    r"""Trains the autoencoder of a pipeline to reproduce clips, :math:`E\,w\,\|D(E(x) + \sigma \epsilon) - x\|^2`.

    The noise :math:`\epsilon` on the latents makes the decoder forgive the errors of a small diffusion transformer.
    When training ends, it writes the whole pipeline, with mean and deviation of the latents that it was trained on.

    Args:
        generator: Folder of the pipeline to start from; its autoencoder has ``latents_mean`` and ``latents_std`` (Wan).
        out: Folder to write the pipeline to.
        noise: Standard deviation of the noise on the latents, which are held near deviation 1.
        foreground: Weight of pixels that differ from their frame's median, those of a moving thing on a plain ground.
        optimizer: Optimizer of the parameters that train.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        decay: Learning rate after warm-up: ``constant``, or falling to zero at the last step, ``linear`` or ``cosine``.
    """

    def __init__(
        self,
        generator: str,
        out: str,
        noise: float = 0.2,
        foreground: float = 3.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.05,
        decay: Decay = "linear",
    ) -> None:
        super().__init__(optimizer, warmup, decay)
        self.save_hyperparameters(ignore=["optimizer"])
        self.generator = load_generator(generator)
        if "latents_mean" not in self.generator.vae.config:
            raise VideoAlignError(f"generator {generator}: only autoencoders of Wan's kind are trained here")
        if Path(out).resolve() == Path(generator).resolve():
            raise VideoAlignError(f"model.out is the generator to start from, {generator}; name another folder")
        self._hold = Hold()
        self.out, self.noise, self.foreground = Path(out), noise, foreground
        self.vae = self.generator.vae.requires_grad_(True).train()
        self._sums: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Refuse an output that is in the way before training begins."""
        self._hold.take(self.out)
        check_free(self.out, RECORD)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch of clips."""
        pixels = batch["videos"].transpose(1, 2).float() / 127.5 - 1  # (N, 3, T, H, W)
        latents = self.vae.encode(pixels).latent_dist.mode()  # (N, C, F, h, w)
        found = self.vae.decode(latents + self.noise * torch.randn_like(latents), return_dict=False)[0]
        ground = pixels.flatten(3).median(-1).values[..., None, None]  # (N, 3, T, 1, 1)
        weights = 1 + (self.foreground - 1) * ((pixels - ground).abs().amax(1, keepdim=True) > 0.15)
        error = (found - pixels).square()
        self.step_means.add("loss", (weights * error).mean())
        self.step_means.add("psnr", 10 * torch.log10(4 / error.detach().flatten(1).mean(1)))
        with torch.no_grad():  # latents are normalised with means over the last 50 steps
            rows = latents.transpose(0, 1).flatten(1)  # (C, numbers)
            self._sums = [*self._sums[-49:], torch.stack([rows.mean(1), rows.square().mean(1)])]
        return (weights * error).mean() + 1e-3 * latents.square().mean()

    def on_fit_end(self) -> None:
        """Write the pipeline."""
        if self._sums:  # empty where a finished run is taken up again
            mean, square = torch.stack(self._sums).mean(0)
            std = (square - mean**2).sqrt()
            self.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        if self.trainer.is_global_zero:
            require_finite(f"weights for {self.out}", self.vae.state_dict(), NOT_WRITTEN)
            with new_folder(self.out, replaces=RECORD) as out:
                self.generator.pipeline.save_pretrained(out)
        self._hold.drop()

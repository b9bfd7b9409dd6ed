"""Encode once: a predict run that writes videos and prompts as latents and embeddings."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import safetensors.torch
import torch
from torch import Tensor

from ..datamodules.latent_files import NULL, OF
from ..models.fingerprint import fingerprint
from ..models.finite import by_name, require_finite
from ..models.generator_folder import load_generator


class EncodeLatents(L.LightningModule):
    """Autoencoder and text encoder of a generator; after this, training needs neither.

    Run it by `videoalign predict` with :class:`~videoalign.datamodules.encode_list.EncodeList` and the callback
    :class:`~videoalign.callbacks.WriteParts`; see experiments/encode.

    Args:
        generator: Folder or hub id of a pipeline.
        dtype: Dtype of the text encoder.
        truncate: Cut prompts that are too long; otherwise they are refused.
        negative: Prompt that guidance steers away from; the empty prompt if not given.
        parts: Parts of the pipeline to load.
    """

    def __init__(
        self,
        generator: str,
        dtype: Literal["float32", "bfloat16"] = "float32",
        truncate: bool = False,
        negative: str = "",
        parts: Sequence[str] = ("vae", "text_encoder", "transformer"),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.generator = load_generator(generator, dtype, parts)
        self.truncate, self.negative = truncate, negative
        self._embedded: dict[str, Tensor] = {}

    def making(self) -> dict[str, Any]:
        """What embeddings depend on."""
        return {
            "text_encoder": fingerprint(self.generator.require("text_encoder")),
            "truncate": self.truncate,
            "negative": self.negative,
        }

    def embed(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings (L, E) on the CPU; the last few hundred prompts are remembered, pairs often share one."""
        if new := [p for p in dict.fromkeys(prompts) if p not in self._embedded]:
            if len(self._embedded) > 256:
                self._embedded.clear()
                new = list(dict.fromkeys(prompts))
            found = self.generator.encode_prompts(new, self.truncate)
            self._embedded |= {p: e.cpu() for p, e in zip(new, found)}
        return [self._embedded[p] for p in prompts]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[str, dict[str, bytes], dict]]:
        """Samples of a latents set."""
        if "videos" not in batch:
            return []
        datamodule = self.trainer.datamodule
        kind = getattr(torch, datamodule.precision)
        videos = batch["videos"]  # (N, S, T, 3, H, W)
        latents = self.generator.encode_video(videos.flatten(0, 1)).unflatten(0, videos.shape[:2]).to(kind).cpu()
        require_finite(
            f"the latents of videos in {datamodule.precision}",
            by_name(batch["keys"], latents),
            "look at the autoencoder's weights, or choose data.precision: float32",
        )
        samples = []
        for key, sides, prompt, record in zip(batch["keys"], latents, self.embed(batch["prompts"]), batch["records"]):
            tensors = dict(zip(OF[datamodule.kind], (side.contiguous() for side in sides))) | {
                "prompt": prompt.contiguous()
            }
            samples.append((key, {"safetensors": safetensors.torch.save(tensors)}, record))
        return samples

    def extra_files(self) -> dict[str, bytes]:
        """The embedding of no prompt."""
        (null,) = self.embed([self.negative])
        return {NULL: safetensors.torch.save({"prompt": null.contiguous()})}

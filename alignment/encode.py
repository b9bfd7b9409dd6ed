"""Encoding of videos, prompts and images, once: a predict run that writes latents and what they are conditioned on."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import safetensors.torch
import torch

from ..datamodules.contracts import EncodesVideos, require
from ..datamodules.latent_files import NULL, OF
from ..models.family import Encoded
from ..models.fingerprint import fingerprint
from ..models.finite import by_name, require_finite
from ..models.generator_folder import load_generator
from ..models.memory import Memory
from .text_first import embed_first


class EncodeLatents(L.LightningModule):
    """Encodes videos, prompts and images with a generator's autoencoder and encoders; training then needs none of them.

    Run it by `videoalign predict` with :class:`~videoalign.datamodules.encode_list.EncodeList` and the callback
    :class:`~videoalign.callbacks.WriteParts`; see experiments/encode.

    Args:
        generator: Folder or hub id of a diffusers pipeline.
        dtype: Dtype of the text encoder.
        truncate: Whether to cut prompts that are too long; otherwise they are refused.
        negative: Negative prompt of classifier-free guidance; the empty prompt if not given.
        parts: Names of the pipeline's components to load, such as ``vae``.
        family: Class of the generator's family, by import path (``package.module:Name``) or name; found by the
            pipeline's class if not given.
        memory: How the weights are held and computed: offloaded, in tiles, the text encoder in its own pass.
    """

    def __init__(
        self,
        generator: str,
        dtype: Literal["float32", "bfloat16"] = "float32",
        truncate: bool = False,
        negative: str = "",
        parts: Sequence[str] = ("vae", "text_encoder"),
        family: str | None = None,
        memory: Memory = Memory(),  # noqa: B008  frozen
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["memory"])
        self.memory = memory.for_encoding()
        self.generator = load_generator(generator, dtype, parts, family=family, memory=memory)
        self.truncate, self.negative = truncate, negative
        self._embedded: dict[str, Encoded] = {}

    def setup(self, stage: str) -> None:
        """Refuse a DataModule that gives no videos to encode; offload parts, and embed prompts where they are first."""
        if stage == "predict":
            self._set()
            self.memory.place(self.generator, self.trainer.strategy.root_device)
            if self.memory.text_first:
                self._embedded = embed_first(self, [self.negative], self.truncate)

    def _set(self) -> EncodesVideos:
        return require(self.trainer.datamodule, EncodesVideos, type(self).__name__)

    def making(self) -> dict[str, Any]:
        """Settings that the embeddings depend on, as plain values."""
        images = getattr(self.generator.pipeline, "image_encoder", None)
        return {
            **({"image_encoder": fingerprint(images)} if images is not None else {}),
            "text_encoder": fingerprint(self.generator.require("text_encoder")),
            "truncate": self.truncate,
            "negative": self.negative,
            **self.memory.made(),
        }

    def embed(self, prompts: Sequence[str]) -> list[Encoded]:
        """Encoded prompts, on the CPU; a few hundred are cached, because pairs often share a prompt."""
        if new := [p for p in dict.fromkeys(prompts) if p not in self._embedded]:
            if len(self._embedded) > 256:
                self._embedded.clear()
                new = list(dict.fromkeys(prompts))
            found = self.generator.encode_prompts(new, self.truncate)
            self._embedded |= {p: {name: tensor.cpu() for name, tensor in e.items()} for p, e in zip(new, found)}
        return [self._embedded[p] for p in prompts]

    def _images(self, batch: dict[str, Any], dtype: torch.dtype) -> list[Encoded]:
        """The batch's images, encoded, on the CPU; their latents in the dtype of the videos'. Empty without images."""
        if "images" not in batch:
            return [{}] * len(batch["keys"])
        found = self.generator.encode_images(batch["images"], batch["videos"].shape[2])
        return [{n: t.to("cpu", dtype if n == "image" else t.dtype) for n, t in e.items()} for e in found]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[str, dict[str, bytes], dict]]:
        """Encode a batch.

        Returns:
            Key, members and record of each sample of a *latents* set.
        """
        if "videos" not in batch:
            return []
        kind, precision = self._set().kind, self._set().precision
        videos = batch["videos"]  # (N, S, T, 3, H, W)
        latents = self.generator.encode_video(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
        latents = latents.to(getattr(torch, precision)).cpu()
        remedy = "look at the autoencoder's weights, or choose data.precision: float32"
        require_finite(f"the latents of videos in {precision}", by_name(batch["keys"], latents), remedy)
        prompts, images = self.embed(batch["prompts"]), self._images(batch, latents.dtype)
        by_key = {f"{k}, {name}": t for k, e in zip(batch["keys"], images) for name, t in e.items()}
        require_finite(f"the encoded images in {precision}", by_key, remedy)
        samples = []
        for key, sides, prompt, image, record in zip(batch["keys"], latents, prompts, images, batch["records"]):
            samples.append((key, {"safetensors": _dumped({**dict(zip(OF[kind], sides)), **prompt, **image})}, record))
        return samples

    def extra_files(self) -> dict[str, bytes]:
        """The file that holds the negative prompt, encoded."""
        return {NULL: _dumped(self.embed([self.negative])[0])}


def _dumped(tensors: Encoded) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})

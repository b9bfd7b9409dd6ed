"""Caption pre-training of miniature backbones: it stands in for the general knowledge of a pre-trained one."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from ...alignment.training import Decay, Training
from ...models.backbone import load_backbone
from ...models.files import check_free, new_folder
from ...models.finite import NOT_WRITTEN, require_finite
from ...models.frame_sampling import FrameSampling
from ...models.locks import Hold
from ...models.processor import RewardProcessor
from ...models.template import Template


class Captioning(Training):
    """Trains all of a video-language model to say what a clip shows and where, and whether a text describes it.

    The loss is the cross-entropy of the words that are true plus that of a "yes" or "no" behind true and wrong ones.
    On held-out clips ``val/describes`` is the share of wrong sentences behind which "yes" is less likely than behind
    the clip's true one, and ``val/answers`` the share of all sentences that are answered rightly.

    When training ends, it writes the model as a folder in transformers' format, a reward model's backbone.

    Args:
        backbone: Folder or hub id of the Qwen-VL model to start from.
        out: Folder to write the trained model to.
        sampling: Number and size of the frames that the model sees of a clip.
        optimizer: Optimizer of the parameters that train.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        decay: Learning rate after warm-up: ``constant``, or falling to zero at the last step, ``linear`` or ``cosine``.
    """

    def __init__(
        self,
        backbone: str,
        out: str,
        sampling: FrameSampling | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.05,
        decay: Decay = "cosine",
    ) -> None:
        super().__init__(optimizer, warmup, decay)
        self.save_hyperparameters(ignore=["optimizer"])
        self._hold = Hold()
        self.out = Path(out)
        self.processor = RewardProcessor(backbone, Template.load("plain"), sampling or FrameSampling())
        self.network = load_backbone(backbone).train()

    def setup(self, stage: str) -> None:
        """Refuse an output that is in the way before training begins."""
        self._hold.take(self.out)
        check_free(self.out, "config.json")

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, L, V) of the next token."""
        return self.network(
            input_ids=inputs["input_ids"],
            mm_token_type_ids=(inputs["input_ids"] == self.network.config.video_token_id) * 2,
            pixel_values_videos=self.processor.geometry.pixels(inputs["pixel_patches"]),
            video_grid_thw=inputs["video_grid_thw"],
            use_cache=False,
        ).logits

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch of clips with texts."""
        inputs = batch["inputs"]
        logits = self._logits(inputs)
        losses = {}
        for name in ("caption", "answer"):
            words = inputs["input_ids"][:, 1:].masked_fill(~inputs[f"{name}_mask"][:, 1:], -100)
            losses[name] = F.cross_entropy(logits[:, :-1].flatten(0, 1), words.flatten())
            self.step_means.add(f"loss/{name}", losses[name])
        return losses["caption"] + losses["answer"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Answers about held-out clips, each with its true sentence before the wrong ones."""
        if not batch["inputs"]:
            return
        before = batch["inputs"]["answer_mask"].int().argmax(1) - 1  # (rows,) where the answer is predicted
        logits = self._logits(batch["inputs"])
        logits = logits[torch.arange(len(before)), before]  # (rows, V)
        yes, no = self.processor.answers
        for margins in (logits[:, yes] - logits[:, no]).split(batch["texts"].tolist()):
            true, wrong = margins[:1], margins[1:]
            self.held_out_means.add("describes", (true > wrong).double())
            self.held_out_means.add("answers", torch.cat([true > 0, wrong < 0]).double())

    def on_fit_end(self) -> None:
        """Write the model with its tokenizer and preprocessing."""
        if self.trainer.is_global_zero:
            require_finite(f"weights for {self.out}", self.network.state_dict(), NOT_WRITTEN)
            with new_folder(self.out, replaces="config.json") as out:
                self.network.save_pretrained(out)
                self.processor.huggingface.save_pretrained(out)
        self._hold.drop()

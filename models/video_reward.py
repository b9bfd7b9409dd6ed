"""VideoReward: a video-language model that rates a video in three dimensions (VideoAlign, section 3.2).

Legend: B videos, L tokens, K reward tokens per video (3 separate or 1 shared), E the hidden size, D = 3 dimensions.
"""

import inspect
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import VideoAlignError
from .backbone import load_backbone
from .finite import NOT_WRITTEN, require_finite, require_weights
from .frame_sampling import FrameSampling
from .hub import at_commit, commit_of, resolved
from .lora import LoRA, add_lora
from .precision import cast_inputs, train_in_float32
from .processor import RewardProcessor
from .reward_folder import PARTS, RECORD, RewardFolder
from .reward_statistics import Statistics
from .reward_tokens import RewardHead, TokenRows
from .template import Template
from .token_positions import token_positions

_CHOICES = {
    "positions": ("mrope", "1d"),
    "head_rows": (3, 1),
    "language": ("lora", "full", "frozen"),
    "vision": ("full", "lora", "frozen"),
    "attention": ("sdpa", "eager", "flash_attention_2"),
    "dtype": ("float32", "bfloat16"),
}
"""Values that settings may have, to check records: YAML experiments are checked when they are parsed."""
_MERGERS = ("merger", "deepstack_merger_list")
"""Modules between the vision tower's patches and the language model's tokens; Qwen3-VL has several."""


class VideoReward(nn.Module):
    """Reward model that gives VQ, MQ and TA of videos for prompts, read at three special tokens.

    The backbone is an attribute, not a base class. A batch of pairs is one batch of 2B videos: A and B go through the
    network in one forward pass.

    Args:
        backbone: Folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model.
        template: Name of a shipped template (``rubrics``, ``plain``, ``shared``, ``plain_shared``) or a text file. The
            shared ones read all three rewards at one token, the paper's ablation. With ``_image`` behind their names
            they also show the image that an image-to-video sample begins with, beside the prompt: VQ and MQ do not see
            it.
        sampling: Number and size of the frames that the model sees.
        positions: ``mrope`` gives video tokens their time, row and column, as in the backbone's pre-training; ``1d``
            counts tokens, as the released VideoReward was trained.
        head_rows: Rows of the reward head: 3, one per dimension, or 1, shared by the three tokens (the released
            weights).
        language: Training of the language model: ``lora`` through adapters, ``full``, or ``frozen``.
        vision: Training of the vision tower: ``full``, ``lora`` through adapters, or ``frozen``.
        train_merger: Whether the merger between vision tower and language model trains (Qwen3-VL has one per depth).
        lora: Rank, alpha, dropout and targets of the adapters.
        attention: Attention implementation: ``sdpa``, ``eager`` or ``flash_attention_2``.
        dtype: Dtype of the backbone's frozen weights. Everything that trains is fp32: the head, the new embedding rows,
            adapters, and the whole of a part that trains in full.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory.
        max_prompt_tokens: Largest number of tokens of a prompt; longer prompts are refused.
        processor: Folder of the tokenizer and preprocessing, if not the backbone's.

    Raises:
        VideoAlignError: Where settings do not fit each other, or the backbone is missing, damaged or of another family.
    """

    record = RECORD
    """Name of the file that marks a folder as a reward model."""

    def __init__(
        self,
        backbone: str | Path,
        template: str | Path | Template = "rubrics",
        sampling: FrameSampling | None = None,
        positions: Literal["mrope", "1d"] = "mrope",
        head_rows: Literal[3, 1] = 3,
        language: Literal["lora", "full", "frozen"] = "lora",
        vision: Literal["full", "lora", "frozen"] = "full",
        train_merger: bool = True,
        lora: LoRA | None = None,
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        max_prompt_tokens: int = 4096,
        processor: str | Path | None = None,
    ) -> None:
        super().__init__()
        template = template if isinstance(template, Template) else Template.load(template)
        lora, sampling = lora or LoRA(), sampling or FrameSampling()
        self.settings = {
            "positions": positions,
            "head_rows": head_rows,
            "language": language,
            "vision": vision,
            "train_merger": train_merger,
            "lora": asdict(lora),
            "attention": attention,
            "dtype": dtype,
            "max_prompt_tokens": max_prompt_tokens,
        }
        _check_settings(self.settings, template)
        # absolute where it is a folder: the exported model must find it from anywhere
        self.backbone_name = str(Path(backbone).resolve()) if Path(backbone).is_dir() else str(backbone)
        self.positions, self.statistics = positions, Statistics()
        self.owns_backbone = False  # whether frozen tensors differ from those of the backbone's folder
        self.processor = RewardProcessor(processor or backbone, template, sampling, max_prompt_tokens)
        self.backbone = load_backbone(backbone, attention, dtype).model
        self.backbone_revision = commit_of(backbone)
        self.config = self.backbone.config
        self._check_geometry()
        tokens = self.backbone.get_input_embeddings()
        self.backbone.requires_grad_(False)
        self._choose_training(language, vision, train_merger, lora)
        self.backbone.set_input_embeddings(TokenRows(tokens, self.processor.reward_ids))
        self.head = RewardHead(tokens.embedding_dim, head_rows)
        if gradient_checkpointing:
            # transformers renames it in 5.23
            name = "activation_checkpointing_enable"
            enable = getattr(self.backbone, name, self.backbone.gradient_checkpointing_enable)
            enable({"use_reentrant": False})

    def _check_geometry(self) -> None:
        vision, geometry = self.config.vision_config, self.processor.geometry
        want = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        if want != (geometry.patch, geometry.temporal_patch, geometry.merge):
            raise VideoAlignError(
                f"{self.backbone_name}: the processor cuts patches of {geometry}, but the vision tower takes (patch, "
                f"temporal patch, merge) = {want}. The folder's preprocessor and config files do not belong together."
            )
        if self.config.video_token_id != self.processor.video_token:
            raise VideoAlignError(
                f"{self.backbone_name}: the tokenizer's video token is {self.processor.video_token}, but config.json "
                f"says {self.config.video_token_id}. The folder's tokenizer and config files do not belong together."
            )

    def _choose_training(self, language: str, vision: str, train_merger: bool, lora: LoRA) -> None:
        """Choose the parameters of the frozen backbone that train, and their precision; add adapters.

        Trained parameters are fp32, and frozen ones keep the chosen dtype. A part that trains in full is fp32 as a
        whole, its frozen layers included, so that no two layers inside it have different dtypes. Between the parts the
        backbone casts by itself, and before mergers that train beside a frozen tower :func:`.precision.cast_inputs`
        does.
        """
        parts = {"language_model": language, "visual": vision}
        for name, how in parts.items():
            if how == "full":
                self.backbone.get_submodule(name).requires_grad_(True)
        mergers = [f"visual.{n}" for n, _ in self.backbone.visual.named_children() if n in _MERGERS]
        for name in mergers:
            self.backbone.get_submodule(name).requires_grad_(train_merger)
        self.backbone.get_input_embeddings().requires_grad_(False)  # of the vocabulary, only the new rows train
        if adapted := [name for name, how in parts.items() if how == "lora"]:
            add_lora(self.backbone, lora, adapted, without=mergers)  # mergers train in full or not at all
        for name, how in parts.items():
            if how == "full":
                self.backbone.get_submodule(name).float()
        train_in_float32(self.backbone)
        if train_merger and vision != "full":
            for name in mergers:
                merger = self.backbone.get_submodule(name)
                for each in merger if isinstance(merger, nn.ModuleList) else [merger]:
                    cast_inputs(each)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.head.weight.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        reward_positions: Tensor,
        pixel_patches: Tensor,
        video_grid_thw: Tensor,
        image_patches: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Compute raw rewards.

        Args:
            input_ids: Token ids (B, L), padded on the right.
            attention_mask: Mask (B, L), 0 at padding.
            reward_positions: Positions (B, K) of the reward tokens in L.
            pixel_patches: Patches (P, 3 * t * p * p) of all videos, uint8.
            video_grid_thw: Number of patches (B, 3) in time, height and width.
            image_patches: Patches of all images, where the template shows them.
            image_grid_thw: Number of patches (B, 3) of each image.

        Returns:
            Rewards (B, D), fp32, with the columns VQ, MQ and TA.
        """
        # No mask is passed: padding is on the right, where causal attention keeps it from every real token.
        states = self.backbone(
            input_ids=input_ids,
            position_ids=self._position_ids(input_ids, attention_mask, video_grid_thw, image_grid_thw),
            pixel_values_videos=self.processor.geometry.pixels(pixel_patches),
            video_grid_thw=video_grid_thw,
            pixel_values=None if image_patches is None else self.processor.geometry.pixels(image_patches),
            image_grid_thw=image_grid_thw,
            use_cache=False,
        ).last_hidden_state  # (B, L, E)
        index = reward_positions[..., None].expand(-1, -1, states.shape[-1])
        return self.head(states.gather(1, index))  # (B, K, E) -> (B, D)

    def _position_ids(
        self, input_ids: Tensor, attention_mask: Tensor, grid: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """Time, row and column (3, B, L) of every token; all three are the token's number under ``1d``."""
        if self.positions == "1d":
            return torch.arange(input_ids.shape[1], device=input_ids.device).expand(3, *input_ids.shape)
        return token_positions(self.backbone, input_ids, attention_mask, grid, image)

    def normalise(self, rewards: Tensor) -> Tensor:
        """Z-scores of raw rewards (..., D) by the stored statistics; their sum is the overall reward (App. H.2)."""
        mean = torch.tensor(self.statistics.mean, device=rewards.device, dtype=rewards.dtype)
        return (rewards - mean) / torch.tensor(self.statistics.std, device=rewards.device, dtype=rewards.dtype)

    @property
    def has_statistics(self) -> bool:
        """Whether mean and deviation of the rewards were measured; without them normalised rewards are the raw ones."""
        return self.statistics != Statistics()

    def need_statistics(self, where: str) -> None:
        """Refuse a model without statistics, before its dimensions are weighed against each other.

        Args:
            where: Folder of the model, for the message.

        Raises:
            VideoAlignError: Where the rewards were never measured on held-out pairs.
        """
        if not self.has_statistics:
            raise VideoAlignError(
                f"{where} has no statistics of its rewards, so its dimensions cannot be weighed against each other; "
                "train or validate it with held-out pairs (data.val), or use a folder with inference_config"
            )

    # --- folders ----------------------------------------------------------------------------------------------

    def trained_names(self) -> list[str]:
        """Names of the parameters that train, as in ``state_dict``."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def save_pretrained(
        self, folder: str | Path, state: dict[str, Tensor] | None = None, backbone: bool = False
    ) -> None:
        """Write a folder for :meth:`from_pretrained`. It replaces an earlier reward model of that name.

        Args:
            folder: Folder to write.
            state: Full tensors by name, where the network's own are sharded.
            backbone: Whether the backbone is copied into the folder, so that the folder is complete by itself. A
                backbone that exists nowhere else is always copied.

        Raises:
            VideoAlignError: Where a weight is not finite; nothing is written then.
        """
        state = self.state_dict() if state is None else state
        backbone = backbone or self.owns_backbone
        content = RewardFolder(
            settings=self.settings,
            sampling=self.processor.sampling.to_dict(),
            statistics=asdict(self.statistics.exported(folder)),
            template=self.processor.template.text,
            backbone=None if backbone else self.backbone_name,
            owns_backbone=self.owns_backbone,
            trained={name: state[name].detach().cpu().contiguous() for name in self.trained_names()},
            backbone_revision=None if backbone else self.backbone_revision,
        )
        require_finite(f"weights for {folder}", content.trained, NOT_WRITTEN)
        copy = self._own_backbone(state) if backbone else None
        content.save(Path(folder), self.processor.huggingface, getattr(self.backbone, "peft_lora_config", None), copy)

    def _own_backbone(self, state: dict[str, Tensor]) -> nn.Module:
        """Make a model of the backbone by itself, with the frozen tensors of this network."""
        name = at_commit(self.backbone_name, self.backbone_revision)
        model = load_backbone(name, dtype=self.settings["dtype"])
        trained = set(self.trained_names())
        frozen = {
            re.sub(r"\.base(_layer)?\.", ".", name.removeprefix("backbone.")): tensor.detach().cpu()
            for name, tensor in state.items()
            if name.startswith("backbone.") and name not in trained
        }
        # trained tensors are in the folder's other files
        if unknown := model.model.load_state_dict(frozen, strict=False).unexpected_keys:
            raise RuntimeError(f"the backbone of {self.backbone_name} has no {unknown[:3]}")
        require_finite("weights of the backbone", model.state_dict(), NOT_WRITTEN)
        return model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        backbone: str | Path | None = None,
        attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        gradient_checkpointing: bool = False,
    ) -> "VideoReward":
        """Load a folder written by :meth:`save_pretrained`, in eval mode. Every tensor is accounted for.

        In a YAML experiment ``class_path: videoalign.models.VideoReward.from_pretrained`` continues from its weights.

        Args:
            folder: Folder or hub id to load.
            backbone: Folder or hub id of the backbone, if it is not where the folder says.
            attention: Attention implementation: ``sdpa``, ``eager`` or ``flash_attention_2``. By default ``sdpa``,
                whatever it was trained with, because FlashAttention does not compute in fp32, as scores are.
            dtype: Dtype of the frozen weights; the folder's if not given.
            gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory.

        Raises:
            VideoAlignError: Where a file is missing or not the one that was exported, or a tensor is missing,
                unexpected, misshapen or not finite.
        """
        folder = resolved(folder, "folder of a reward model", parts=PARTS)
        content = RewardFolder.load(folder)
        if backbone and content.owns_backbone:
            raise VideoAlignError(
                f"{folder} stands on the backbone inside it, which is nowhere else; leave --backbone out"
            )
        try:
            sampling, statistics = FrameSampling(**content.sampling), Statistics(**content.statistics)
            settings = {**content.settings, "lora": LoRA(**content.settings["lora"])}
            settings |= {"attention": attention or "sdpa"} | ({"dtype": dtype} if dtype else {})
            inspect.signature(cls).bind(backbone, **settings)
        except (TypeError, KeyError) as error:
            raise VideoAlignError(f"{folder / RECORD} has settings that this release does not know ({error})") from None
        template = Template(content.template, str(folder / "template.txt"))
        settings |= {"processor": folder / "processor", "gradient_checkpointing": gradient_checkpointing}
        recorded = at_commit(content.backbone, content.backbone_revision)
        network = cls(backbone or recorded, template, sampling, **settings)
        if not backbone and content.backbone_revision:
            network.backbone_name = content.backbone  # as it was named, without the commit
        network.load_tensors(content.trained, folder)
        network.statistics = statistics.check(str(folder / RECORD))
        network.owns_backbone = content.owns_backbone
        return network.eval()

    def load_tensors(self, found: dict[str, Tensor], source: Path, names: set[str] | None = None) -> None:
        """Copy tensors into parameters. Each tensor must have a parameter, and each parameter a tensor.

        Frozen parameters are the backbone's. If the tensors differ from them, the network's backbone exists nowhere
        else, and :meth:`save_pretrained` copies it.

        Args:
            found: Tensors by name.
            source: File or folder that holds them, for messages.
            names: Names of the parameters to load; those that train if not given.

        Raises:
            VideoAlignError: Where a tensor is missing, unexpected, misshapen or not finite.
        """
        parameters = dict(self.named_parameters())
        want = {name: parameters[name] for name in (self.trained_names() if names is None else names)}
        problems = [f"missing {n}" for n in want.keys() - found.keys()]
        problems += [f"unexpected {n}" for n in found.keys() - want.keys()]
        problems += [
            f"{n} is {tuple(found[n].shape)}, not {tuple(want[n].shape)}"
            for n in want.keys() & found.keys()
            if found[n].shape != want[n].shape
        ]
        if problems:
            raise VideoAlignError(
                f"{source}: {len(problems)} tensors do not fit backbone {self.backbone_name}: "
                f"{'; '.join(sorted(problems)[:10])}. Was it trained on another backbone? Name the right one with "
                "--backbone."
            )
        require_weights(str(source), found, "export an earlier checkpoint, or download it again")
        chosen = getattr(torch, self.settings["dtype"])
        with torch.no_grad():
            for name, parameter in want.items():
                # a frozen tensor inside a part that is fp32 as a whole still has values of the chosen dtype
                value = found[name] if parameter.requires_grad else found[name].to(chosen)
                value = value.to(parameter.dtype)
                self.owns_backbone |= not parameter.requires_grad and not torch.equal(parameter, value)
                parameter.copy_(value)


def _check_settings(settings: dict[str, Any], template: Template) -> None:
    """Refuse settings that are unknown, or that do not fit the template."""
    given = {name: settings[name] for name in _CHOICES}
    wrong = [
        f"{name}: {value!r} is none of {_CHOICES[name]}" for name, value in given.items() if value not in _CHOICES[name]
    ]
    if wrong:
        raise VideoAlignError(f"the reward model's settings are not known: {'; '.join(wrong)}")
    if settings["head_rows"] == 1 and not template.separate:
        raise VideoAlignError("head_rows: 1 needs separate reward tokens: one row at one token gives one reward")

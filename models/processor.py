"""Conversion of frames and prompts to the inputs of :class:`~videoalign.models.video_reward.VideoReward`.

Legend: B videos, T frames, H and W pixels, L tokens, P patches over all videos, K reward tokens per video (3 or 1).
This runs in the data loader's workers, without any network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen3VLProcessor

from .. import VideoAlignError
from .backbone import FILES, PROCESSOR_FILES
from .files import check_readable
from .frame_sampling import FRAME_FACTOR, FrameSampling
from .hub import resolved
from .reward_folder import PARTS, RewardFolder
from .template import Template


@dataclass(frozen=True)
class VisionGeometry:
    """Patch sizes of the vision tower and the normalisation of its input.

    Attributes:
        patch: Height and width of a patch, in pixels.
        temporal_patch: Number of frames in a patch.
        merge: Number of patches, along each side, that become one token.
        mean: Mean of each colour, for pixels in [0, 1].
        std: Standard deviation of each colour, for pixels in [0, 1].
    """

    patch: int
    temporal_patch: int
    merge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, patches: Tensor) -> Tensor:
        """Normalise patches (P, 3*t*p*p) from uint8 to fp32, as the tower takes them."""
        mean, std = torch.tensor([self.mean, self.std], device=patches.device)[..., None]  # (3, 1) each
        return ((patches.unflatten(-1, (len(self.mean), -1)) / 255 - mean) / std).flatten(1)


class RewardProcessor:
    """Tokenises prompts into the template and cuts frames into patches.

    Args:
        backbone: Folder or hub id with a Qwen2-VL-like processor.
        template: Text around the video.
        sampling: Settings of the frames, which Qwen3-VL's time stamps depend on.
        max_prompt_tokens: Largest number of tokens of a prompt; longer prompts are refused, not cut.

    Raises:
        VideoAlignError: Where there is no such processor, or it does not fit the settings of the frames.
    """

    def __init__(
        self, backbone: str | Path, template: Template, sampling: FrameSampling, max_prompt_tokens: int = 4096
    ) -> None:
        self.template, self.sampling, self.max_prompt_tokens = template, sampling, max_prompt_tokens
        folder = resolved(backbone, "folder of a backbone", parts=FILES, now=PROCESSOR_FILES)
        check_readable(folder)
        try:
            self.huggingface = AutoProcessor.from_pretrained(folder)
            video = self.huggingface.video_processor
        except (OSError, ValueError, AttributeError, KeyError) as error:
            why = str(error).splitlines()[0][:200]
            raise VideoAlignError(
                f"{backbone}: no processor of a Qwen2-VL-like video-language model could be loaded from it ({why}). "
                "Name a model folder with tokenizer and preprocessor files, or a hub id."
            ) from None
        self.tokenizer = self.huggingface.tokenizer
        self.geometry = self._geometry(video)
        if template.image and self._geometry(self.huggingface.image_processor) != self.geometry:
            raise VideoAlignError(
                f"{backbone}: its preprocessing cuts or normalises images otherwise than videos, so template "
                f"{template.name!r} cannot show an image"
            )
        if FRAME_FACTOR % self.geometry.temporal_patch:
            raise VideoAlignError(
                f"{backbone}: a temporal patch of {self.geometry.temporal_patch} frames is not supported"
            )
        # Qwen3-VL has a time stamp before the tokens of each temporal patch; the others have one block of tokens
        self.stamped = isinstance(self.huggingface, Qwen3VLProcessor)
        if self.stamped and sampling.fps is None:
            raise VideoAlignError(
                f"{backbone} reads the time of each frame, which sampling by number (sampling.num_frames) does not "
                "fix; sample by rate (sampling.fps)"
            )
        self._ids()

    @staticmethod
    def _geometry(processor) -> VisionGeometry:
        """How a processor of transformers, of videos or images, cuts and normalises."""
        sizes = (processor.patch_size, processor.temporal_patch_size, processor.merge_size)
        return VisionGeometry(*sizes, tuple(processor.image_mean), tuple(processor.image_std))

    def _ids(self) -> None:
        """Give the reward tokens ids after the tokenizer's own, and tokenise the fixed text once."""
        taken = [t for t in self.template.tokens if t in self.tokenizer.get_vocab()]
        first = len(self.tokenizer)
        # These ids are no tokens of the tokenizer, so that no prompt text can produce one. A tokenizer that has the
        # tokens already (the released model's) keeps its ids, and prompts are tokenised with special tokens split.
        known = self.tokenizer.convert_tokens_to_ids
        self.reward_ids = [known(t) if t in taken else first + i for i, t in enumerate(self.template.tokens)]
        visual = known(["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
        self.video_token, self.image_token, *self._ends = visual
        # of "yes" and "no" behind a text
        self.answers = tuple(self._encode(word)[0] for word in (" yes", " no"))
        named = dict(zip((m for m in self.template.parts if m.startswith("<reward:")), self.reward_ids))
        self._pieces: list[list[int] | str] = []
        for part in self._chat():
            if part in ("<video>", "<image>") or "<prompt>" in part:
                self._pieces.append(part)
            else:
                self._pieces.append([named[part]] if part in named else self._encode(part))

    def _chat(self) -> list[str]:
        """The template as one user turn of Qwen's chat format, cut at video, image and reward tokens only.

        Text around ``<prompt>`` stays in one piece: a word's token depends on the space before it.
        """
        parts = ["<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"]
        text = ""
        for part in [*self.template.parts, None]:
            if part is None or (part.startswith("<") and part != "<prompt>" and part in self.template.marks):
                parts += [text] if text else []
                parts += [] if part is None else [part]
                text = ""
            else:
                text += part
        return [*parts, "<|im_end|>\n<|im_start|>assistant\n"]

    def _encode(self, text: str, plain: bool = False) -> list[int]:
        """Token ids of a text; ``plain`` spells out names of special tokens instead of recognising them."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)

    @property
    def factor(self) -> int:
        """Number of pixels that the sides of frames are multiples of."""
        return self.geometry.patch * self.geometry.merge

    def prompt_ids(self, prompt: str, around: str = "<prompt>") -> list[int]:
        """Token ids of a prompt within the text around it. Names of special tokens in the prompt are plain text.

        Args:
            prompt: Text of the prompt.
            around: Text that holds ``<prompt>`` once.

        Raises:
            VideoAlignError: Where the prompt is longer than ``max_prompt_tokens``.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise VideoAlignError(f"prompt {prompt[:40]!r} holds half a character, which no tokenizer takes") from None
        count = len(self._encode(prompt, plain=True))
        if count > self.max_prompt_tokens:
            raise VideoAlignError(f"prompt {prompt[:40]!r}... has {count} tokens, more than {self.max_prompt_tokens}")
        return self._encode(around.replace("<prompt>", prompt), plain=True)

    def __call__(
        self, videos: Sequence[Tensor], prompts: Sequence[str], images: Sequence[Tensor | None] = ()
    ) -> dict[str, Tensor]:
        """Make a batch of the network's inputs.

        Args:
            videos: B videos (T, 3, H, W), uint8, sampled and resized: T even, H and W multiples of :attr:`factor`.
            prompts: B prompts.
            images: B images (3, H, W), uint8, resized as the frames are; a template that does not show them leaves
                them out.

        Returns:
            ``input_ids`` (B, L) padded on the right, ``attention_mask`` (B, L), ``reward_positions`` (B, K),
            ``pixel_patches`` (P, 3 * temporal patch * patch * patch), uint8, and ``video_grid_thw`` (B, 3) in patches;
            with images also ``image_patches`` and ``image_grid_thw``, alike.

        Raises:
            VideoAlignError: Where the template shows images, and a video has none.
        """
        patches, grids = zip(*(self.patchify(video) for video in videos))
        if not self.template.image:
            pictures, rows = {}, [self._row(prompt, grid) for prompt, grid in zip(prompts, grids)]
        else:
            if len(images) < len(videos) or any(image is None for image in images):
                raise VideoAlignError(
                    f"template {self.template.name!r} shows the image that a video begins with, and these videos have "
                    "none; use a set with images, or a reward model whose template has no <image>"
                )
            # an image is a video of one temporal patch, whose frames are equal
            shown, shapes = zip(*(self.patchify(i.expand(self.geometry.temporal_patch, -1, -1, -1)) for i in images))
            pictures = {"image_patches": torch.cat(shown), "image_grid_thw": torch.tensor(shapes)}
            rows = [self._row(*given) for given in zip(prompts, grids, shapes)]
        return {
            **pictures,
            **self._padded(rows),
            "reward_positions": torch.tensor([[row.index(i) for i in self.reward_ids] for row in rows]),  # (B, K)
            "pixel_patches": torch.cat(patches),
            "video_grid_thw": torch.tensor(grids),
        }

    def captions(
        self, videos: Sequence[Tensor], texts: Sequence[Sequence[tuple[str, bool | None]]]
    ) -> dict[str, Tensor]:
        """Make a batch for language modelling, of videos with texts that describe them or do not.

        Args:
            videos: B videos (T, 3, H, W), uint8, sampled and resized.
            texts: Pieces of the text of each video, in their order, and what is asked after a piece: True is answered
                by "yes", False by "no", and None is no question.

        Returns:
            The entries of :meth:`__call__`, with two masks (B, L) in place of ``reward_positions``: ``caption_mask``,
            True at the words of pieces that are not false, and ``answer_mask``, True at each "yes" or "no".
        """
        if self.template.image:
            raise VideoAlignError(f"template {self.template.name!r} shows images, which captions do not have")
        patches, grids = zip(*(self.patchify(video) for video in videos))
        rows, masks = [], {"caption_mask": [], "answer_mask": []}
        for pieces, grid in zip(texts, grids):
            # the reward template without its reward tokens: words are learned at the places of their later use
            before, words, after = self._cut(pieces, grid)
            rows.append([*before, *(token for token, _, _ in words), *after])
            for place, mask in enumerate(masks.values(), 1):
                mask.append([False] * len(before) + [bool(word[place]) for word in words])
        batch = self._padded(rows)
        length = batch["input_ids"].shape[1]
        for name, mask in masks.items():
            batch[name] = torch.tensor([row + [False] * (length - len(row)) for row in mask])
        return {**batch, "pixel_patches": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}

    def _cut(
        self, pieces: Sequence[tuple[str, bool | None]], grid: tuple[int, int, int]
    ) -> tuple[list[int], list[tuple[int, bool, bool]], list[int]]:
        """Token ids before a prompt, those in its place with whether they are told and answered, and those behind."""
        parts: list[list[int]] = [[]]
        gap = ""
        for piece in self._pieces:
            if piece == "<video>":
                parts[-1] += self._video(grid)
            elif isinstance(piece, str):
                before, after = piece.split("<prompt>")
                parts[-1] += self._encode(before.rstrip(" "))
                gap = before[len(before.rstrip(" ")) :]  # a word's token depends on the space before it
                parts.append(self._encode(after))
            elif not set(piece) & set(self.reward_ids):
                parts[-1] += piece
        words = []
        for text, true in [(gap + pieces[0][0], pieces[0][1]), *pieces[1:]]:
            words += [(token, true is not False, False) for token in self._encode(text, plain=True)]
            if true is not None:
                words.append((self.answers[not true], False, True))
        return parts[0], words, parts[1]

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Pad rows of token ids on the right, to ``input_ids`` and ``attention_mask`` (B, L)."""
        length, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        lengths = torch.tensor([len(row) for row in rows])
        return {
            "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        }

    def _video(self, grid: tuple[int, int, int]) -> list[int]:
        """Token ids of a video: one block, or one block per temporal patch after the time of its middle."""
        start, end = self._ends
        frames, per_frame = grid[0], grid[1] * grid[2] // self.geometry.merge**2
        if not self.stamped:
            return [start, *[self.video_token] * (frames * per_frame), end]
        row, step = [], self.geometry.temporal_patch / self.sampling.fps
        for number in range(frames):
            seconds = number * step + (step - 1 / self.sampling.fps) / 2
            row += [*self._encode(f"<{seconds:.1f} seconds>"), start, *[self.video_token] * per_frame, end]
        return row

    def _row(self, prompt: str, grid: tuple[int, int, int], image: tuple[int, int, int] | None = None) -> list[int]:
        row: list[int] = []
        for piece in self._pieces:
            if piece == "<video>":
                row += self._video(grid)
            elif piece == "<image>":
                start, end = self._ends
                row += [start, *[self.image_token] * (image[1] * image[2] // self.geometry.merge**2), end]
            else:
                row += self.prompt_ids(prompt, piece) if isinstance(piece, str) else piece
        return row

    def patchify(self, video: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Cut a video into patches, in the vision tower's order: windows row by row, patches in a window row by row.

        Args:
            video: Frames (T, 3, H, W), uint8.

        Returns:
            Patches (T/t * H/p * W/p, 3*t*p*p), uint8, and their grid (T/t, H/p, W/p), with t frames and p x p pixels in
            a patch.

        Raises:
            VideoAlignError: Where the video does not divide into patches.
        """
        g = self.geometry
        frames, channels, height, width = video.shape
        t, h, w = frames // g.temporal_patch, height // g.patch, width // g.patch
        if (t * g.temporal_patch, h // g.merge * self.factor, w // g.merge * self.factor) != (frames, height, width):
            raise VideoAlignError(
                f"a video of {frames} frames of {height}x{width} pixels does not divide into patches of "
                f"{g.temporal_patch} frames and {self.factor}x{self.factor} pixels"
            )
        # t tp c h m p w m p -> t h w m m c tp p p
        x = video.reshape(t, g.temporal_patch, channels, h // g.merge, g.merge, g.patch, w // g.merge, g.merge, g.patch)
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)


def processor_of(folder: str | Path) -> RewardProcessor:
    """Load the processor of an exported reward model, without its network.

    Args:
        folder: Folder or hub id of the reward model.

    Raises:
        VideoAlignError: Where it is no such folder, or is damaged.
    """
    folder = resolved(folder, "folder of a reward model", parts=PARTS)
    content = RewardFolder.load(folder)
    template = Template(content.template, str(folder / "template.txt"))
    return RewardProcessor(folder / "processor", template, FrameSampling(**content.sampling))

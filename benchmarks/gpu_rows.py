"""The rows of the GPU benchmark, the most important first; nothing here needs torch.

A row is a function of one of the modules beside this one, and its arguments. The function gets the place of models and
sets too, and returns times, operations and memory as plain values.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Clip:
    """Size of a generator's videos.

    Attributes:
        frames: Number of frames.
        height: Height in pixels.
        width: Width in pixels.
    """

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Released:
    """A released generator.

    Attributes:
        name: Hub id.
        clip: Size that its recipe trains on.
        family: Name of the miniature of its kind.
    """

    name: str
    clip: Clip
    family: str


GENERATORS = {
    "wan": Released("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", Clip(81, 480, 832), "wan"),
    "wan22_5b": Released("Wan-AI/Wan2.2-TI2V-5B-Diffusers", Clip(121, 704, 1280), "wan22-5b"),
}
TINY = Clip(5, 32, 32)
"""Size of the miniatures' videos."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: Short name, by which it is chosen and recorded.
        title: What is measured, in words.
        function: Module and function, as in ``gpu_training:flow``.
        given: Arguments of the function beside the place.
        needs: Row that must have run before, if any.
    """

    name: str
    title: str
    function: str
    given: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None

    @property
    def alone(self) -> bool:
        """Whether later rows need a new process: diffusers' attention backend and the compiler are of a process."""
        return bool({COMPILED, CUDNN} & set(self.given.get("options", ())))

    def plan(self, folder: Path, toy: bool) -> list[str] | None:
        """Arguments of `videoalign plan` that count the row's step; None where plan counts no such step.

        Args:
            folder: Folder of models and sets.
            toy: Whether they are miniatures.
        """
        if self.function != "gpu_training:flow":
            return None
        name = self.given["generator"]
        clip, place = clip_of(name, toy, self.given.get("frames")), folder / name if toy else GENERATORS[name].name
        files = [word for recipe in self.given["recipes"] for word in ("--config", f"experiments/{recipe}.yaml")]
        size = ["--num-frames", str(clip.frames), "--height", str(clip.height), "--width", str(clip.width)]
        kept = [o for o in self.given.get("options", ()) if o not in (KEPT, COMPILED) and "attention" not in o]
        return [*files, f"--model.generator={place}", *kept, *size]


def clip_of(generator: str, toy: bool, frames: int | None = None) -> Clip:
    """Size of a generator's videos.

    Args:
        generator: One of :data:`GENERATORS`.
        toy: Whether it is a miniature.
        frames: Number of frames, if it is not the recipe's.
    """
    own = GENERATORS[generator].clip
    return TINY if toy else Clip(frames or own.frames, own.height, own.width)


ATTENTION = "--model.gradient_checkpointing=attention"
KEPT, COMPILED = "--model.gradient_checkpointing=false", "--model.compile=true"
BF16, CUDNN = "--model.dtype=bfloat16", "--model.memory.attention=_native_cudnn"
REWARD_BF16, REWARD_KEPT = "--model.network.dtype=bfloat16", "--model.network.gradient_checkpointing=false"
SHORT = 25
"""Frames of a clip whose DPO step fits an 80 GB card without checkpointing."""


def _flow(name: str, title: str, *options: str, recipes: str = "dpo", needs: str | None = None, **given: Any) -> Row:
    """A row that trains a generator."""
    files = {
        "sft": ["flow/wan_sft"],
        "dpo": ["flow/wan_sft", "flow/wan_dpo"],
        "5b": ["flow/wan_sft", "flow/wan_dpo", "flow/wan22_5b"],
    }[recipes]
    given = {"recipes": files, "generator": "wan", "options": list(options), **given}
    return Row(name, title, "gpu_training:flow", given, needs)


def _reward(name: str, title: str, *options: str) -> Row:
    """A row that trains the reward model."""
    given = {"recipes": ["videoreward/qwen2vl_2b"], "options": list(options)}
    return Row(name, f"reward training, Qwen2-VL-2B, {title}", "gpu_training:reward", given)


def _policy(name: str, title: str, *recipes: str) -> Row:
    """A row that trains on own samples."""
    given = {"recipes": ["flow/wan_on_policy", *recipes], "generator": "wan"}
    return Row(name, f"{title}, Wan2.1-1.3B, 33 frames of 240 x 416", "gpu_policies:policy", given)


def _sample(name: str, title: str, **given: Any) -> Row:
    """A row that samples."""
    return Row(name, f"sampling, Wan2.1-1.3B, {title}", "gpu_inference:sampling", {"generator": "wan", **given})


DPO = "Flow-DPO, Wan2.1-1.3B"
ROWS = (
    _flow("dpo", f"{DPO}, the recipe", batches=7, trace=True),
    _reward("reward", "the recipe"),
    _sample("sample_cfg", "CFG", cfg_scale=5.0),
    _sample("sample_plain", "no guidance"),
    _sample("sample_nrg", "CFG and Flow-NRG in each step", cfg_scale=5.0, blocks=8, steps=6),
    _flow("dpo_5b", "Flow-DPO, Wan2.2-5B, the recipe", recipes="5b", generator="wan22_5b"),
    Row("encode", "encoding, Wan2.1's autoencoder, the recipe", "gpu_training:encode", {"generator": "wan"}),
    _reward("reward_kept", "no checkpointing", REWARD_KEPT),
    _reward("reward_bf16", "frozen bf16", REWARD_BF16),
    _reward("reward_bf16_kept", "frozen bf16, no checkpointing", REWARD_BF16, REWARD_KEPT),
    _flow("dpo_bf16", f"{DPO}, frozen bf16", BF16),
    _flow("dpo_bf16_cudnn", f"{DPO}, frozen bf16, cuDNN attention", BF16, CUDNN),
    _flow("sft", "Flow-SFT, Wan2.1-1.3B, the recipe", recipes="sft"),
    Row("score_bf16", "scoring, Qwen2-VL-2B, bf16", "gpu_inference:score", {"dtype": "bfloat16"}),
    Row("score", "scoring, Qwen2-VL-2B, fp32", "gpu_inference:score", {"dtype": "float32"}),
    Row("reference", "reference errors, Wan2.1-1.3B, the recipe", "gpu_training:reference", {"generator": "wan"}),
    _flow("dpo_cached", f"{DPO}, reference cached", cached=True, needs="reference"),
    _flow("dpo_attention", f"{DPO}, frozen bf16, attention kept", BF16, ATTENTION),
    _policy("nft", "DiffusionNFT", "flow/wan_nft"),
    _policy("grpo", "Flow-GRPO-Fast", "flow/wan_grpo", "flow/wan_grpo_fast"),
    _flow("dpo_compile", f"{DPO}, frozen bf16, compiled", BF16, COMPILED),
    _reward("reward_compile", "frozen bf16, no checkpointing, compiled", REWARD_BF16, REWARD_KEPT, COMPILED),
    _flow("dpo_short", f"{DPO}, {SHORT} frames, frozen bf16", BF16, frames=SHORT),
    _flow("dpo_short_kept", f"{DPO}, {SHORT} frames, frozen bf16, no checkpointing", BF16, KEPT, frames=SHORT),
    _reward("reward_eager", "eager attention", "--model.network.attention=eager"),
    _reward("reward_flash2", "FlashAttention 2", "--model.network.attention=flash_attention_2"),
    _flow("sft_kept", "Flow-SFT, Wan2.1-1.3B, no checkpointing", KEPT, recipes="sft"),
)

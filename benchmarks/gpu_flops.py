"""Floating-point operations that a model needs for a step, by part, as utilisation counts them.

A linear layer of N weights costs 2 N operations a token in a forward pass, and attention 4 L^2 E a sample and layer (L
tokens of width E; half of it where it is causal). The backward pass costs as much again for the gradient of the input,
and as much again for that of the weights where they train. So a part counts

- 1 forward pass where nothing is differentiated,
- 2 where its weights are frozen and a gradient goes through it (4 N a token),
- 3 where its weights train (6 N a token), and for attention, which has two inputs to every product.

What checkpointing computes again is no work that the model needs: it is counted apart. Norms, activations, positions
and the optimizer are left out, as always.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

CAUSAL = 0.5
"""Share of the products that causal attention needs."""


@dataclass(frozen=True)
class Part:
    """Operations of one part of a step.

    Attributes:
        what: What the part is.
        forward: Operations of one forward pass.
        passes: Number of such passes that forward and backward pass are worth, 1, 2 or 3.
        again: Whether checkpointing computes its forward pass a second time.
    """

    what: str
    forward: float
    passes: int = 1
    again: bool = False

    @property
    def needed(self) -> float:
        """Operations that the model needs."""
        return self.forward * self.passes

    @property
    def executed(self) -> float:
        """Operations that are executed, with what checkpointing repeats."""
        return self.forward * (self.passes + self.again)


def summary(parts: list[Part]) -> dict[str, Any]:
    """Sums and parts as plain values.

    Args:
        parts: Parts of a step.
    """
    return {
        "needed": sum(part.needed for part in parts),
        "executed": sum(part.executed for part in parts),
        "parts": [asdict(part) for part in parts],
    }


def _weights(module: nn.Module) -> dict[str, int]:
    """Number of weights of every layer that is a matrix product, by name."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv3d)}
    return {name: layer.weight.numel() for name, layer in layers.items()}


def _linear(weights: dict[str, int], tokens: dict[str, int]) -> tuple[float, float]:
    """Operations of linear layers in a forward pass: of the network's own, and of adapters.

    Args:
        weights: Number of weights by the layer's name.
        tokens: Number of tokens of layers whose names hold a word, by that word; the first one that fits counts.
    """
    sums = {False: 0.0, True: 0.0}
    for name, count in weights.items():
        sums[".lora_" in name] += 2 * count * next(number for word, number in tokens.items() if word in name)
    return sums[False], sums[True]


# --- generators ---------------------------------------------------------------------------------------------------


def wan_tokens(net: nn.Module, shape: tuple[int, ...]) -> int:
    """Number of tokens of a video.

    Args:
        net: Wan's transformer.
        shape: Shape (C, F, H, W) of its latents.
    """
    frames, rows, columns = (size // patch for size, patch in zip(shape[1:], net.config.patch_size))
    return frames * rows * columns


def wan(net: nn.Module, shape: tuple[int, ...], text: int, videos: int, blocks: int | None = None) -> dict[str, float]:
    """Operations of a forward pass of Wan's transformer: of its own weights, of adapters, and of attention.

    Args:
        net: The transformer, with or without adapters.
        shape: Shape (C, F, H, W) of a video's latents.
        text: Number of tokens that prompts are padded to.
        videos: Number of videos.
        blocks: Number of blocks that are computed; all of them if not given.
    """
    own = wan_tokens(net, shape)
    blocks = blocks or net.config.num_layers
    width = net.config.num_attention_heads * net.config.attention_head_dim
    places = {".attn2.to_k": text, ".attn2.to_v": text, "text_embedder": text, "time_": 1, "": own}
    weights, adapters = _linear(_weights(net), places)
    attention = 4 * blocks * width * (own * own + own * text)
    return {"weights": weights * videos, "adapters": adapters * videos, "attention": float(attention * videos)}


def flow_parts(
    module: Any, shape: tuple[int, ...], videos: int, live: bool, again: bool, kept: bool = False
) -> list[Part]:
    """Parts of a training step of a generator's adapters.

    Args:
        module: A :class:`~videoalign.alignment.FlowSFT`, with adapters.
        shape: Shape (C, F, H, W) of a video's latents.
        videos: Number of videos that go through the transformer.
        live: Whether the reference's errors are computed in the step.
        again: Whether activations are computed again in the backward pass.
        kept: Whether attention is left out of that.
    """
    one = wan(module.policy, shape, module.generator.max_tokens, videos)
    parts = [
        Part("policy: frozen weights", one["weights"], 2, again),
        Part("policy: adapters", one["adapters"], 3, again),
        Part("policy: attention", one["attention"], 3, again and not kept),
    ]
    if live:
        parts.append(Part("reference: forward pass", one["weights"] + one["attention"]))
    return parts


# --- reward model -------------------------------------------------------------------------------------------------


def reward_parts(network: nn.Module, inputs: dict[str, Tensor], training: bool, again: bool) -> list[Part]:
    """Parts of a step of the reward model on Qwen2-VL.

    Args:
        network: A :class:`~videoalign.models.VideoReward`.
        inputs: Inputs of a batch.
        training: Whether there is a backward pass; the recipe's kind, with adapters of the language model and a vision
            tower that trains in full.
        again: Whether activations are computed again in the backward pass.
    """
    vision, language = network.config.vision_config, network.config.text_config
    grid = inputs["video_grid_thw"].cpu()
    rows, length = inputs["input_ids"].shape
    patches = int(grid.prod(1).sum())
    segments = int((grid[:, 0] * (grid[:, 1] * grid[:, 2]) ** 2).sum())  # of each frame by itself
    merged = patches // vision.spatial_merge_size**2
    tower, _ = _linear(_weights(network.backbone.visual), {"merger": merged, "": patches})
    frozen, adapters = _linear(_weights(network.backbone.language_model), {"": rows * length})
    through, trained = (2, 3) if training else (1, 1)
    attention = 4 * segments * vision.embed_dim * vision.depth
    causal = CAUSAL * 4 * rows * length**2 * language.hidden_size * language.num_hidden_layers
    again = again and training
    return [
        Part("vision tower and merger: weights", tower, trained, again),
        Part("vision tower: attention within frames", float(attention), trained, again),
        Part("language model: frozen weights", frozen, through, again),
        Part("language model: adapters", adapters, trained, again),
        Part("language model: causal attention", causal, trained, again),
    ]

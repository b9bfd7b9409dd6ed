"""Names that tools give to a transformer's layers in files of LoRA adapters.

diffusers names the layers in its own way. ComfyUI and musubi-tuner use the names of the model's first publication, its
*original* names: ComfyUI with dots behind ``diffusion_model.``, musubi-tuner with underscores behind ``lora_unet_``.
The tables are the inverse of diffusers' own converters (``diffusers.loaders.lora_conversion_utils``).
"""

import re
from collections.abc import Iterable

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
WAN = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
"""Wan, by the part of a name behind ``blocks.N.``, or the whole name."""
LTX = {"proj_in": "patchify_proj", "time_embed": "adaln_single"}
"""LTX-Video; the layers of its blocks have one name everywhere."""
LTX2 = {
    **LTX,
    "audio_proj_in": "audio_patchify_proj",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
"""LTX-2, with the layers of its audio stream."""
ORIGINAL = {
    "WanTransformer3DModel": WAN,
    "SkyReelsV2Transformer3DModel": WAN,
    "LTXVideoTransformer3DModel": LTX,
    "LTX2VideoTransformer3DModel": LTX2,
}
"""Tables by the name of the transformer's class in diffusers. A key stands for a layer or a part that holds layers."""
COMFYUI, MUSUBI, DIFFUSERS = "diffusion_model.", "lora_unet_", "transformer."
"""What the tools put before a layer's name."""
_BLOCK = re.compile(r"(blocks\.\d+\.)?(.+)")


def original_name(layer: str, kind: str) -> str:
    """Give the original name of a layer; its own name where no table has another one.

    Args:
        layer: Name of the layer in the transformer.
        kind: Name of the transformer's class.
    """
    block, rest = _BLOCK.fullmatch(layer).groups("")
    for ours, theirs in ORIGINAL.get(kind, {}).items():
        if f"{rest}.".startswith(f"{ours}."):
            return block + theirs + rest[len(ours) :]
    return layer


def underscored(name: str) -> str:
    """Give a name as musubi-tuner and kohya's other tools write it, with their prefix."""
    return MUSUBI + name.replace(".", "_")


def by_any_name(layers: Iterable[str], kind: str) -> dict[str, str]:
    """Map every name that a tool gives to a layer, without prefixes that end in a dot, to the transformer's own.

    Args:
        layers: Names of the transformer's layers.
        kind: Name of the transformer's class.
    """
    names = {}
    for layer in layers:
        for name in (layer, original_name(layer, kind)):
            names |= {name: layer, underscored(name): layer}
    return names

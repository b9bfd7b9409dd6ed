"""Configurations of released generators, without weights: what `videoalign plan` counts where nothing was downloaded.

Values are those that diffusers' conversion scripts write (``scripts/convert_wan_to_diffusers.py`` and
``convert_hunyuan_video1_5_to_diffusers.py`` of its repository, the ``2.0`` preset of its LTX-2 conversion) where they
differ from the defaults of diffusers' classes, which are the released values of LTX-Video, HunyuanVideo 1.5 and Wan's
first autoencoder. The statistics of Wan 2.2's autoencoder are left out: shapes do not depend on them.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .hub_address import address_of

_FLOW = {"scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {})}
_UNIPC = {
    "scheduler": (
        "diffusers",
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    )
}
_WAN_VAE = {"vae": ("diffusers", "AutoencoderKLWan", {})}
_WAN22_VAE = {
    "vae": (
        "diffusers",
        "AutoencoderKLWan",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "is_residual": True,
            "scale_factor_spatial": 16,
            "scale_factor_temporal": 4,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
    )
}


def _wan(heads: int, ffn: int, layers: int, channels: int = 16, out: int = 16, **more: Any) -> tuple:
    """Wan's transformer."""
    shape = {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers}
    return "diffusers", "WanTransformer3DModel", {**shape, "in_channels": channels, "out_channels": out, **more}


_1_3B, _5B, _14B = _wan(12, 8960, 30), _wan(24, 14336, 30, 48, 48), _wan(40, 13824, 40)
_I2V_14B = _wan(40, 13824, 40, 36, image_dim=1280, added_kv_proj_dim=5120)
_I2V_A14B = _wan(40, 13824, 40, 36)
_LTX = {
    "transformer": ("diffusers", "LTXVideoTransformer3DModel", {}),
    "vae": ("diffusers", "AutoencoderKLLTXVideo", {}),
    **_FLOW,
}
_LTX2 = {
    "transformer": ("diffusers", "LTX2VideoTransformer3DModel", {"rope_type": "split"}),
    "vae": (
        "diffusers",
        "AutoencoderKLLTX2Video",
        {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8, "decoder_causal": False},
    ),
    **_FLOW,
}


def _hunyuan(task: str, size: int) -> dict[str, tuple]:
    shape = {"task_type": task, "target_size": size}
    return {
        "transformer": ("diffusers", "HunyuanVideo15Transformer3DModel", shape),
        "vae": ("diffusers", "AutoencoderKLHunyuanVideo15", {}),
        "guider": ("diffusers", "ClassifierFreeGuidance", {"guidance_scale": 6.0}),
        **_FLOW,
    }


_EXPERTS = {"transformer": _14B, "transformer_2": _14B, **_WAN_VAE, **_UNIPC}
_I2V_EXPERTS = {"transformer": _I2V_A14B, "transformer_2": _I2V_A14B, **_WAN_VAE, **_UNIPC}
KNOWN: dict[str, tuple[str, dict[str, Any], dict[str, tuple]]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("WanPipeline", {}, {"transformer": _1_3B, **_WAN_VAE, **_UNIPC}),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("WanPipeline", {}, {"transformer": _14B, **_WAN_VAE, **_UNIPC}),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": (
        "WanImageToVideoPipeline",
        {},
        {"transformer": _I2V_14B, **_WAN_VAE, **_UNIPC},
    ),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": (
        "WanImageToVideoPipeline",
        {},
        {"transformer": _I2V_14B, **_WAN_VAE, **_UNIPC},
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (
        "WanPipeline",
        {"expand_timesteps": True},
        {"transformer": _5B, **_WAN22_VAE, **_UNIPC},
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("WanPipeline", {"boundary_ratio": 0.875}, _EXPERTS),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": ("WanImageToVideoPipeline", {"boundary_ratio": 0.9}, _I2V_EXPERTS),
    "Lightricks/LTX-Video": ("LTXPipeline", {}, _LTX),
    "Lightricks/LTX-2": ("LTX2Pipeline", {}, _LTX2),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": (
        "HunyuanVideo15Pipeline",
        {},
        _hunyuan("t2v", 640),
    ),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v": (
        "HunyuanVideo15ImageToVideoPipeline",
        {},
        _hunyuan("i2v", 640),
    ),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v": (
        "HunyuanVideo15Pipeline",
        {},
        _hunyuan("t2v", 960),
    ),
}
"""Pipeline's class, entries of its index, and its parts (library, class, configuration), by the generator's hub id."""

ABSENT = {
    "Wan": (("tokenizer", "text_encoder"), ("image_encoder", "image_processor")),
    "LTX": (("tokenizer", "text_encoder"), ()),
    "LTX2": (("tokenizer", "text_encoder", "connectors", "audio_vae", "vocoder"), ()),
    "HunyuanVideo15": (
        ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
        ("image_encoder", "feature_extractor"),
    ),
}
"""Parts that are left out, by the beginning of the pipeline's class: always, and of image-to-video."""


def write_configs(name: str, folder: Path) -> None:
    """Write a released generator's configurations as a pipeline folder without weights.

    Args:
        name: Hub id, one of :data:`KNOWN`.
        folder: Folder to write into.
    """
    pipeline, entries, parts = KNOWN[name]
    always, with_image = ABSENT[pipeline.partition("Image")[0].removesuffix("Pipeline")]
    absent = {part: [None, None] for part in (*always, *(with_image if "Image" in pipeline else ()))}
    index = {"_class_name": pipeline, **entries, **absent, **{part: list(kind[:2]) for part, kind in parts.items()}}
    texts = {"model_index.json": index}
    for part, (_, kind, config) in parts.items():
        file = f"{part}_config.json" if part in ("scheduler", "guider") else "config.json"
        texts[f"{part}/{file}"] = {"_class_name": kind, **config}
    for path, content in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=1), encoding="utf-8")


@contextlib.contextmanager
def configs_of(place: str) -> Iterator[str]:
    """The folder or hub id from which a generator's shapes are read during a block.

    Args:
        place: Folder or hub id of a generator. Those of :data:`KNOWN` are not looked for on the hub.
    """
    address = address_of(place)
    if address is None or address.id not in KNOWN or address.path:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="videoalign") as folder:
        write_configs(address.id, Path(folder))
        yield folder

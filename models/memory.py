"""How the weights of a generator are held and computed: options of diffusers, bitsandbytes and torchao under one key.

Nothing here computes: each field reaches the library that implements it. What a use cannot take (weights that train in
8 bits, attention without a backward pass, an option of a part that is never called) is refused when a module is built.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from .. import VideoAlignError

Quantization = Literal["nf4", "bnb_int8", "torchao_int8", "torchao_float8"]
OFFLOADED = ("transformer", "vae", "text_encoder")
"""Parts that can be offloaded."""
_TRANSFORMER = ("attention", "compile", "quantization", "layerwise_casting")
"""Options of the transformer, which encoding never calls."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How the weights of a generator are held and computed. The defaults hold them as they are loaded."""

    attention: str | None = None
    """Attention backend of the transformer, by diffusers' name: ``flash``, ``flash_hub``, ``_flash_3_hub``,
    ``_native_cudnn``, ``xformers`` and others; torch's own (``native``) if not given. Names that end in ``_hub``
    download a kernel, which is code, from the Hugging Face hub. Those that hold ``sage`` have no backward pass."""
    compile: bool = False
    """Whether torch.compile compiles the transformer's repeated blocks, one kind once (diffusers' regional
    compilation)."""
    quantization: Quantization | None = None
    """Form of the transformer's frozen linear layers, quantised as they are loaded; LoRA adapters stay fp32 (QLoRA).
    ``nf4`` (4 bits, with double quantisation) and ``bnb_int8`` need bitsandbytes and a GPU; ``torchao_int8`` and
    ``torchao_float8`` (weights alone, 8 bits) need torchao and run on a CPU, too."""
    layerwise_casting: Literal["float8_e4m3fn", "float8_e5m2"] | None = None
    """Dtype that the transformer's frozen layers are stored in; each is cast to the dtype it computes in for the time
    of its call. Its norms and embeddings keep their dtype, as diffusers lists them for each model. Training needs
    ``gradient_checkpointing`` beside it, or the backward pass keeps every layer's cast weights."""
    group_offload: tuple[str, ...] = ()
    """Parts that stay in the main memory, of which a layer (of the transformer: a block) at a time is on the GPU:
    ``text_encoder``, ``vae`` and, where nothing trains, ``transformer``."""
    tiling: bool = False
    """Whether the autoencoder encodes and decodes large videos in overlapping tiles, of diffusers' size for the model.
    Latents and frames differ a little from those that were computed whole."""
    slicing: bool = False
    """Whether the autoencoder encodes and decodes the videos of a batch one after the other."""
    text_first: bool = False
    """Whether a run embeds all of its prompts first, and then frees the text encoder; the embeddings wait in the main
    memory (4096 numbers a token for Wan and LTX: about half a MB a prompt of 30 tokens in fp32). Only encoding and
    sampling have a text encoder; training reads embedded prompts and never loads one."""

    def __post_init__(self) -> None:
        names = sorted(backend.value for backend in AttentionBackendName)
        if self.attention is not None and self.attention not in names:
            raise VideoAlignError(
                f"memory.attention {self.attention!r} is no attention backend of this diffusers; there are: "
                f"{', '.join(names)}"
            )
        if unknown := sorted(set(self.group_offload) - set(OFFLOADED)):
            raise VideoAlignError(
                f"memory.group_offload {unknown} are no parts of a generator; those that can be offloaded are "
                f"{', '.join(OFFLOADED)}"
            )
        if self.quantization and self.layerwise_casting:
            raise VideoAlignError(
                f"memory.quantization {self.quantization} and memory.layerwise_casting {self.layerwise_casting} both "
                "say how the same weights are stored; leave one of them out"
            )
        if self.compile and self.layerwise_casting:
            raise VideoAlignError(
                "memory.compile and memory.layerwise_casting do not go together: what is compiled multiplies the "
                "stored weights without the cast; leave one of them out, or use memory.quantization, which can be "
                "compiled"
            )
        if self.quantization and "transformer" in self.group_offload:
            raise VideoAlignError(
                f"memory.quantization {self.quantization} and memory.group_offload of the transformer do not go "
                "together: quantised weights are not moved layer by layer; use memory.layerwise_casting instead, which "
                "stores 8 bits, too"
            )
        if self.text_first and "text_encoder" in self.group_offload:
            raise VideoAlignError(
                "memory.text_first frees the text encoder before anything else needs memory, and memory.group_offload "
                "of it keeps it; leave one of them out"
            )

    # --- what a use can take ----------------------------------------------------------------------------------

    def for_training(self, full: bool, parts: Sequence[str], checkpointing: bool) -> "Memory":
        """These options, or a refusal of those that a training cannot take.

        Args:
            full: Whether the transformer's own weights train, and not adapters.
            parts: Parts of the generator that are loaded.
            checkpointing: Whether activations are computed again in the backward pass.

        Raises:
            VideoAlignError: Where an option cannot be used in training; says why and what to do.
        """
        if self.attention and "sage" in self.attention:
            raise VideoAlignError(
                f"memory.attention {self.attention} has no backward pass, so nothing trains through it; use native, "
                "_native_cudnn or flash, and sage for sampling"
            )
        stored = self.quantization and f"quantization {self.quantization}"
        stored = stored or (self.layerwise_casting and f"layerwise_casting {self.layerwise_casting}")
        if full and stored:
            raise VideoAlignError(
                f"memory.{stored} holds weights in so few bits that no step of an optimizer changes them, but "
                "model.lora: null trains them; train LoRA adapters (model.lora), or leave the option out"
            )
        if self.layerwise_casting and not checkpointing:
            raise VideoAlignError(
                f"memory.layerwise_casting {self.layerwise_casting} saves nothing here: without gradient checkpointing "
                "the backward pass keeps the cast weights of every layer; set model.gradient_checkpointing: true"
            )
        if "transformer" in self.group_offload:
            raise VideoAlignError(
                "memory.group_offload of the transformer is for sampling: the backward pass needs its weights on the "
                "GPU; store them in fewer bits (memory.quantization or memory.layerwise_casting), or shard them "
                "(experiments/flow/fsdp2.yaml)"
            )
        if absent := sorted(set(self.group_offload) - set(parts)):
            raise VideoAlignError(
                f"memory.group_offload names {', '.join(absent)}, which this training does not load (model.parts)"
            )
        if self.text_first:
            raise VideoAlignError(
                "memory.text_first is for encoding and sampling: training reads embedded prompts and loads no text "
                "encoder; leave it out"
            )
        return self

    def for_encoding(self) -> "Memory":
        """These options, or a refusal of those that encoding cannot take.

        Raises:
            VideoAlignError: Where an option concerns the transformer, which encoding never calls.
        """
        if given := [name for name in _TRANSFORMER if getattr(self, name)]:
            raise VideoAlignError(
                f"memory.{given[0]} is an option of the transformer, which encoding never calls; leave it out"
            )
        if "transformer" in self.group_offload:
            raise VideoAlignError("memory.group_offload: encoding never calls the transformer; leave it out")
        return self

    def _beside_shards(self) -> None:
        """Refuse options that do not go together with a sharded model."""
        clash = {
            "group_offload": "moves weights between devices that FSDP has distributed",
            "quantization": "holds weights in a form that FSDP cannot split",
            "layerwise_casting": "replaces weights that FSDP has distributed",
        }
        for name, why in clash.items():
            if getattr(self, name):
                raise VideoAlignError(
                    f"memory.{name} {why}, so it does not go together with ModelParallelStrategy; leave it out, or "
                    "train with trainer.strategy: ddp"
                )

    @property
    def stored(self) -> bool:
        """Whether weights are stored in a form that torch's own collectives do not send."""
        return bool(self.quantization or self.layerwise_casting)

    def made(self) -> dict[str, Any]:
        """What the samples of a run depend on, as plain values; empty where everything is as it is loaded."""
        return {"memory": plain} if (plain := asdict(self)) != asdict(Memory()) else {}

    # --- what reaches the libraries ---------------------------------------------------------------------------

    def loading(self, part: str, dtype: torch.dtype) -> dict[str, Any]:
        """Further arguments of ``from_pretrained`` for a part.

        Args:
            part: Name of the part.
            dtype: Dtype that its layers compute in.

        Raises:
            VideoAlignError: Where the library that quantises is not installed, or cannot work on this machine.
        """
        if not self.quantization or part not in ("transformer", "transformer_2"):
            return {}
        return (
            _torchao(self.quantization) if "torchao" in self.quantization else _bitsandbytes(self.quantization, dtype)
        )

    def apply(self, generator: nn.Module) -> None:
        """Set the options of loaded parts, before adapters are added: attention, casting, tiling and slicing.

        Args:
            generator: A :class:`~videoalign.models.generator.Generator`.

        Raises:
            VideoAlignError: Where the attention backend's package is not installed.
        """
        for net in _transformers(generator):
            if self.attention:
                try:
                    net.set_attention_backend(self.attention)
                except (RuntimeError, ValueError, ImportError) as error:
                    raise VideoAlignError(f"memory.attention {self.attention}: {error}") from error
            if self.layerwise_casting:
                net.enable_layerwise_casting(getattr(torch, self.layerwise_casting), net.dtype)
        if generator.vae is not None:
            if self.tiling:
                generator.vae.enable_tiling()
            if self.slicing:
                generator.vae.enable_slicing()

    def compile_blocks(self, generator: nn.Module) -> None:
        """Compile the repeated blocks of the transformers, behind adapters and all else that changes them.

        Args:
            generator: A :class:`~videoalign.models.generator.Generator`.
        """
        if self.compile:
            for net in _transformers(generator):
                net.compile_repeated_blocks()

    def place(self, generator: nn.Module, device: torch.device, mesh: object | None = None) -> None:
        """Keep the parts that are offloaded in the main memory. Call it before a module is moved to its device.

        Such parts leave the generator's registered submodules, which alone are moved.

        Args:
            generator: A :class:`~videoalign.models.generator.Generator`.
            device: Device that the layers compute on.
            mesh: The strategy's mesh of devices; None where each process holds the whole model.

        Raises:
            VideoAlignError: Where the model is to be sharded, and also offloaded, quantised or cast layer by layer.
        """
        if mesh is not None:
            self._beside_shards()
        for part in self.group_offload:
            module = getattr(generator, part)
            if module is None or _is_group_offload_enabled(module):
                continue
            kind = "block_level" if part == "transformer" else "leaf_level"
            blocks = {"num_blocks_per_group": 1} if part == "transformer" else {}
            for net in _transformers(generator) if part == "transformer" else [module]:
                apply_group_offloading(net, onload_device=device, offload_type=kind, **blocks)
            if part == "text_encoder":  # transformers says where weights are, diffusers where they compute
                kept = type(module)
                module.__class__ = type(kept.__name__, (kept,), {"device": property(lambda _: device)})
            for name in ("transformer", "other") if part == "transformer" else (part,):
                if name in generator._modules:
                    object.__setattr__(generator, name, generator._modules.pop(name))


def _transformers(generator: nn.Module) -> Iterator[nn.Module]:
    """The transformers that are loaded: one, or the two experts."""
    for name in ("transformer", "other"):
        if (net := getattr(generator, name, None)) is not None:
            yield net


def _torchao(quantization: str) -> dict[str, Any]:
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError:
        raise VideoAlignError(f"memory.quantization {quantization} needs torchao: pip install torchao") from None
    from diffusers import TorchAoConfig

    kind = Int8WeightOnlyConfig() if quantization == "torchao_int8" else Float8WeightOnlyConfig()
    return {"quantization_config": TorchAoConfig(kind, modules_to_not_convert=["proj_out"])}


def _bitsandbytes(quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise VideoAlignError(
            f"memory.quantization {quantization} needs a GPU: diffusers loads bitsandbytes' weights on no CPU. "
            "torchao_int8 and torchao_float8 run on one"
        )
    if quantization == "bnb_int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["proj_out"])
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,  # Dettmers et al., 2023 (QLoRA), section 3
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["proj_out"],
        )
    # each rank on its own GPU; diffusers would take the first one, because no rank has chosen its device yet
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))  # torchrun's and Lightning's, or srun's
    return {"quantization_config": config, "device_map": {"": int(rank)}}

"""Computes the peak memory of one training step that howto/scale.md quotes, in minutes on a CPU.

Run `python docs/step_memory.py`. The transformers have their released sizes and random weights that are shapes only
(PyTorch's fake tensors). A step runs under bf16 autocast with gradient checkpointing, and every live storage is
counted. The autoencoder, DDP's buckets and the CUDA context are left out.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

GIB = 2**30


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, until they are freed."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.add(tensors)

    def add(self, tree: Any) -> None:
        """Count the storages in a tree of tensors that were not seen before."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen[storage] = True
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, storage.nbytes())

    def drop(self, size: int) -> None:
        """A storage was freed."""
        self.live -= size

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.add(out)
        return out


def build(kind: type[nn.Module], lora: bool = True, frozen: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A transformer without storage, as the recipes train it."""
    with torch.device("meta"):
        net = kind(**config).to(frozen)
        if lora:
            net.requires_grad_(False)
            net.add_adapter(LoraConfig(r=64, lora_alpha=128, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
            for parameter in net.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    net.enable_gradient_checkpointing()
    return net.train()


def measure(name: str, net: nn.Module, forward: Callable[[nn.Module], Tensor]) -> None:
    """Print the memory of a step."""
    with FakeTensorMode():
        for module in net.modules():
            for group in (module._parameters, module._buffers):
                for key, old in group.items():
                    if old is not None:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        group[key] = nn.Parameter(new, old.requires_grad) if group is module._parameters else new
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        peak = Peak([*net.parameters(), *net.buffers()])
        weights = peak.live
        with peak:
            for parameter in trained:  # so that the optimizer has its states
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(net).float().square().mean()
            loss.backward()
            optimizer.step()
            gc.collect()
    millions = [sum(p.numel() for p in group) / 1e6 for group in (trained, net.parameters())]
    print(
        f"{name}: {millions[0]:.0f} M of {millions[1]:.0f} M train; weights {weights / GIB:.1f}, "
        f"peak {peak.peak / GIB:.1f} GiB",
        flush=True,
    )


WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
LTX = {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28}


def wan(videos: int) -> Callable[[nn.Module], Tensor]:
    """Forward of videos of 81 frames, 480 x 832."""
    return lambda net: net(
        torch.empty(videos, 16, 21, 60, 104), torch.empty(videos), torch.empty(videos, 512, 4096), return_dict=False
    )[0]


def ltx(videos: int) -> Callable[[nn.Module], Tensor]:
    """Forward of videos of 121 frames, 480 x 704."""
    return lambda net: net(
        torch.empty(videos, 16 * 15 * 22, 128),
        torch.empty(videos, 128, 4096),
        torch.empty(videos),
        torch.ones(videos, 128, dtype=torch.long),
        num_frames=16,
        height=15,
        width=22,
        rope_interpolation_scale=(8 / 24, 32, 32),
        return_dict=False,
    )[0]


if __name__ == "__main__":
    measure("ltx_dpo", build(LTXVideoTransformer3DModel, caption_channels=4096, **LTX), ltx(2))
    measure("wan_sft", build(WanTransformer3DModel, **WAN), wan(1))
    measure("wan_dpo", build(WanTransformer3DModel, **WAN), wan(2))
    measure("wan_dpo, frozen bf16", build(WanTransformer3DModel, frozen=torch.bfloat16, **WAN), wan(2))
    measure("wan_sft, lora null", build(WanTransformer3DModel, lora=False, **WAN), wan(1))
    measure("nrg/wan", build(WanTransformer3DModel, lora=False, **{**WAN, "num_layers": 8}), wan(4))

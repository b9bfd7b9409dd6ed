"""Activations that are computed again: the same gradients, and attention only where it is asked for."""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from flow_kit import close, data, loaded, make
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO
from videoalign.models.checkpointing import ATTENTION


class Counted(TorchDispatchMode):
    """Counts the calls of scaled dot-product attention."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls["attention"] += func in ATTENTION
        return func(*args, **(kwargs or {}))


def gradients(folder, which, batch):
    """Gradients of the errors of a batch, and the calls of attention in the forward and in the backward pass."""
    model = make(FlowDPO, folder, gradient_checkpointing=which)
    counted = [Counted(), Counted()]
    with counted[0]:
        loss = model.errors(batch["latents"], batch["seeds"], batch["conditions"])[0].sum()
    with counted[1]:
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, [one.calls["attention"] for one in counted]


@pytest.mark.parametrize("family", ["wan", "ltx"], indirect=True)
def test_gradients_are_the_same_and_kept_attention_is_not_computed_again(family, folders, pairs):
    model = make(FlowDPO, folders[family])
    batch = next(iter(loaded(data(pairs[family], 2), model).train_dataloader()))
    plain, (forward, backward) = gradients(folders[family], False, batch)
    assert forward > 0 and backward == 0
    whole, calls = gradients(folders[family], True, batch)
    assert calls == [forward, forward]
    kept, calls = gradients(folders[family], "attention", batch)
    assert calls == [forward, 0]
    close(whole, plain, rtol=1e-6, atol=1e-7)
    close(kept, plain, rtol=1e-6, atol=1e-7)


def test_compiled_blocks_hide_what_would_be_kept(folders):
    with pytest.raises(VideoAlignError, match=r"gradient_checkpointing: attention.*leave compile out"):
        make(FlowDPO, folders["wan"], gradient_checkpointing="attention", compile=True)

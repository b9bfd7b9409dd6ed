"""Queries, keys and values have one dtype in mixed precision, also where norms compute in fp32."""

import pytest
import torch
import torch.nn.functional as F

from families_kit import FAMILIES, SHAPES, encoded, miniatures, of_family  # noqa: F401  fixtures
from helpers import randn
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape


@pytest.fixture
def attended(monkeypatch):
    """Dtypes of queries, keys and values; norms give fp32 under autocast, as on a GPU from torch 2.12 on."""
    seen, norm, attend = [], F.rms_norm, F.scaled_dot_product_attention

    def in_fp32(x, shape, weight=None, eps=None):
        return norm(x.float(), shape, None if weight is None else weight.float(), eps)

    def seeing(query, key, value, *rest, **named):
        seen.append((query.dtype, key.dtype, value.dtype))
        return attend(query, key, value, *rest, **named)

    monkeypatch.setattr(F, "rms_norm", in_fp32)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seeing)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_computes_in_one_dtype(name, of_family, attended):  # noqa: F811
    generator, t = of_family(name), torch.tensor([0.3, 0.8])
    condition = generator.condition(encoded(generator), "cpu")
    attended.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        generator.velocity(randn(2, *SHAPES[name]), t, condition)
    assert attended and {*attended} == {(torch.bfloat16,) * 3}


def test_so_does_a_noisy_rewards_copy_of_blocks(of_family, attended):  # noqa: F811
    generator = of_family("wan")
    reward = NoisyReward(generator, NoisyRewardShape(blocks=1, pooling="attention"))
    condition = generator.condition(encoded(generator), "cpu")
    attended.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reward(randn(2, *SHAPES["wan"]), torch.tensor([0.3, 0.8]), condition)
    assert attended and {*attended} == {(torch.bfloat16,) * 3}

"""Matrices in oneDNN's layout multiply as they did before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from batchrun.model.packed import PackedLinear, can_pack, has_fast_bfloat16
from tests.unit.model.models import SMALL, Driver, random_model, random_tokens

CPU = torch.device("cpu")


@pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="no bfloat16 units in this CPU")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 64, 300])
def test_packed_linear(num_tokens: int, has_bias: bool) -> None:
    """The products of the layer that was packed, up to bfloat16's rounding; rows need not lie
    together."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 72, bias=has_bias).bfloat16().requires_grad_(False)
    x = torch.randn(num_tokens, 128).bfloat16()[:, 16:112]
    out = PackedLinear(layer)(x)
    assert out.dtype is torch.bfloat16
    exact = nn.functional.linear(x.double(), layer.weight.double())
    exact += 0 if layer.bias is None else layer.bias.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="no bfloat16 units in this CPU")
def test_packed_model() -> None:
    """A prepared bfloat16 model holds no plain matrix but the embeddings, and not a byte more; its
    logits are as near to float32's as those of the model that is not prepared."""
    config = replace(SMALL, attention_bias=True)
    tokens = random_tokens(config, 20)
    exact = Driver(random_model(config)).run(tokens)
    plain, prepared = (random_model(config).bfloat16() for _ in range(2))
    size = sum(parameter.nbytes for parameter in plain.parameters())
    prepared.prepare()
    assert sum(parameter.nbytes for parameter in prepared.parameters()) == size
    assert not any(type(module) is nn.Linear for module in prepared.modules())
    errors = [(Driver(m).run(tokens) - exact).abs().max() for m in (plain, prepared)]
    assert errors[1] < 2 * errors[0]


def test_only_where_it_helps() -> None:
    """Float32 stays as it is, and so does every model that is not on an x86 CPU."""
    assert not can_pack(torch.float32, CPU)
    assert not can_pack(torch.bfloat16, torch.device("cuda"))
    assert can_pack(torch.bfloat16, CPU) <= has_fast_bfloat16()

"""Matrices in oneDNN's layout multiply as they did before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from batchrun.model.packed import PackedLinear, can_pack, has_fast_bfloat16
from tests.unit.model.models import SMALL, Driver, random_model, random_tokens

CPU = torch.device("cpu")


PACKED = [
    pytest.param(
        dtype,
        error,
        marks=pytest.mark.skipif(not can_pack(dtype, CPU), reason="not packed on this CPU"),
    )
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2))
]


@pytest.mark.parametrize(("dtype", "error"), PACKED)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 64, 300])
def test_packed_linear(dtype: torch.dtype, error: float, num_tokens: int, has_bias: bool) -> None:
    """The products of the layer that was packed, up to the dtype's rounding; rows need not lie
    together."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 72, bias=has_bias).to(dtype).requires_grad_(False)
    x = torch.randn(num_tokens, 128).to(dtype)[:, 16:112]
    out = PackedLinear(layer)(x)
    assert out.dtype is dtype
    exact = nn.functional.linear(x.double(), layer.weight.double())
    exact += 0 if layer.bias is None else layer.bias.double()
    torch.testing.assert_close(out.double(), exact, rtol=error, atol=error)


@pytest.mark.parametrize(("dtype", "error"), PACKED)
def test_packed_model(dtype: torch.dtype, error: float) -> None:
    """A prepared model holds no plain matrix of those that pay but the embeddings, and not a byte
    more; its logits are as near to float32's as those of the model that is not prepared."""
    config = replace(SMALL, attention_bias=True, hidden_size=512, intermediate_size=1024)
    tokens = random_tokens(config, 20)
    exact = Driver(random_model(config)).run(tokens)
    plain, prepared = (random_model(config).to(dtype) for _ in range(2))
    size = sum(parameter.nbytes for parameter in plain.parameters())
    prepared.prepare()
    assert sum(parameter.nbytes for parameter in prepared.parameters()) == size
    layers = [module for module in prepared.modules() if type(module) is nn.Linear]
    assert all(dtype is torch.float32 and layer.weight.numel() < 1 << 19 for layer in layers)
    assert any(type(module) is PackedLinear for module in prepared.modules())
    errors = [(Driver(m).run(tokens) - exact).abs().max() for m in (plain, prepared)]
    assert errors[1] <= max(2 * errors[0], 1e-5 * exact.abs().max())


def test_only_where_it_helps() -> None:
    """A model that is not on an x86 CPU stays as it is, and one of a dtype that the CPU does not
    multiply."""
    assert not can_pack(torch.float32, torch.device("cuda"))
    assert not can_pack(torch.float64, CPU)
    assert can_pack(torch.bfloat16, CPU) <= has_fast_bfloat16()

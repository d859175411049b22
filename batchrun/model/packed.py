"""Matrices laid out for the matrix units of a CPU, once, where torch has oneDNN to do it."""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

_MIN_FLOAT32 = 1 << 19
"""Numbers of a float32 matrix that is packed: smaller ones stay in a core's cache."""


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's own layout: the same numbers, up to the order of sums.

    Torch's own product arranges a matrix anew at every call. The layout is opaque, so the layer can
    be neither saved nor moved.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features], in the dtype of ``x``."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing brings something: on an x86 CPU for float32, and for bfloat16 where it
    multiplies that.

    In float32 large matrices are up to 1.8 times as fast with 4 to 16 tokens at once, and a little
    slower with one or two.
    """
    is_x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    if not is_x86 or not torch._C._has_mkldnn:
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and has_fast_bfloat16())


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: AVX512-BF16 or AMX."""
    if not torch._C._has_mkldnn:
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


def pack_layers(model: nn.Module) -> None:
    """Put a :class:`PackedLinear` in the place of every plain linear layer for which it pays, one
    at a time: beside the model no more than one matrix is held."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and _pays(child.weight):
                setattr(module, name, PackedLinear(child))


def _pays(weight: Tensor) -> bool:
    """Whether a matrix is worth the microseconds that oneDNN takes for each call; torch's own
    product of bfloat16 takes more than that for any."""
    return weight.dtype is not torch.float32 or weight.numel() >= _MIN_FLOAT32

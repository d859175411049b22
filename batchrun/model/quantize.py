"""Matrices of 8-bit integers: half the bytes of bfloat16, the same activations.

Weight-only: each output channel (row) has one scale, ``weight ~ integers * scale``, and the
products are made in the type of the activations. :func:`dequantize` is the definition that the
faster ways are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from batchrun.model.config import ModelConfig
from batchrun.model.sizes import INT8_SCRATCH_BYTES

_LEVELS = 127
_ROWS_AT_ONCE_BYTES = 32 << 20
"""Of float32: what quantising a matrix takes beside it."""
_CPU_SCRATCH_BYTES = {torch.float32: 1 << 20, torch.bfloat16: 8 << 20}
"""Widened weights that stay in the cache until they are multiplied: what was fastest."""
_PACKED_ROWS = 4
"""Up to so many tokens torch's packed product of bfloat16 and int8 is the fastest on a CPU."""
_PACKED_SIZE = 32
"""It reads so many numbers at once, past the end of a row of another length."""


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrix [N, K] -> integers [N, K] int8 and scales [N] in ``dtype``.

    Symmetric, to the nearest; the largest value of a row becomes 126 or 127. Scales are rounded up
    to what bfloat16 holds, so they are the same numbers in every dtype. A row with a value that is
    not finite gets a scale that is not, so that it shows.
    """
    wide = weight.float()
    largest = wide.abs().amax(1)
    scale = largest / _LEVELS
    rounded = scale.bfloat16().float()
    rounded = torch.where(rounded < scale, _next_bfloat16(rounded), rounded)
    # A row of zeros, or of values too small for a scale to hold, has no scale of its own.
    rounded = torch.where(rounded == 0, 1.0, rounded)
    integers = (wide / rounded[:, None]).round_().clamp_(-_LEVELS, _LEVELS)
    return integers.to(torch.int8), rounded.to(dtype)


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """The matrix [N, K] float32 that integers and scales stand for."""
    return integers.float() * scale.float()[:, None]


def int8_linear(x: Tensor, integers: Tensor, scale: Tensor, out: Tensor) -> None:
    """``x @ (integers * scale).T`` into ``out``: x [T, K], integers [N, K], scale [N], out [T, N].

    The integers are exact in every dtype; only the product is scaled.
    """
    num_rows, size = integers.shape
    is_packed = x.dtype is torch.bfloat16 and len(x) <= _PACKED_ROWS and size % _PACKED_SIZE == 0
    if is_packed and x.device.type == "cpu":
        out.copy_(torch._weight_int8pack_mm(x, integers, scale))
        return
    scratch_bytes = INT8_SCRATCH_BYTES
    if x.device.type == "cpu":
        scratch_bytes = _CPU_SCRATCH_BYTES.get(x.dtype, INT8_SCRATCH_BYTES)
    step = max(1, scratch_bytes // (size * x.element_size()))
    scratch = x.new_empty(min(step, num_rows), size)
    for start in range(0, num_rows, step):
        rows = integers[start : start + step]
        wide = scratch[: len(rows)].copy_(rows)
        torch.mm(x, wide.t(), out=out[:, start : start + step])
    out.mul_(scale)


class Int8Linear(nn.Module):
    """A linear layer whose matrix is int8, but for its last ``num_wide`` rows.

    ``weight`` [N, K] int8, ``scale`` [N], ``wide`` [num_wide, K], ``bias`` [N + num_wide]; all but
    ``weight`` in the model's dtype. Built empty; :meth:`fill` quantises what is loaded.
    """

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool, num_wide: int
    ) -> None:
        super().__init__()

        def empty(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

        num_int8 = out_features - num_wide
        self.out_features = out_features
        self.product = int8_linear
        """How the products are made: as :func:`int8_linear`, or by a kernel of the device."""
        self.weight = empty(num_int8, in_features, dtype=torch.int8)
        self.scale = empty(num_int8)
        self.wide = empty(num_wide, in_features) if num_wide else None
        self.bias = empty(out_features) if bias else None

    @classmethod
    def joined(cls, parts: Sequence[Int8Linear]) -> Int8Linear:
        """One layer of several that share their input and have no wide rows: its outputs are theirs
        side by side."""
        joined = cls(0, 0, parts[0].scale.dtype, bias=False, num_wide=0)
        joined.out_features = sum(part.out_features for part in parts)

        def cat(tensors: Sequence[Tensor]) -> nn.Parameter:
            return nn.Parameter(torch.cat(list(tensors)), requires_grad=False)

        joined.weight = cat([part.weight for part in parts])
        joined.scale = cat([part.scale for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        joined.bias = cat(biases) if biases else None
        return joined

    @torch.no_grad()
    def fill(self, weight: Tensor, start: int = 0) -> None:
        """Take the rows ``start``, ``start + 1`` ... of the whole matrix from ``weight`` [n, K].

        Quantised on the device of this layer, a few rows at a time: beside ``weight`` nothing of
        its size is ever held.
        """
        num_int8, size = self.weight.shape
        step = max(1, _ROWS_AT_ONCE_BYTES // (4 * size))
        end = min(start + len(weight), num_int8)
        for first in range(start, end, step):
            last = min(first + step, end)
            rows = weight[first - start : last - start].to(self.weight.device)
            integers, scale = quantize(rows, self.scale.dtype)
            self.weight[first:last].copy_(integers)
            self.scale[first:last].copy_(scale)
        if self.wide is not None and start + len(weight) > num_int8:
            first = max(start, num_int8)
            rows = weight[first - start :]
            self.wide[first - num_int8 : first - num_int8 + len(rows)].copy_(rows)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features], in the dtype of ``x``."""
        out = x.new_empty(len(x), self.out_features)
        num_int8 = len(self.weight)
        self.product(x, self.weight, self.scale, out[:, :num_int8])
        if self.wide is not None:
            torch.mm(x, self.wide.t(), out=out[:, num_int8:])
        if self.bias is not None:
            out += self.bias
        return out


def quantize_layers(model: nn.Module, config: ModelConfig, dtype: torch.dtype) -> None:
    """Put an empty :class:`Int8Linear` in the place of every linear layer of ``model``.

    The rows of a Mamba-2 layer that make dt keep the model's dtype: an error of dt multiplies over
    the whole sequence. Embeddings, norms and convolutions are no linear layers.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                layer = Int8Linear(
                    child.in_features,
                    child.out_features,
                    dtype,
                    bias=child.bias is not None,
                    num_wide=config.mamba_num_heads if name == "in_proj" else 0,
                )
                setattr(module, name, layer)


def _next_bfloat16(value: Tensor) -> Tensor:
    """The next larger bfloat16 of positive ones that float32 holds."""
    return (value.view(torch.int32) + (1 << 16)).view(torch.float32)

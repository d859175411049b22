"""Products with int8 matrices, widened on the way to the registers, in Triton. Needs triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS = 128
"""More tokens are bound by arithmetic, and a plain product of widened rows is as fast."""


@triton.jit
def int8_linear_kernel(
    x,
    weight,
    scales,
    out,
    num_tokens,
    num_rows,
    size,
    stride_x,
    stride_weight,
    stride_out,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of rows of the matrix for a block of tokens; sums in float32, scaled at the end."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_row = row < num_rows
    is_token = token < num_tokens
    rows = weight + row.to(tl.int64)[None, :] * stride_weight
    tokens = x + token.to(tl.int64)[:, None] * stride_x
    acc = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_column = column < size
        a = tl.load(
            tokens + column[None, :], mask=is_token[:, None] & is_column[None, :], other=0.0
        )
        b = tl.load(rows + column[:, None], mask=is_row[None, :] & is_column[:, None], other=0)
        acc += tl.dot(a, b.to(a.dtype))
    scale = tl.load(scales + row, mask=is_row, other=0.0).to(tl.float32)
    places = out + token.to(tl.int64)[:, None] * stride_out + row[None, :]
    tl.store(places, acc * scale[None, :], mask=is_token[:, None] & is_row[None, :])


def int8_linear(x: Tensor, integers: Tensor, scale: Tensor, out: Tensor) -> None:
    """As :func:`batchrun.model.quantize.int8_linear`, for tensors on a GPU."""
    num_tokens, size = x.shape
    num_rows = len(integers)
    block_tokens = min(64, max(16, triton.next_power_of_2(num_tokens)))
    block_rows = 64
    grid = (triton.cdiv(num_rows, block_rows), triton.cdiv(num_tokens, block_tokens))
    int8_linear_kernel[grid](
        x,
        integers,
        scale,
        out,
        num_tokens,
        num_rows,
        size,
        x.stride(0),
        integers.stride(0),
        out.stride(0),
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK=128,
        num_warps=4,
        num_stages=3,
    )

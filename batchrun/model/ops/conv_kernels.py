"""The short causal convolution with SiLU, in Triton. Needs triton.

Channels are neighbours in memory and state columns are rows of channels, so that every read is of
whole lines. Sizes are those of :class:`batchrun.model.ops.Ops`; all arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def conv_update_kernel(
    x,
    weight,
    bias,
    state,
    slots,
    out,
    channels,
    stride_x,
    stride_weight_channel,
    stride_weight_column,
    stride_slot,
    stride_column,
    stride_out,
    HAS_BIAS: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token of sequence ``program_id(0)`` for a block of channels; moves its state on."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < channels
    acc = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    columns = state + tl.load(slots + row) * stride_slot + channel
    weights = weight + channel * stride_weight_channel
    for k in tl.static_range(KERNEL - 1):
        column = tl.load(columns + k * stride_column, mask=is_channel, other=0.0)
        w = tl.load(weights + k * stride_weight_column, mask=is_channel, other=0.0)
        acc += column.to(tl.float32) * w.to(tl.float32)
        if k > 0:
            tl.store(columns + (k - 1) * stride_column, column, mask=is_channel)
    new = tl.load(x + row * stride_x + channel, mask=is_channel, other=0.0)
    w = tl.load(weights + (KERNEL - 1) * stride_weight_column, mask=is_channel, other=0.0)
    acc += new.to(tl.float32) * w.to(tl.float32)
    tl.store(columns + (KERNEL - 2) * stride_column, new, mask=is_channel)
    tl.store(out + row * stride_out + channel, acc * tl.sigmoid(acc), mask=is_channel)


@triton.jit
def causal_conv_kernel(
    x,
    weight,
    bias,
    state,
    out,
    slots,
    is_new,
    sequences,
    starts,
    num_tokens,
    channels,
    stride_x,
    stride_weight_channel,
    stride_weight_column,
    stride_slot,
    stride_column,
    stride_out,
    HAS_BIAS: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of packed tokens by a block of channels. Reads the states and leaves them alone."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = token < num_tokens
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < channels
    sequence = tl.load(sequences + token, mask=is_token, other=0)
    start = tl.load(starts + sequence)
    slot = tl.load(slots + sequence)
    has_state = is_token & (tl.load(is_new + sequence) == 0)
    acc = tl.zeros((BLOCK_TOKENS, BLOCK), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(KERNEL):
        source = token - (KERNEL - 1) + k
        is_here = source >= start
        # What lies before the first token is in the state, the last column just before it.
        inside = tl.load(
            x + source[:, None] * stride_x + channel[None, :],
            mask=(is_token & is_here)[:, None] & is_channel[None, :],
            other=0.0,
        )
        column = source - start + (KERNEL - 1)
        before = tl.load(
            state + (slot * stride_slot + column * stride_column)[:, None] + channel[None, :],
            mask=(has_state & (source < start))[:, None] & is_channel[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + channel * stride_weight_channel + k * stride_weight_column,
            mask=is_channel,
            other=0.0,
        )
        acc += (inside.to(tl.float32) + before.to(tl.float32)) * w.to(tl.float32)[None, :]
    tl.store(
        out + token[:, None] * stride_out + channel[None, :],
        acc * tl.sigmoid(acc),
        mask=is_token[:, None] & is_channel[None, :],
    )


@triton.jit
def conv_state_kernel(
    x,
    state,
    slots,
    is_new,
    starts,
    channels,
    stride_x,
    stride_slot,
    stride_column,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The new state of prefill ``program_id(0)``: its last columns, old ones where it is short.

    Columns are written in ascending order, and each comes from a later one or from a token, so
    nothing is overwritten before it was read.
    """
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < channels
    start = tl.load(starts + sequence)
    end = tl.load(starts + sequence + 1)
    columns = state + tl.load(slots + sequence) * stride_slot + channel
    has_state = tl.load(is_new + sequence) == 0
    for k in tl.static_range(KERNEL - 1):
        source = end - (KERNEL - 1) + k
        is_here = source >= start
        inside = tl.load(x + source * stride_x + channel, mask=is_channel & is_here, other=0.0)
        column = source - start + (KERNEL - 1)
        before = tl.load(
            columns + column * stride_column,
            mask=is_channel & (source < start) & has_state,
            other=0.0,
        )
        # One of the two is zero where the other is not masked, and x + 0 is x.
        tl.store(columns + k * stride_column, inside + before, mask=is_channel)

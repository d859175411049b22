"""What stands between and beside mamba-ssm's kernels, in Triton. Needs triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pass_states_kernel(
    added,
    dt_a_sums,
    state,
    slots,
    is_new,
    first_chunks,
    size,
    chunk_size,
    stride_added_chunk,
    stride_added_head,
    stride_sums_head,
    stride_sums_chunk,
    stride_slot,
    stride_head,
    BLOCK: tl.constexpr,
):
    """Hand states on from chunk to chunk: one prefill, one head, a block of its p * n numbers.

    ``added`` [C, h, p, n] float32 holds what each chunk adds to the state, and afterwards the
    state that enters it. ``dt_a_sums`` [h, C, Q] ends each chunk with the log of its decay.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_place = place < size
    slot_state = state + tl.load(slots + sequence) * stride_slot + head * stride_head + place
    has_state = tl.load(is_new + sequence) == 0
    S = tl.load(slot_state, mask=is_place & has_state, other=0.0).to(tl.float32)
    first = tl.load(first_chunks + sequence)
    last = tl.load(first_chunks + sequence + 1)
    for chunk in range(first, last):
        at = added + chunk * stride_added_chunk + head * stride_added_head + place
        decay = tl.load(
            dt_a_sums + head * stride_sums_head + chunk * stride_sums_chunk + chunk_size - 1
        )
        new = tl.load(at, mask=is_place, other=0.0)
        tl.store(at, S, mask=is_place)
        S = S * tl.exp(decay) + new
    tl.store(slot_state, S, mask=is_place)


@triton.jit
def add_norm_kernel(
    h,
    delta,
    weight,
    out,
    size,
    eps,
    stride_h,
    stride_delta,
    stride_out,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``h += delta`` and the RMS norm of the sum, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < size
    x = tl.load(h + row * stride_h + column, mask=is_column, other=0.0)
    if HAS_DELTA:
        more = tl.load(delta + row * stride_delta + column, mask=is_column, other=0.0)
        # Rounded as the residual stream is kept, before it is normed.
        x = (x.to(tl.float32) + more.to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + row * stride_h + column, x, mask=is_column)
    x = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    w = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + row * stride_out + column, x * scale * w, mask=is_column)

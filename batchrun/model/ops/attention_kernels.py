"""Attention over pages of keys and values, in Triton. Needs triton.

Lengths are read on the device, so the same launch serves any lengths and can be captured in a CUDA
graph. Softmax is computed online in float32, in powers of two. Key rows are found through the
block table: row = table[position // block_size] * block_size + position % block_size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_attention_kernel(
    q,
    keys,
    values,
    tables,
    contexts,
    parts,
    part_sums,
    scale,
    stride_q,
    stride_q_head,
    stride_row,
    stride_kv_head,
    stride_table,
    stride_part,
    stride_part_head,
    stride_part_split,
    stride_sum,
    stride_sum_head,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """One decode, one key/value head, one of ``SPLITS`` pieces of its context.

    The query heads that share the key/value head are the rows of the products, padded to what
    ``tl.dot`` takes. Gives the piece's result and the log of its sum of exponentials (base 2).
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.arange(0, GROUP_PADDED)
    is_member = member < GROUP
    dim = tl.arange(0, HEAD_DIM_PADDED)
    is_dim = dim < HEAD_DIM
    head = kv_head * GROUP + member
    queries = tl.load(
        q + row * stride_q + head[:, None] * stride_q_head + dim[None, :],
        mask=is_member[:, None] & is_dim[None, :],
        other=0.0,
    )
    num_keys = tl.load(contexts + row) + 1
    piece = tl.cdiv(tl.cdiv(num_keys, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    begin = split * piece
    end = tl.minimum(begin + piece, num_keys)
    # Finite, so that a row of which nothing was seen yet cannot make inf - inf.
    top = tl.full((GROUP_PADDED,), -1.0e30, tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    acc = tl.zeros((GROUP_PADDED, HEAD_DIM_PADDED), tl.float32)
    for at in range(begin, end, BLOCK_KEYS):
        key = at + tl.arange(0, BLOCK_KEYS)
        is_key = key < end
        block = tl.load(tables + row * stride_table + key // BLOCK_SIZE, mask=is_key, other=0)
        rows = (block * BLOCK_SIZE + key % BLOCK_SIZE) * stride_row + kv_head * stride_kv_head
        k = tl.load(
            keys + rows[None, :] + dim[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0
        )
        scores = tl.dot(queries, k) * scale
        scores = tl.where(is_key[None, :], scores, -1.0e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(is_key[None, :], tl.exp2(scores - new_top[:, None]), 0.0)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(
            values + rows[:, None] + dim[None, :],
            mask=is_key[:, None] & is_dim[None, :],
            other=0.0,
        )
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v)
        top = new_top
    seen = total > 0.0
    result = acc / tl.where(seen, total, 1.0)[:, None]
    # A piece beyond the context weighs nothing. NaN must stay NaN: not every "not seen" is empty.
    log_sum = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    at_part = parts + row * stride_part + split * stride_part_split + dim[None, :]
    tl.store(
        at_part + head[:, None] * stride_part_head,
        result,
        mask=is_member[:, None] & is_dim[None, :],
    )
    at_sum = part_sums + row * stride_sum + head * stride_sum_head + split
    tl.store(at_sum, log_sum, mask=is_member)


@triton.jit
def join_splits_kernel(
    parts,
    part_sums,
    out,
    stride_part,
    stride_part_head,
    stride_part_split,
    stride_sum,
    stride_sum_head,
    stride_out,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The pieces of one decode and one query head, weighed by their sums of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    is_dim = dim < HEAD_DIM
    log_sums = tl.load(part_sums + row * stride_sum + head * stride_sum_head + split)
    weights = tl.exp2(log_sums - tl.max(log_sums, 0))
    at = parts + row * stride_part + head * stride_part_head + dim[None, :]
    pieces = tl.load(at + split[:, None] * stride_part_split, mask=is_dim[None, :], other=0.0)
    result = tl.sum(pieces * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * stride_out + head * stride_out_head + dim, result, mask=is_dim)


@triton.jit
def prefill_attention_kernel(
    q,
    keys,
    values,
    out,
    tables,
    contexts,
    starts,
    first_sequence,
    scale,
    stride_q,
    stride_q_head,
    stride_row,
    stride_kv_head,
    stride_table,
    stride_out,
    stride_out_head,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A block of the queries of one prefill, one query head, over its pages: what was there
    before, and what came with it up to each query."""
    sequence = (first_sequence + tl.program_id(2)).to(tl.int64)
    head = tl.program_id(1)
    start = tl.load(starts + sequence)
    num_queries = tl.load(starts + sequence + 1) - start
    context = tl.load(contexts + sequence)
    first = tl.program_id(0) * BLOCK_QUERIES
    if first >= num_queries:
        return
    query = first + tl.arange(0, BLOCK_QUERIES)
    is_query = query < num_queries
    dim = tl.arange(0, HEAD_DIM_PADDED)
    is_dim = dim < HEAD_DIM
    queries = tl.load(
        q + (start + query)[:, None] * stride_q + head * stride_q_head + dim[None, :],
        mask=is_query[:, None] & is_dim[None, :],
        other=0.0,
    )
    position = context + query
    end = context + tl.minimum(num_queries, first + BLOCK_QUERIES)
    top = tl.full((BLOCK_QUERIES,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    acc = tl.zeros((BLOCK_QUERIES, HEAD_DIM_PADDED), tl.float32)
    for at in range(0, end, BLOCK_KEYS):
        key = at + tl.arange(0, BLOCK_KEYS)
        is_key = key < end
        block = tl.load(tables + sequence * stride_table + key // BLOCK_SIZE, mask=is_key, other=0)
        rows = (block * BLOCK_SIZE + key % BLOCK_SIZE) * stride_row
        rows += (head // GROUP) * stride_kv_head
        k = tl.load(
            keys + rows[None, :] + dim[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0
        )
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        scores = tl.where(is_seen, tl.dot(queries, k) * scale, -1.0e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(is_seen, tl.exp2(scores - new_top[:, None]), 0.0)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(
            values + rows[:, None] + dim[None, :],
            mask=is_key[:, None] & is_dim[None, :],
            other=0.0,
        )
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v)
        top = new_top
    # Every query sees itself, so no total is zero.
    result = acc / total[:, None]
    tl.store(
        out + (start + query)[:, None] * stride_out + head * stride_out_head + dim[None, :],
        result,
        mask=is_query[:, None] & is_dim[None, :],
    )

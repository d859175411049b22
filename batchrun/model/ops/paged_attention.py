"""Launches of the attention kernels: how a ragged batch is cut into programs. Needs triton."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from batchrun.model.layout import AttentionLayout
from batchrun.model.ops.attention_kernels import (
    decode_attention_kernel,
    join_splits_kernel,
    prefill_attention_kernel,
)

_MIN_DOT = 16
"""The least size of a side of ``tl.dot``."""
_MAX_SPLITS = 32
_SPLIT_TOKENS = 256
"""Shorter pieces of a context cost more to join than they bring."""
_BLOCK_QUERIES = 64


def attend_decodes(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    layout: AttentionLayout,
    num_processors: int,
) -> None:
    """The decodes of a batch, into their rows of ``out`` [T, heads, d].

    ``num_processors`` of the GPU decide into how many pieces a context is cut.
    """
    num_decodes = layout.num_decodes
    num_heads, head_dim = q.shape[1:]
    block_size, kv_heads = keys.shape[1:3]
    splits = _num_splits(
        num_decodes * kv_heads, layout.tables.shape[1] * block_size, num_processors
    )
    parts = q.new_empty(num_decodes, num_heads, splits, head_dim, dtype=torch.float32)
    part_sums = q.new_empty(num_decodes, num_heads, splits, dtype=torch.float32)
    padded = max(_MIN_DOT, triton.next_power_of_2(head_dim))
    group = num_heads // kv_heads
    decode_attention_kernel[num_decodes, kv_heads, splits](
        q,
        keys,
        values,
        layout.tables,
        layout.contexts,
        parts,
        part_sums,
        _scale(head_dim),
        q.stride(0),
        q.stride(1),
        keys.stride(1),
        keys.stride(2),
        layout.tables.stride(0),
        parts.stride(0),
        parts.stride(1),
        parts.stride(2),
        part_sums.stride(0),
        part_sums.stride(1),
        BLOCK_SIZE=block_size,
        GROUP=group,
        GROUP_PADDED=max(_MIN_DOT, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=padded,
        SPLITS=splits,
        BLOCK_KEYS=_block_keys(keys),
        num_warps=4,
        num_stages=2,
    )
    join_splits_kernel[num_decodes, num_heads](
        parts,
        part_sums,
        out,
        parts.stride(0),
        parts.stride(1),
        parts.stride(2),
        part_sums.stride(0),
        part_sums.stride(1),
        out.stride(0),
        out.stride(1),
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=padded,
        SPLITS=splits,
    )


def attend_prefills(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, layout: AttentionLayout
) -> None:
    """The prefills of a batch, into their rows of ``out`` [T, heads, d]."""
    num_heads, head_dim = q.shape[1:]
    block_size, kv_heads = keys.shape[1:3]
    num_prefills = len(layout.contexts) - layout.num_decodes
    grid = (triton.cdiv(layout.longest_prefill, _BLOCK_QUERIES), num_heads, num_prefills)
    prefill_attention_kernel[grid](
        q,
        keys,
        values,
        out,
        layout.tables,
        layout.contexts,
        layout.starts,
        layout.num_decodes,
        _scale(head_dim),
        q.stride(0),
        q.stride(1),
        keys.stride(1),
        keys.stride(2),
        layout.tables.stride(0),
        out.stride(0),
        out.stride(1),
        BLOCK_SIZE=block_size,
        GROUP=num_heads // kv_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=max(_MIN_DOT, triton.next_power_of_2(head_dim)),
        BLOCK_QUERIES=_BLOCK_QUERIES,
        BLOCK_KEYS=_block_keys(keys),
        num_warps=4,
        num_stages=2,
    )


def _num_splits(num_programs: int, max_context: int, num_processors: int) -> int:
    """A power of two, so that programs are about twice the processors where contexts allow."""
    wanted = min(2 * num_processors // num_programs, max_context // _SPLIT_TOKENS, _MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def _block_keys(keys: Tensor) -> int:
    """Keys at a time: two stages of them, and of their values, fit into an A10's 99 KiB of shared
    memory, for heads of 128 numbers."""
    return 64 if keys.element_size() <= 2 else 32


def _scale(head_dim: int) -> float:
    """Of the scores, for exponentials to the base of 2."""
    return math.log2(math.e) / math.sqrt(head_dim)

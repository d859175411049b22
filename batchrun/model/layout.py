"""Where everything of a ragged batch lies: index tensors, made once a step for all layers.

A batch packs sequences of different lengths. The operators want rectangles. What is here says how
to go from one to the other and back, so that the operators themselves need no loop over sequences.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from batchrun.model.batch import Batch
from batchrun.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Wave:
    """The n-th chunk of every prefill that has so many: ``chunks`` [k] of ``sequences`` [k]."""

    sequences: Tensor
    chunks: Tensor


@dataclass(frozen=True, slots=True)
class PrefillLayout:
    """How the P prefills of a batch, T tokens in all, lie for the Mamba-2 operators.

    For the convolution every sequence's tokens follow the K - 1 columns of its conv state, all in
    one row of E = T + P * (K - 1) columns ("extended"). For the scan each sequence is padded to
    whole chunks of Q tokens, C chunks in all, so that no chunk holds tokens of two sequences.

    ``slots`` [P]; ``is_new`` [P] bool, true where the slot's content must not be read;
    ``token_columns`` [T], ``state_columns`` and ``tail_columns`` [P, K - 1] index the extended
    row: a sequence's tokens, its old and its new conv state. ``token_cells`` [T] index the
    C * Q cells of the chunks. ``waves`` order the chunks for passing states along.
    """

    slots: Tensor
    is_new: Tensor
    num_columns: int
    token_columns: Tensor
    state_columns: Tensor
    tail_columns: Tensor
    num_chunks: int
    chunk_size: int
    token_cells: Tensor
    waves: tuple[Wave, ...]


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """n sequences of similar lengths, padded to Lq queries and Lk keys.

    ``query_tokens`` [n, Lq] index the packed tokens and ``key_rows`` [n, Lk] the rows of the KV
    pool (block * block_size + offset). Padding repeats a sequence's first query and first key, so
    that whatever stands in memory nobody wrote to is never touched; ``mask`` [n, 1, Lq, Lk] is
    true where a query sees a key. ``cells`` index the n * Lq results that belong to ``tokens``.
    """

    query_tokens: Tensor
    key_rows: Tensor
    mask: Tensor
    cells: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """``write_rows`` [T]: the row of the KV pool for each new token. ``groups``: who sees whom."""

    write_rows: Tensor
    groups: tuple[AttentionGroup, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one batch. ``prefill`` is None when nothing is prefilled or the model has no
    Mamba-2 layer, ``attention`` when it has no attention layer. ``decode_slots`` is [D]."""

    num_decodes: int
    decode_slots: Tensor
    prefill: PrefillLayout | None
    attention: AttentionLayout | None


def lay_out(batch: Batch, config: ModelConfig, block_size: int) -> Layout:
    """The layout of ``batch`` for a model and the block size of its KV pool."""
    has_prefill = batch.prefill_lens and config.num_mamba_layers
    return Layout(
        num_decodes=batch.num_decodes,
        decode_slots=batch.slots[: batch.num_decodes],
        prefill=_lay_out_prefill(batch, config) if has_prefill else None,
        attention=_lay_out_attention(batch, block_size) if config.num_attention_layers else None,
    )


def _lay_out_prefill(batch: Batch, config: ModelConfig) -> PrefillLayout:
    device = batch.token_ids.device
    lens = torch.tensor(batch.prefill_lens, device=device)  # [P]
    numbers = torch.arange(len(lens), device=device)  # [P]
    ends = lens.cumsum(0)  # [P]
    starts = ends - lens  # [P]
    sequence = torch.repeat_interleave(numbers, lens)  # [T] sequence of each token
    token = torch.arange(sum(batch.prefill_lens), device=device)  # [T]

    history = config.conv_kernel - 1
    step = torch.arange(history, device=device)  # [K - 1]
    first_columns = starts + numbers * history  # [P]

    # A chunk longer than the longest sequence would only add padding.
    chunk_size = min(config.chunk_size, max(batch.prefill_lens))
    num_chunks = (lens + chunk_size - 1) // chunk_size  # [P]
    first_chunks = num_chunks.cumsum(0) - num_chunks  # [P]
    offset = token - starts[sequence]  # [T] place in its sequence
    chunk_counts = [-(-length // chunk_size) for length in batch.prefill_lens]
    waves = []
    for n in range(max(chunk_counts)):
        sequences = (num_chunks > n).nonzero().squeeze(1)  # [k]
        waves.append(Wave(sequences, first_chunks[sequences] + n))
    return PrefillLayout(
        slots=batch.slots[batch.num_decodes :],
        is_new=torch.tensor(
            [length == 0 for length in batch.context_lens[batch.num_decodes :]], device=device
        ),
        num_columns=len(token) + len(lens) * history,
        token_columns=token + (sequence + 1) * history,
        state_columns=first_columns[:, None] + step,
        tail_columns=(first_columns + lens)[:, None] + step,
        num_chunks=sum(chunk_counts),
        chunk_size=chunk_size,
        token_cells=first_chunks[sequence] * chunk_size + offset,
        waves=tuple(waves),
    )


def _lay_out_attention(batch: Batch, block_size: int) -> AttentionLayout:
    device = batch.token_ids.device
    query_lens = torch.tensor(batch.query_lens, device=device)  # [S]
    contexts = torch.tensor(batch.context_lens, device=device)  # [S]
    starts = query_lens.cumsum(0) - query_lens  # [S] first token of each sequence
    sequence = torch.repeat_interleave(torch.arange(len(query_lens), device=device), query_lens)
    token = torch.arange(len(sequence), device=device)  # [T]
    position = token - starts[sequence] + contexts[sequence]  # [T] place in its sequence
    blocks = batch.block_tables[sequence, position // block_size]  # [T]

    groups = []
    for members in _similar(batch.query_lens, batch.context_lens):
        num_queries = max(batch.query_lens[i] for i in members)
        num_keys = max(batch.query_lens[i] + batch.context_lens[i] for i in members)
        who = torch.tensor(members, device=device)  # [n]
        query = torch.arange(num_queries, device=device)  # [Lq]
        is_query = query < query_lens[who, None]  # [n, Lq]
        query = torch.where(is_query, query, 0)  # [n, Lq]
        key = torch.arange(num_keys, device=device)  # [Lk]
        is_key = key < (contexts + query_lens)[who, None]  # [n, Lk]
        key_or_first = torch.where(is_key, key, 0)  # [n, Lk]
        tables = batch.block_tables[who]  # [n, max blocks]
        rows = tables.gather(1, key_or_first // block_size) * block_size
        query_tokens = starts[who, None] + query  # [n, Lq]
        groups.append(
            AttentionGroup(
                query_tokens=query_tokens,
                key_rows=rows + key_or_first % block_size,
                mask=(key <= (contexts[who, None] + query)[:, None, :, None]),
                cells=is_query.flatten().nonzero().squeeze(1),
                tokens=query_tokens[is_query],
            )
        )
    return AttentionLayout(blocks * block_size + position % block_size, tuple(groups))


_SHORTEST_BUCKET = 6
"""Contexts of up to 2 ** 6 tokens are padded to one another: that costs less than a group."""


def _similar(query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> list[list[int]]:
    """Sequence numbers, grouped so that padding at most about doubles the lengths of a group."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (queries, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        keys = max((queries + context - 1).bit_length(), _SHORTEST_BUCKET)
        groups[(queries - 1).bit_length(), keys].append(i)
    return list(groups.values())

"""Where everything of a ragged batch lies: index tensors, made once a step for all layers.

A batch packs sequences of different lengths. The operators want rectangles. What is here says how
to go from one to the other and back, so that the operators themselves need no loop over sequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from batchrun.model.batch import Batch, DecodeBatch
from batchrun.model.config import ModelConfig
from batchrun.model.transfer import to_device


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

    ``sequences`` [T] is the prefill of each token; ``starts`` and ``first_chunks`` [P + 1] are the
    first token and the first chunk of each prefill, and behind them T and C.
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
    sequences: Tensor
    starts: Tensor
    first_chunks: Tensor


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """n runs of queries of similar lengths, each of one sequence, padded to Lq queries, Lk keys.

    ``query_tokens`` [n, Lq] index the packed tokens and ``key_rows`` [n, Lk] the rows of the KV
    pool (block * block_size + offset). Padding repeats a run's first query and its sequence's
    first key, so that memory nobody wrote to is never touched. ``mask`` [n, 1, Lq, Lk] is true
    where a query sees a key. ``cells`` index those of the n * Lq results that are not padding,
    ``tokens`` the packed tokens they belong to.
    """

    query_tokens: Tensor
    key_rows: Tensor
    mask: Tensor
    cells: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """``write_rows`` [T]: the row of the KV pool for each new token. ``groups``: who sees whom.

    The same for kernels that follow the tables themselves: ``tables`` [S, n], ``contexts`` [S],
    ``starts`` [S + 1] the first token of each sequence, and behind them T. The first
    ``num_decodes`` sequences have one new token, the others at most ``longest_prefill``.
    """

    write_rows: Tensor
    groups: tuple[AttentionGroup, ...]
    tables: Tensor
    contexts: Tensor
    starts: Tensor
    num_decodes: int
    longest_prefill: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one batch. ``prefill`` is None when nothing is prefilled or the model has no
    Mamba-2 layer, ``attention`` when it has no attention layer. ``decode_slots`` is [D]."""

    num_decodes: int
    decode_slots: Tensor
    prefill: PrefillLayout | None
    attention: AttentionLayout | None


def lay_out(
    batch: Batch | DecodeBatch, config: ModelConfig, block_size: int, *, rectangles: bool = True
) -> Layout:
    """The layout of ``batch`` for a model and the block size of its KV pool.

    Without ``rectangles`` there are no ``waves`` and no ``groups``, which only operators made of
    whole-tensor functions need, and every chunk is as long as the config says.
    """
    if isinstance(batch, DecodeBatch):
        return _lay_out_decodes(batch, config, block_size, rectangles)
    has_prefill = batch.prefill_lens and config.num_mamba_layers
    attention = None
    if config.num_attention_layers:
        attention = _lay_out_attention(batch, block_size, rectangles)
    return Layout(
        num_decodes=batch.num_decodes,
        decode_slots=batch.slots[: batch.num_decodes],
        prefill=_lay_out_prefill(batch, config, rectangles) if has_prefill else None,
        attention=attention,
    )


def _lay_out_decodes(
    batch: DecodeBatch, config: ModelConfig, block_size: int, rectangles: bool
) -> Layout:
    """Worked out on the device, and nothing here waits for it."""
    num_decodes, device = len(batch.token_ids), batch.token_ids.device
    attention = None
    if config.num_attention_layers:
        rows = torch.arange(num_decodes + 1, device=device)  # [D + 1]
        position = batch.context_lens  # [D] place of the new token
        blocks = batch.block_tables.gather(1, (position // block_size)[:, None]).squeeze(1)  # [D]
        groups: tuple[AttentionGroup, ...] = ()
        if rectangles:
            offsets = torch.arange(block_size, device=device)
            key_rows = (batch.block_tables[..., None] * block_size + offsets).flatten(1)  # [D, Lk]
            key = torch.arange(key_rows.shape[1], device=device)  # [Lk]
            is_seen = key <= position[:, None]  # [D, Lk]
            group = AttentionGroup(
                query_tokens=rows[:-1, None],
                key_rows=torch.where(is_seen, key_rows, key_rows[:, :1]),
                mask=is_seen[:, None, None],
                cells=rows[:-1],
                tokens=rows[:-1],
            )
            groups = (group,)
        attention = AttentionLayout(
            write_rows=blocks * block_size + position % block_size,
            groups=groups,
            tables=batch.block_tables,
            contexts=position,
            starts=rows,
            num_decodes=num_decodes,
            longest_prefill=0,
        )
    return Layout(num_decodes, batch.slots, None, attention)


def _lay_out_prefill(batch: Batch, config: ModelConfig, rectangles: bool) -> PrefillLayout:
    device = batch.token_ids.device
    lens = to_device(batch.prefill_lens, device)  # [P]
    numbers = torch.arange(len(lens), device=device)  # [P]
    ends = lens.cumsum(0)  # [P]
    starts = ends - lens  # [P]
    num_tokens = sum(batch.prefill_lens)
    # Told how long the result is, it need not be asked for.
    sequence = torch.repeat_interleave(numbers, lens, output_size=num_tokens)  # [T]
    token = torch.arange(num_tokens, device=device)  # [T]

    history = config.conv_kernel - 1
    step = torch.arange(history, device=device)  # [K - 1]
    first_columns = starts + numbers * history  # [P]

    chunk_size = config.chunk_size
    if rectangles:
        # A chunk longer than the longest sequence would only add padding.
        chunk_size = min(chunk_size, max(batch.prefill_lens))
    num_chunks = (lens + chunk_size - 1) // chunk_size  # [P]
    first_chunks = num_chunks.cumsum(0) - num_chunks  # [P]
    offset = token - starts[sequence]  # [T] place in its sequence
    chunk_counts = [-(-length // chunk_size) for length in batch.prefill_lens]
    waves = []
    for n in range(max(chunk_counts) if rectangles else 0):
        sequences = (num_chunks > n).nonzero().squeeze(1)  # [k]
        waves.append(Wave(sequences, first_chunks[sequences] + n))
    return PrefillLayout(
        slots=batch.slots[batch.num_decodes :],
        is_new=to_device(
            [length == 0 for length in batch.context_lens[batch.num_decodes :]], device, torch.bool
        ),
        num_columns=len(token) + len(lens) * history,
        token_columns=token + (sequence + 1) * history,
        state_columns=first_columns[:, None] + step,
        tail_columns=(first_columns + lens)[:, None] + step,
        num_chunks=sum(chunk_counts),
        chunk_size=chunk_size,
        token_cells=first_chunks[sequence] * chunk_size + offset,
        waves=tuple(waves),
        sequences=sequence,
        starts=torch.cat([starts, ends[-1:]]),
        first_chunks=torch.cat([first_chunks, num_chunks.sum(0, keepdim=True)]),
    )


def _lay_out_attention(batch: Batch, block_size: int, rectangles: bool) -> AttentionLayout:
    device = batch.token_ids.device
    query_lens = to_device(batch.query_lens, device)  # [S]
    contexts = to_device(batch.context_lens, device)  # [S]
    ends = query_lens.cumsum(0)  # [S]
    starts = ends - query_lens  # [S] first token of each sequence
    sequence = torch.repeat_interleave(
        torch.arange(len(query_lens), device=device), query_lens, output_size=len(batch.token_ids)
    )  # [T]
    token = torch.arange(len(sequence), device=device)  # [T]
    position = token - starts[sequence] + contexts[sequence]  # [T] place in its sequence
    blocks = batch.block_tables[sequence, position // block_size]  # [T]
    write_rows = blocks * block_size + position % block_size  # [T]

    groups = []
    offsets = torch.arange(block_size, device=device)  # [block_size]
    cut = _cut(batch.query_lens, batch.context_lens) if rectangles else iter(())
    for pieces in _similar(cut):
        who = torch.tensor([piece.sequence for piece in pieces], device=device)  # [n]
        first = torch.tensor([piece.first_query for piece in pieces], device=device)  # [n]
        num_queries = torch.tensor([piece.num_queries for piece in pieces], device=device)  # [n]
        num_keys = torch.tensor([piece.num_keys for piece in pieces], device=device)  # [n]
        query = torch.arange(max(piece.num_queries for piece in pieces), device=device)  # [Lq]
        key = torch.arange(max(piece.num_keys for piece in pieces), device=device)  # [Lk]
        is_query = query < num_queries[:, None]  # [n, Lq]
        query = torch.where(is_query, query, 0)  # [n, Lq]
        query_tokens = (starts[who] + first)[:, None] + query  # [n, Lq]
        query_positions = (num_keys - num_queries)[:, None] + query  # [n, Lq]
        tables = batch.block_tables[who, : -(-len(key) // block_size)]  # [n, blocks]
        rows = (tables[..., None] * block_size + offsets).flatten(1)[:, : len(key)]  # [n, Lk]
        groups.append(
            AttentionGroup(
                query_tokens=query_tokens,
                key_rows=torch.where(key < num_keys[:, None], rows, rows[:, :1]),
                mask=key <= query_positions[:, None, :, None],
                cells=is_query.flatten().nonzero().squeeze(1),
                tokens=query_tokens[is_query],
            )
        )
    return AttentionLayout(
        write_rows=write_rows,
        groups=tuple(groups),
        tables=batch.block_tables,
        contexts=contexts,
        starts=torch.cat([starts, ends[-1:]]),
        num_decodes=batch.num_decodes,
        longest_prefill=max(batch.prefill_lens, default=0),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring new tokens of a sequence: the last ``num_queries`` of ``num_keys`` tokens."""

    sequence: int
    first_query: int
    num_queries: int
    num_keys: int


_MAX_QUERIES = 256
"""Longer prefills are cut: the second piece sees the first, the first need not see the second."""


def _cut(query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> Iterator[_Piece]:
    for i, (queries, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        for first in range(0, queries, _MAX_QUERIES):
            last = min(first + _MAX_QUERIES, queries)
            yield _Piece(i, first, last - first, context + last)


_MIN_KEYS_BITS = 6
"""Contexts of up to 2 ** 6 tokens are padded to one another: that costs less than a group."""

_MAX_KEYS = 8192
"""Keys gathered for a group, padding included, unless one run alone needs more: a bound on memory,
and small enough that what was gathered is still in the cache when it is read."""


def _similar(pieces: Iterator[_Piece]) -> list[list[_Piece]]:
    """Pieces in groups, so that padding at most about doubles the lengths in a group."""
    groups: dict[tuple[int, int], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        keys_bits = max((piece.num_keys - 1).bit_length(), _MIN_KEYS_BITS)
        groups[(piece.num_queries - 1).bit_length(), keys_bits].append(piece)
    bounded = []
    for (_, keys_bits), group in groups.items():
        size = max(1, _MAX_KEYS >> keys_bits)
        bounded += [group[i : i + size] for i in range(0, len(group), size)]
    return bounded

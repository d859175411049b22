"""What one forward pass computes: tokens of many sequences, packed into one row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one step, packed: decodes (one token each) first, then prefills.

    D decodes, P prefills, S = D + P sequences, T tokens, L wanted logits. What tells a decode from
    a prefill is the state, never the number of tokens: a decode continues a state that holds at
    least one token, while a prefill brings any number of tokens (one is fine) and starts from
    nothing where ``context_lens`` is 0, from its state where it is more.

    ==================  ==============  ===========================================================
    ``token_ids``       [T] int64       the D tokens of the decodes, then the prefills' one by one
    ``num_decodes``     D
    ``prefill_lens``    P ints          tokens of each prefill in this step; D + their sum = T
    ``slots``           [S] int64       state slot of each sequence; unique but for scratch slot 0
    ``context_lens``    S ints          tokens that the state holds before this step; where it is
                                        0, what stands in the slot is never read
    ``block_tables``    [S, n] int64    KV blocks of each sequence in order, enough for its context
                                        and its new tokens; the rest is 0, the scratch block
    ``logit_rows``      [L] int64       packed positions whose logits are wanted
    ==================  ==============  ===========================================================

    All tensors are on the model's device. A padding row is a decode with slot 0, a block table of
    zeros and a context of 1. Raises ``ValueError`` when the numbers contradict one another.
    """

    token_ids: Tensor
    num_decodes: int
    prefill_lens: tuple[int, ...]
    slots: Tensor
    context_lens: tuple[int, ...]
    block_tables: Tensor
    logit_rows: Tensor

    def __post_init__(self) -> None:
        num_sequences = self.num_decodes + len(self.prefill_lens)
        if self.token_ids.shape != (self.num_decodes + sum(self.prefill_lens),):
            raise ValueError(
                f"{tuple(self.token_ids.shape)} token ids for {self.num_decodes} decodes and "
                f"prefills of {self.prefill_lens}"
            )
        if not (
            len(self.context_lens) == len(self.slots) == len(self.block_tables) == num_sequences
        ):
            raise ValueError(
                f"{num_sequences} sequences, but {len(self.context_lens)} context lengths, "
                f"{len(self.slots)} slots, {len(self.block_tables)} block tables"
            )
        if min(self.prefill_lens, default=1) < 1:
            raise ValueError(f"a prefill without tokens: {self.prefill_lens}")
        if min(self.context_lens[: self.num_decodes], default=1) < 1:
            raise ValueError("a decode without context: its state was never written")

    @property
    def query_lens(self) -> tuple[int, ...]:
        """New tokens of each of the S sequences: 1 for decodes, then ``prefill_lens``."""
        return (1,) * self.num_decodes + self.prefill_lens


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """A batch of decodes alone that is described by tensors on the device and by nothing else.

    So the same shapes can be run again with other contents, by a CUDA graph too. D rows:
    ``token_ids``, ``slots`` and ``context_lens`` [D] int64, ``block_tables`` [D, n] int64; they
    mean what they do in :class:`Batch`, padding rows included. Logits are made for every row. That
    each context is at least 1 and its blocks are in the table is the caller's word: looking would
    mean to wait for the device.
    """

    token_ids: Tensor
    slots: Tensor
    context_lens: Tensor
    block_tables: Tensor

    @property
    def logit_rows(self) -> slice:
        """All of them."""
        return slice(None)

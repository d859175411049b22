"""A batch whose numbers contradict one another is refused before it corrupts a state."""

from __future__ import annotations

import pytest
import torch

from batchrun.model.batch import Batch


def make_batch(
    num_tokens: int = 5,
    num_decodes: int = 2,
    prefill_lens: tuple[int, ...] = (3,),
    context_lens: tuple[int, ...] = (4, 1, 0),
    num_slots: int = 3,
) -> Batch:
    """Two decodes and a prefill of three tokens, or what is made of them."""
    return Batch(
        token_ids=torch.zeros(num_tokens, dtype=torch.long),
        num_decodes=num_decodes,
        prefill_lens=prefill_lens,
        slots=torch.arange(num_slots),
        context_lens=context_lens,
        block_tables=torch.zeros(num_slots, 2, dtype=torch.long),
        logit_rows=torch.tensor([0]),
    )


def test_query_lens() -> None:
    """Every decode brings one token, every prefill its own number."""
    assert make_batch().query_lens == (1, 1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 6}, "token ids"),
        ({"prefill_lens": (3, 0), "context_lens": (4, 1, 0, 0), "num_slots": 4}, "without tokens"),
        ({"context_lens": (4, 1)}, "context lengths"),
        ({"num_slots": 4}, "4 slots"),
        ({"context_lens": (4, 0, 0)}, "decode without context"),
    ],
)
def test_contradictions(changes: dict[str, object], message: str) -> None:
    """Counts that do not fit, empty prefills and decodes from an unwritten state are refused."""
    with pytest.raises(ValueError, match=message):
        make_batch(**changes)  # type: ignore[arg-type]

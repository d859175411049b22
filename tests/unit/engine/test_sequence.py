"""A sequence: what its state holds decides what comes next, never the length of a chunk."""

from __future__ import annotations

from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.engine.sequence import Sequence
from batchrun.engine.thinking import ForcedClose, Thinking
from batchrun.engine.transcript import Transcript


def make(num_prompt: int, *, budget: int | None = None) -> Sequence:
    """A sequence of a prompt of 7s; with a budget it thinks, and a forced close is all 9s."""
    close = ForcedClose(lambda text: [9] * len(text))
    thinking = None if budget is None else Thinking(close, budget=budget, grace=0, latest=100)
    transcript = Transcript(
        [b"x"] * 10, thinking, stop_ids=frozenset(), stops=(), max_tokens=100, min_tokens=0
    )
    request = Request("k", (7,) * num_prompt, SamplingParams())
    return Sequence(request, transcript, num_reserved=200, added_at=0.0)


def test_a_prompt_of_one_token_prefills_first() -> None:
    """Its state holds nothing; taking it for a decode would read what another one left."""
    sequence = make(1)
    assert not sequence.is_decoding and sequence.is_in_prompt
    sequence.num_context = 1
    sequence.append(3, None)
    assert sequence.is_decoding and not sequence.is_in_prompt


def test_forced_tokens_wait_beside_the_one_they_follow() -> None:
    """The sampled token and the close are pending together, so they are one prefill."""
    sequence = make(4, budget=1)
    sequence.num_context = 4
    sequence.append(3, None)
    assert sequence.tokens == [7, 7, 7, 7, 3, *[9] * len("\n</think>\n\n")]
    assert sequence.num_pending == 12 and not sequence.is_decoding


def test_a_budget_of_0_is_a_part_of_the_first_prefill() -> None:
    """The close stands behind the prompt before anything is run."""
    sequence = make(4, budget=0)
    assert sequence.tokens == [7] * 4 + [9] * len("</think>\n\n")
    assert sequence.num_context == 0 and sequence.is_in_prompt

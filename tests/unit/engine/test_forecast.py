"""What is expected of a request, from those that have ended."""

from __future__ import annotations

from batchrun.engine.forecast import Forecast
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.engine.sequence import Sequence
from batchrun.engine.thinking import ForcedClose, Thinking
from batchrun.engine.transcript import Transcript

TEXT = [b"a", b"</think>", b""]
STOP = 2


def sequence(
    num_prompt: int = 10,
    *,
    thinking: bool = False,
    max_tokens: int = 100,
    budget: int | None = None,
) -> Sequence:
    """A request that nothing has been sampled for."""
    params = SamplingParams(max_tokens=max_tokens, max_thinking_tokens=budget, answer_reserve=0)
    close = ForcedClose(lambda text: [0] * len(text))
    latest = max_tokens
    state = Thinking(close, budget=budget, grace=0, latest=latest) if thinking else None
    transcript = Transcript(
        TEXT, state, stop_ids=frozenset({STOP}), stops=(), max_tokens=max_tokens, min_tokens=0
    )
    request = Request("r", (0,) * num_prompt, params, thinking=thinking)
    return Sequence(request, transcript, num_reserved=1, added_at=0.0)


def ended(reasoning: int, completion: int, **how: object) -> Sequence:
    """A sequence of so many tokens; it stops, or runs into its limit or budget before."""
    made = sequence(**how)  # type: ignore[arg-type]
    tokens = [0] * (reasoning - 1) + [1] * (reasoning > 0) + [0] * (completion - 1) + [STOP]
    for token in tokens:
        if made.transcript.finish_reason is None:
            made.append(token, None)
    return made


def seen(*sequences: Sequence) -> Forecast:
    """A forecast that has seen each of them eight times."""
    forecast = Forecast(1000)
    for _ in range(8):
        for one in sequences:
            forecast.observe(one)
    return forecast


def test_the_limit_is_expected_until_enough_is_known() -> None:
    """Seven say nothing, eight do; and what is expected changes with the version alone."""
    forecast = Forecast(1000)
    for _ in range(7):
        forecast.observe(ended(0, 20))
        assert forecast.num_tokens(sequence()) == 100
    assert forecast.version == 0
    forecast.observe(ended(0, 20))
    assert forecast.version == 1
    assert forecast.num_tokens(sequence()) == 20
    forecast.observe(ended(0, 90))
    assert forecast.num_tokens(sequence()) == 20


def test_a_limit_bounds_what_is_expected() -> None:
    """The mean of what had been under this very limit."""
    forecast = seen(ended(0, 10), ended(0, 90))
    assert forecast.num_tokens(sequence(max_tokens=100)) == 50
    assert forecast.num_tokens(sequence(max_tokens=30)) == 20
    assert forecast.num_tokens(sequence(max_tokens=5)) == 5


def test_what_was_cut_off_may_have_been_of_any_length() -> None:
    """Under a larger limit it would have gone on."""
    forecast = seen(ended(0, 900, max_tokens=50), ended(0, 20))
    assert forecast.num_tokens(sequence(max_tokens=50)) == 35
    assert forecast.num_tokens(sequence(max_tokens=400)) == 210


def test_thinking_is_expected_apart_and_within_its_budget() -> None:
    """Reasoning and answer add up; a budget bounds the reasoning alone."""
    forecast = seen(ended(40, 10, thinking=True), ended(0, 5))
    assert forecast.num_tokens(sequence(thinking=True)) == 50
    assert forecast.num_tokens(sequence(thinking=True, budget=15)) == 25
    assert forecast.num_tokens(sequence(thinking=False)) == 5


def test_a_reasoning_that_hit_its_budget_says_no_more_than_that() -> None:
    """Without the budget it would have been longer, as far as the limit goes."""
    forecast = seen(ended(9, 4, thinking=True, budget=8))
    assert forecast.num_tokens(sequence(thinking=True, budget=8)) == 8 + 5
    assert forecast.num_tokens(sequence(thinking=True, max_tokens=60)) == 60


def test_prompts_of_a_length_have_answers_of_a_length() -> None:
    """Where enough of them are known; else those of all lengths count."""
    forecast = seen(ended(0, 10, num_prompt=20), ended(0, 70, num_prompt=500))
    assert forecast.num_tokens(sequence(25)) == 10
    assert forecast.num_tokens(sequence(400)) == 70
    assert forecast.num_tokens(sequence(5000)) == 40


def test_ranks_grow_with_the_work_of_prompt_and_output() -> None:
    """Close expectations are one rank."""
    forecast = seen(ended(0, 40))
    assert forecast.rank(sequence(10)) == forecast.rank(sequence(300))
    assert forecast.rank(sequence(100_000)) > forecast.rank(sequence(10))
    assert forecast.rank(sequence(10, max_tokens=10)) < forecast.rank(sequence(10))

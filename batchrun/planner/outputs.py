"""How many tokens rows will generate: nobody knows, so low, expected and high."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchrun.engine.params import SamplingParams
from batchrun.engine.tokenizer import Tokenizer
from batchrun.job import Generation
from batchrun.records import Counts

_REASONING_SHARES = (1 / 8, 1 / 2, 1.0)
_ANSWER_SHARES = (1 / 64, 1 / 4, 1.0)
_SPREAD = (0.8, 1.0, 1.25)
"""Around a mean that was measured on rows that are done."""


@dataclass(frozen=True, slots=True)
class Range:
    """A figure that is not known: what it is if things go well, what to expect, and at worst."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Range:
        """All three multiplied."""
        return Range(self.low * factor, self.expected * factor, self.high * factor)

    def plus(self, other: Range) -> Range:
        """Two figures together."""
        return Range(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def at_most(self, limit: float) -> Range:
        """None of the three above ``limit``."""
        return Range(min(self.low, limit), min(self.expected, limit), min(self.high, limit))


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is known beyond the job about the length of outputs, in tokens a sample: ``given`` by a
    person, or ``measured`` on samples that the output holds already; ``choices`` is how long the
    listed completions are, where the job binds completions to a list."""

    given: int | None = None
    measured: float | None = None
    choices: Range | None = None

    def of(self, params: SamplingParams, *, thinking: bool) -> Range:
        """Tokens that a sample with ``params`` generates, reasoning and completion together."""
        limit = params.max_tokens or 0
        if params.ignore_eos:
            return Range(limit, limit, limit)
        if self.given is not None:
            return Range(self.given, self.given, self.given).at_most(limit)
        if self.measured is not None:
            low, expected, high = (self.measured * share for share in _SPREAD)
            return Range(low, expected, high).at_most(limit)
        reasoning = Range(0.0, 0.0, 0.0)
        room = float(limit)
        if thinking:
            most = max(0, limit - params.reserve_of(limit))
            if params.max_thinking_tokens is not None:
                most = min(most, params.max_thinking_tokens + params.thinking_grace)
            low, expected, high = (most * share for share in _REASONING_SHARES)
            reasoning = Range(low, expected, high)
            room = limit - most
        if self.choices is not None:
            return reasoning.plus(self.choices).at_most(limit)
        low, expected, high = (room * share for share in _ANSWER_SHARES)
        return reasoning.plus(Range(low, expected, high)).at_most(limit)


def expect(
    generation: Generation,
    tokenizer: Tokenizer,
    *,
    given: int | None = None,
    done: Counts | None = None,
) -> Expectation:
    """What is known before the run; ``done`` counts what the output holds of it already."""
    measured = None
    if done is not None and done.rows > done.failed_rows:
        samples = (done.rows - done.failed_rows) * generation.n
        measured = done.output_tokens / samples
    return Expectation(given, measured, _choices(generation, tokenizer))


def explain(expectation: Expectation, generation: Generation) -> tuple[str, ...]:
    """The assumptions, one a line."""
    most = f"max_tokens {generation.max_tokens:,}"
    if generation.ignore_eos:
        return (f"ignore_eos: every sample generates {most}",)
    if expectation.given is not None:
        return (f"{expectation.given:,} tokens a sample, as said by --expect-tokens",)
    if expectation.measured is not None:
        return (
            f"{expectation.measured:,.0f} tokens a sample, the mean of those that the output holds "
            "already; low 80 %, high 125 % of it",
        )
    lines = []
    if generation.reasoning:
        budget = generation.max_thinking_tokens
        room = "max_tokens less the answer's reserve" if budget is None else f"{budget:,} tokens"
        lines.append(
            f"reasoning is on, with room for {room}: low 1/8, expected 1/2, high all of it "
            "(assumed)"
        )
    else:
        lines.append("reasoning is off")
    if expectation.choices is not None:
        lines.append("the completion is one of the job's choices, and takes their tokens")
    else:
        left = f"what the reasoning leaves of {most}" if generation.reasoning else most
        lines.append(f"the completion takes of {left}: low 1/64, expected 1/4, high all (assumed)")
    lines.append("--expect-tokens N takes the place of these assumptions")
    return tuple(lines)


def _choices(generation: Generation, tokenizer: Tokenizer) -> Range | None:
    written = generation.response_format
    if written is None or written.get("type") != "choice":
        return None
    texts = written["choices"]
    assert isinstance(texts, Sequence)
    lengths = [len(tokenizer.encode_plain(str(text))) + 1 for text in texts]  # and the stop token
    return Range(min(lengths), sum(lengths) / len(lengths), max(lengths))

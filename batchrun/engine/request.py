"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from batchrun.engine.params import SamplingParams
from batchrun.records import FinishReason, Generated, RowError


@dataclass(frozen=True, slots=True)
class Request:
    """One sample of one prompt.

    ``key`` is the caller's name for the prompt; (key, sample) is unique among the requests in the
    engine. ``seed`` (any integer, its low 64 bits count) and ``sample`` determine the random
    numbers; ``params.seed`` and ``params.n`` are not looked at. ``thinking`` says that the prompt
    leaves ``<think>`` open, so the output begins with reasoning.

    ``generated`` is what was sampled for the same prompt, seed, sample and sampling parameters
    before, with any thinking budget and any ``max_tokens``, and up to any token. It is taken over
    as far as this request would sample the same, without running a step for it: up to where the
    one was made to close its reasoning and the other was not, or to where this one ends. Then the
    generation goes on from there, with the random numbers of that position. A deterministic engine
    runs the steps for it all the same, as a token that is read back is rounded otherwise than one
    that was sampled.
    """

    key: Hashable
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    sample: int = 0
    thinking: bool = False
    generated: Generated | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of a sequence: in the queue, until its first sampled token, in all (since add)."""

    queued_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Output:
    """A finished sample.

    ``text`` is the completion, ``reasoning`` the trace before ``</think>`` (None when there is
    none). ``token_ids`` are all tokens after the prompt, forced ones included; ``logprobs``, when
    asked for, has one entry a token, None for a forced one. ``num_reasoning_tokens`` and
    ``num_completion_tokens`` count sampled tokens, so forced ones are in neither. ``prefix_tokens``
    of the ``prompt_tokens`` came with the state of another prompt that begins alike; how many
    depends on what ran before. ``error`` is set exactly when ``finish_reason`` is ``error``.
    """

    key: Hashable
    sample: int
    text: str
    reasoning: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_reasoning_tokens: int = 0
    num_completion_tokens: int = 0
    thinking_budget_hit: bool = False
    logprobs: tuple[float | None, ...] | None = None
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    timings: Timings = Timings()
    error: RowError | None = None

    @property
    def generated(self) -> Generated:
        """What was sampled, for another request of the same prompt to take over."""
        start = self.num_reasoning_tokens
        end = len(self.token_ids) - self.num_completion_tokens
        closed = self.thinking_budget_hit
        sampled = (
            None
            if self.logprobs is None
            else tuple(value for value in self.logprobs if value is not None)
        )
        return Generated(
            token_ids=(*self.token_ids[:start], *self.token_ids[end:]),
            logprobs=sampled,
            closed_after=start if closed else None,
        )

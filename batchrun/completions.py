"""Finished samples as the output holds them: from what the engine says, or from an error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from batchrun.engine.request import Output
from batchrun.records import Completion, FinishReason, Row, RowError
from batchrun.tools import parse_calls


def completion_of(row: Row, output: Output) -> Completion:
    """What the engine made of a sample of ``row``."""
    if output.error is not None:
        return failed_sample(row, output.sample, output.error, output.prompt_tokens)
    return Completion(
        ordinal=row.ordinal,
        sample=output.sample,
        id=row.id,
        completion=output.text,
        reasoning=output.reasoning,
        finish_reason=output.finish_reason,
        prompt_tokens=output.prompt_tokens,
        reasoning_tokens=output.num_reasoning_tokens,
        completion_tokens=output.num_completion_tokens,
        thinking_budget_hit=output.thinking_budget_hit,
        logprobs=output.logprobs,
    )


def with_calls(completion: Completion) -> Completion:
    """The completion with its tool calls taken out of the text, where it has any."""
    if completion.completion is None:
        return completion
    reply = parse_calls(completion.completion)
    if reply.calls is None:
        return completion
    return replace(
        completion,
        completion=reply.text,
        tool_calls=reply.calls,
        finish_reason=FinishReason.TOOL_CALLS,
    )


def failed_sample(row: Row, sample: int, error: RowError, prompt_tokens: int = 0) -> Completion:
    """A sample that there is none of, and why."""
    return Completion(
        ordinal=row.ordinal,
        sample=sample,
        id=row.id,
        completion=None,
        reasoning=None,
        finish_reason=FinishReason.ERROR,
        prompt_tokens=prompt_tokens,
        error=str(error),
    )


def in_order(samples: Iterable[Completion]) -> list[Completion]:
    """The samples of a row by their number."""
    return sorted(samples, key=lambda item: item.sample)

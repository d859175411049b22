"""How much work a request will be, judged by those that have ended. No tensors."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import accumulate

from batchrun.engine.sequence import Sequence
from batchrun.records import FinishReason

_KEPT = 256
"""Ended sequences of a kind that are remembered."""
_ENOUGH = 8
"""Fewer say nothing."""
_REVISE_AFTER = 1024
"""Sequences between two revisions at most; at the beginning they come at every doubling."""
_RANKS_PER_DOUBLING = 4
"""Expectations closer than this are one rank, so that noise does not reorder the rows."""


class _Lengths:
    """Numbers of tokens, the latest ``_KEPT``; infinite where a limit cut the text off."""

    __slots__ = ("_kept", "_ordered", "_sums")

    def __init__(self) -> None:
        self._kept: deque[float] = deque(maxlen=_KEPT)
        self._ordered: list[float] = []
        self._sums: list[float] = [0.0]

    def add(self, num_tokens: int, *, is_cut: bool) -> None:
        self._kept.append(math.inf if is_cut else num_tokens)

    def revise(self) -> None:
        self._ordered = sorted(self._kept)
        self._sums = [0.0, *accumulate(self._ordered)]

    def mean(self, limit: int) -> float | None:
        """The mean under a limit; None where too few are known."""
        count = len(self._ordered)
        if count < _ENOUGH:
            return None
        below = bisect_right(self._ordered, limit)
        return (self._sums[below] + (count - below) * limit) / count


@dataclass(slots=True)
class _Kind:
    """Sequences that are alike: thinking or not, with prompts of about one length."""

    reasoning: _Lengths = field(default_factory=_Lengths)
    completion: _Lengths = field(default_factory=_Lengths)


class Forecast:
    """Expects of a request what requests like it have turned out to be, within its own limits.

    Alike are those that think (or do not), and among them those with a prompt of about the same
    length. Where too few have ended, the limit itself is expected. Expectations change only when
    ``version`` does, so an order made by them holds until then.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        """So many tokens of a prompt take as long as one sampled token."""
        self._max_batch_tokens = max_batch_tokens
        self._kinds: defaultdict[tuple[bool, int | None], _Kind] = defaultdict(_Kind)
        self._num_observed = 0
        self._revise_at = _ENOUGH
        self.version = 0

    def observe(self, sequence: Sequence) -> None:
        """Take note of a sequence that has ended."""
        transcript = sequence.transcript
        is_cut = transcript.finish_reason is FinishReason.LENGTH
        num_reasoning, num_completion = (
            transcript.num_reasoning_tokens,
            transcript.num_completion_tokens,
        )
        for key in _kinds(sequence):
            kind = self._kinds[key]
            if sequence.request.thinking:
                is_open = is_cut and not num_completion
                kind.reasoning.add(num_reasoning, is_cut=transcript.budget_hit or is_open)
                if is_open:
                    continue
            kind.completion.add(num_completion, is_cut=is_cut)
        self._num_observed += 1
        if self._num_observed >= self._revise_at:
            self._revise()

    def rank(self, sequence: Sequence) -> int:
        """The expected work, in logarithmic ranks: higher is longer."""
        work = max(0.0, self.num_tokens(sequence) - sequence.num_replayed)
        work += len(sequence.request.prompt_token_ids) / self._max_batch_tokens
        return round(_RANKS_PER_DOUBLING * math.log2(1 + work))

    def num_tokens(self, sequence: Sequence) -> float:
        """How many tokens are expected to be sampled."""
        params = sequence.request.params
        limit = sequence.transcript.max_tokens
        reasoning: float | None = 0.0
        if sequence.request.thinking:
            most = limit - params.reserve_of(limit)
            if params.max_thinking_tokens is not None:
                most = min(most, params.max_thinking_tokens + params.thinking_grace)
            reasoning = self._mean(sequence, max(0, most), thinking=True)
        completion = self._mean(sequence, limit, thinking=False)
        if reasoning is None or completion is None:
            return limit
        return min(limit, reasoning + completion)

    def _mean(self, sequence: Sequence, limit: int, *, thinking: bool) -> float | None:
        for key in _kinds(sequence):
            kind = self._kinds[key]
            mean = (kind.reasoning if thinking else kind.completion).mean(limit)
            if mean is not None:
                return mean
        return None

    def _revise(self) -> None:
        for kind in self._kinds.values():
            kind.reasoning.revise()
            kind.completion.revise()
        self._revise_at = self._num_observed + min(self._num_observed, _REVISE_AFTER)
        self.version += 1


def _kinds(sequence: Sequence) -> tuple[tuple[bool, int | None], ...]:
    """What a sequence is like, the closer kind first."""
    request = sequence.request
    return (request.thinking, len(request.prompt_token_ids).bit_length()), (request.thinking, None)

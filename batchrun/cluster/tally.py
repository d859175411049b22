"""Counting a run as it goes: what is done, how fast, how long it will take. No Ray, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from batchrun.records import Counts, Part

_RATE_WINDOW_S = 30.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run, for people. ``done`` holds rows published and rows waiting for their
    part alike; ``generated`` what this process's workers did, without what was there before."""

    total_rows: int
    done: Counts
    generated: Counts
    num_shards: int
    done_shards: int
    failed_shards: int
    workers: Mapping[str, int]
    elapsed_s: float
    rows_per_s: float
    tokens_per_s: float
    eta_s: float | None
    note: str = ""

    @property
    def left_rows(self) -> int:
        """Rows that are neither answered nor failed."""
        return max(0, self.total_rows - self.done.rows)


@dataclass(slots=True)
class Tally:
    """Sums over shards: published ones once and for all, running ones by their attempt."""

    total_rows: int
    num_shards: int
    before: Mapping[int, Part]
    published: dict[int, Counts] = field(init=False)
    failed: dict[int, int] = field(default_factory=dict)
    discarded_tokens: int = 0
    sampled_tokens: dict[str, int] = field(default_factory=dict)  # by worker, dead ones too
    prefix_tokens: dict[str, int] = field(default_factory=dict)  # the same
    _running: dict[str, tuple[str, Counts]] = field(default_factory=dict)
    _published: Counts = field(init=False)
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.published = {number: part.counts for number, part in self.before.items()}
        self._published = sum(self.published.values(), Counts())

    def run(self, worker: str, attempt: str, counts: Counts) -> None:
        """What a worker has finished of a shard that is not published yet."""
        self._running[attempt] = (worker, counts)

    def publish(self, attempt: str, part: Part) -> None:
        """A shard is done; its rows no longer count as running."""
        self._running.pop(attempt, None)
        if part.shard not in self.published:
            self.published[part.shard] = part.counts
            self._published += part.counts
        self.failed.pop(part.shard, None)

    def fail(self, shard: int, num_rows: int) -> None:
        """A shard has failed for good; all its rows count as failed."""
        self.failed[shard] = num_rows

    def give_up(self, attempt: str) -> None:
        """An attempt ended without a part; what it made is lost."""
        self._discard(attempt)

    def lose(self, worker: str) -> None:
        """A worker is lost, and with it the tokens that it made and did not publish."""
        for attempt in [key for key, (owner, _) in self._running.items() if owner == worker]:
            self._discard(attempt)

    def _discard(self, attempt: str) -> None:
        _, lost = self._running.pop(attempt, ("", Counts()))
        self.discarded_tokens += lost.reasoning_tokens + lost.completion_tokens

    def done(self) -> Counts:
        """Rows published, waiting for their part, or failed with their shard."""
        lost = sum(self.failed.values())
        total = self._published + Counts(rows=lost, failed_rows=lost)
        for _, counts in self._running.values():
            total += counts
        return total

    def generated(self) -> Counts:
        """:meth:`done` without what was there before this submit."""
        return _difference(self.done(), sum((p.counts for p in self.before.values()), Counts()))

    def progress(self, now: float, started: float, workers: Mapping[str, int]) -> Progress:
        """The progress at ``now``; rates are over the last half minute."""
        done = self.done()
        tokens = sum(self.sampled_tokens.values())
        self._samples.append((now, done.rows, tokens))
        while len(self._samples) > 2 and now - self._samples[0][0] > _RATE_WINDOW_S:
            self._samples.popleft()
        first_time, first_rows, first_tokens = self._samples[0]
        seconds = now - first_time
        rows_per_s = max(0.0, (done.rows - first_rows) / seconds) if seconds else 0.0
        tokens_per_s = max(0.0, (tokens - first_tokens) / seconds) if seconds else 0.0
        left = max(0, self.total_rows - done.rows)
        return Progress(
            total_rows=self.total_rows,
            done=done,
            generated=self.generated(),
            num_shards=self.num_shards,
            done_shards=len(self.published),
            failed_shards=len(self.failed),
            workers=dict(workers),
            elapsed_s=now - started,
            rows_per_s=rows_per_s,
            tokens_per_s=tokens_per_s,
            eta_s=left / rows_per_s if rows_per_s and left else (0.0 if not left else None),
        )


def _difference(counts: Counts, before: Counts) -> Counts:
    """Rows and tokens of ``counts`` without those of ``before``; scores have no use for it."""
    return replace(counts, scores=None) + Counts(
        -before.rows,
        -before.failed_rows,
        -before.prompt_tokens,
        -before.reasoning_tokens,
        -before.completion_tokens,
        -before.thinking_budget_hits,
        malformed_tool_calls=-before.malformed_tool_calls,
    )

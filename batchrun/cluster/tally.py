"""Counting a run as it goes: what is done, how fast, how long it will take. No Ray, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from batchrun.records import Counts

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
    before: Counts = field(default_factory=Counts)
    published: Counts = field(default_factory=Counts)
    done_shards: int = 0
    failed: dict[int, int] = field(default_factory=dict)
    running: dict[str, Counts] = field(default_factory=dict)
    discarded_tokens: int = 0
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def publish(self, attempt: str, counts: Counts) -> None:
        """A shard is done; its rows no longer count as running."""
        self.running.pop(attempt, None)
        self.published += counts
        self.done_shards += 1

    def discard(self, attempt: str) -> None:
        """An attempt is lost, and the tokens it made so far with it."""
        lost = self.running.pop(attempt, None)
        if lost is not None:
            self.discarded_tokens += lost.reasoning_tokens + lost.completion_tokens

    def fail(self, shard: int, num_rows: int) -> None:
        """A shard has failed for good; all its rows count as failed."""
        self.failed[shard] = num_rows

    def done(self) -> Counts:
        """Rows published, waiting for their part, or failed with their shard."""
        lost = sum(self.failed.values())
        total = self.published + Counts(rows=lost, failed_rows=lost)
        for counts in self.running.values():
            total += counts
        return total

    def progress(self, now: float, started: float, workers: Mapping[str, int]) -> Progress:
        """The progress at ``now``; rates are over the last half minute."""
        done = self.done()
        tokens = done.reasoning_tokens + done.completion_tokens
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
            generated=_difference(done, self.before),
            num_shards=self.num_shards,
            done_shards=self.done_shards,
            failed_shards=len(self.failed),
            workers=dict(workers),
            elapsed_s=now - started,
            rows_per_s=rows_per_s,
            tokens_per_s=tokens_per_s,
            eta_s=left / rows_per_s if rows_per_s and left else (0.0 if not left else None),
        )


def _difference(counts: Counts, before: Counts) -> Counts:
    return counts + Counts(
        -before.rows,
        -before.failed_rows,
        -before.prompt_tokens,
        -before.reasoning_tokens,
        -before.completion_tokens,
        -before.thinking_budget_hits,
    )

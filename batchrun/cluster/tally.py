"""Counting a run as it goes: what is done, how fast, how long it will take. No Ray, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from batchrun.records import Counts, Part
from batchrun.reports import FinishedLease, ReturnedLease, RunningLease, WorkReport

_RATE_WINDOW_S = 30.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run, for people. ``done`` holds rows published, rows in the journal and rows
    that wait for either; ``generated`` what this process's workers did, without what was there
    before."""

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
class _Worker:
    """What a worker has said of all its work; kept when it is gone."""

    sampled_tokens: int = 0
    prefix_tokens: int = 0
    discarded_tokens: int = 0
    unsaved_tokens: int = 0


@dataclass(slots=True)
class Tally:
    """Sums over shards: of published ones once and for all, of others what their leases say."""

    total_rows: int
    num_shards: int
    before: Mapping[int, Part]
    kept: Mapping[int, Counts] = field(default_factory=dict)
    """Rows of parts that are made anew which stay as they are."""
    published: dict[int, Counts] = field(init=False)
    failed: dict[int, int] = field(default_factory=dict)
    _workers: dict[str, _Worker] = field(default_factory=dict)
    _running: dict[str, tuple[str, RunningLease]] = field(default_factory=dict)  # by attempt
    _earlier: dict[int, Counts] = field(init=False)  # of shards without a part: from before
    _generated: Counts = field(default_factory=Counts)  # of shards that this submit published
    _ended: dict[int, Counts] = field(default_factory=dict)  # of others, under ended leases
    _dropped: dict[int, Counts] = field(default_factory=dict)  # what leases given up had saved
    _given_up: set[str] = field(default_factory=set)  # attempts
    _lost_tokens: int = 0
    _recovered_tokens: int = 0  # that no report of their worker spoke of
    _published: Counts = field(init=False)
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.published = {number: part.counts for number, part in self.before.items()}
        self._published = sum(self.published.values(), Counts())
        self._earlier = dict(self.kept)

    @property
    def sampled_tokens(self) -> int:
        """Tokens that all workers have sampled, dead ones too; of what a killed one sampled after
        its last report, those of rows that the journal has."""
        reported = sum(worker.sampled_tokens for worker in self._workers.values())
        return reported + self._recovered_tokens

    @property
    def prefix_tokens(self) -> int:
        """Tokens of prompts that no worker had to compute."""
        return sum(worker.prefix_tokens for worker in self._workers.values())

    @property
    def discarded_tokens(self) -> int:
        """Tokens that were sampled for nothing: lost with a worker, or sampled twice."""
        return self._lost_tokens + sum(w.discarded_tokens for w in self._workers.values())

    @property
    def journaled_rows(self) -> int:
        """Rows that are safe in the journal of a shard without a part, as far as is known."""
        running = sum(state.saved.rows for _, state in self._running.values())
        kept = sum(counts.rows for number, counts in self.kept.items() if number in self._earlier)
        return running + self._journaled().rows - kept

    def report(self, worker: str, report: WorkReport) -> None:
        """What a worker says of its work as a whole, and of the leases that go on."""
        own = self._workers.setdefault(worker, _Worker())
        own.sampled_tokens = report.sampled_tokens
        own.prefix_tokens = report.prefix_tokens
        own.discarded_tokens = report.discarded_tokens
        own.unsaved_tokens = report.unsaved_tokens
        for state in report.running:
            if state.attempt in self._given_up:
                continue  # its worker does not know yet
            self._running[state.attempt] = (worker, state)
            known = self._earlier.get(state.shard, Counts())
            if state.shard not in self.published and state.known.rows > known.rows:
                self._earlier[state.shard] = state.known

    def end(self, finished: FinishedLease) -> None:
        """A lease ended with all its rows."""
        self._running.pop(finished.lease.attempt, None)
        number = finished.lease.shard.number
        if number in self.published:
            return  # by another lease
        self._hand_over(number, finished.handed_over)
        if finished.part is None:
            self._end(number, finished.fresh)
            return
        # The lease was answerable for all rows: whatever was thought before, this is so.
        self._ended.pop(number, None)
        self._dropped.pop(number, None)
        self._generated += finished.fresh + finished.handed_over
        self.published[number] = finished.part.counts
        self._published += finished.part.counts
        self._earlier.pop(number, None)
        self.failed.pop(number, None)

    def give_back(self, returned: ReturnedLease) -> None:
        """A lease was given back; what it made is in the journal."""
        self._running.pop(returned.attempt, None)
        if returned.attempt not in self._given_up:
            self._end(returned.shard, returned.fresh)

    def give_up(self, attempt: str) -> None:
        """A lease ended for nothing: its shard failed, or another was first."""
        _, state = self._running.pop(attempt, ("", None))
        self._given_up.add(attempt)
        if state is not None and state.shard not in self.published:
            self._dropped[state.shard] = self._dropped.get(state.shard, Counts()) + state.saved

    def fail(self, shard: int, num_rows: int) -> None:
        """A shard has failed for good; all its rows count as failed."""
        self.failed[shard] = num_rows

    def lose(self, worker: str) -> None:
        """A worker is lost, and with it the tokens that it had not made safe."""
        own = self._workers.get(worker)
        if own is not None:
            self._lost_tokens += own.unsaved_tokens
            own.unsaved_tokens = 0
        for attempt in [key for key, (owner, _) in self._running.items() if owner == worker]:
            _, state = self._running.pop(attempt)
            self._end(state.shard, state.saved)

    def _hand_over(self, shard: int, found: Counts) -> None:
        """A lease has ended, and others had generated so much of it: more than is known where a
        killed worker made rows safe after its last report."""
        ended = self._ended.get(shard, Counts())
        if found.rows > ended.rows:
            self._ended[shard] = found
        known = ended + self._dropped.get(shard, Counts())
        known += sum((s.saved for _, s in self._running.values() if s.shard == shard), Counts())
        tokens = max(0, found.output_tokens - known.output_tokens)
        # Of these the worker may have spoken as not safe yet: then they were taken for lost.
        taken_for_lost = min(tokens, self._lost_tokens)
        self._lost_tokens -= taken_for_lost
        self._recovered_tokens += tokens - taken_for_lost

    def _end(self, shard: int, counts: Counts) -> None:
        """Rows of a shard without a part were generated and are in the journal."""
        if shard not in self.published:
            self._ended[shard] = self._ended.get(shard, Counts()) + counts

    def _journaled(self) -> Counts:
        """What is in the journals of shards that have no part and have not failed, as far as no
        lease that goes on speaks of it."""
        found = (*self._earlier.items(), *self._ended.items())
        return sum((counts for shard, counts in found if shard not in self.failed), Counts())

    def done(self) -> Counts:
        """Rows published, journaled, waiting for either, or failed with their shard. Those that two
        tries at a lease have generated count twice until one of them ends, but no more than there
        are."""
        lost = sum(self.failed.values())
        total = self._published + Counts(rows=lost, failed_rows=lost) + self._journaled()
        for _, state in self._running.values():
            total += state.fresh
        return replace(total, rows=min(total.rows, self.total_rows))

    def generated(self) -> Counts:
        """What the workers of this submit have finished: exact for shards that are published."""
        total = sum(self._ended.values(), self._generated)
        return sum((state.fresh for _, state in self._running.values()), total)

    def progress(self, now: float, started: float, workers: Mapping[str, int]) -> Progress:
        """The progress at ``now``; rates are over the last half minute."""
        done = self.done()
        tokens = self.sampled_tokens
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

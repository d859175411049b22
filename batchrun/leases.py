"""The leases and rows that a worker has in hand, and what of them is safe already.

A lease that is whole ends in a part. The finished rows of any other, and what running rows have
sampled so far, go to the journal of the shard; so do those of a whole lease that takes long.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

from batchrun.data.journal import Journal, Running
from batchrun.data.reader import ShardReader
from batchrun.data.writer import PartFile, PartFormat, PartWriter
from batchrun.engine.engine import RunningSample
from batchrun.engine.request import Request
from batchrun.errors import BatchrunError, StorageError
from batchrun.records import Completion, Counts, Generated, Lease, Part, Row, Shard
from batchrun.reports import FinishedLease, RunningLease
from batchrun.scores import Verdict

MAX_UNSAVED_BYTES = 4 << 20
"""So much text of finished rows is journaled before its time."""

_MAX_FAILED_FLUSHES = 2  # in a row; storage tries for long by itself before it fails
_BYTES_PER_TOKEN = 8


class Journals(Protocol):
    """Where the journals of a run are kept."""

    def read(self, shard: Shard) -> Journal:
        """What the journal of a shard holds."""

    def write(self, lease: Lease) -> LeaseJournal:
        """The journal of a lease."""


class LeaseJournal(Protocol):
    """Writes the journal of one lease; see :class:`~batchrun.data.journal.JournalWriter`."""

    def flush(self, finished: list[Completion], running: list[Running]) -> None:
        """Make these durable."""


@dataclass(slots=True)
class OpenRow:
    """A row in the engine, with the samples that are still to come."""

    owner: OpenLease
    row: Row
    missing: dict[int, Request]  # what the engine owes, by sample
    added_at: float
    started_at: float | None = None  # when a sample was first seen to have a slot
    queued_s: float | None = None
    prefix_tokens: dict[int, int] = field(default_factory=dict)  # of samples
    num_known: dict[int, int] = field(default_factory=dict)  # tokens that samples came with
    num_retries: dict[int, int] = field(default_factory=dict)  # of samples
    kept: frozenset[int] = frozenset()  # samples that were there before and are scored again
    is_known: bool = False  # all samples were there before
    num_scoring: int = 0  # samples that wait for their verdict
    finished: list[Completion] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        """What the engine calls it: attempt and ordinal."""
        return self.owner.lease.attempt, self.row.ordinal

    @property
    def is_done(self) -> bool:
        """Whether all samples are there."""
        return not self.missing and not self.num_scoring


@dataclass(frozen=True, slots=True)
class _Flush:
    """What is on its way to the journal."""

    future: Future[None]
    finished: list[Completion]
    counts: Counts
    num_bytes: int
    num_tokens: int
    sampled: dict[tuple[int, int], int]
    started_at: float


class OpenLease:
    """A lease in work: its rows as they are read, its part or its journal as it grows."""

    def __init__(
        self,
        lease: Lease,
        reader: ShardReader,
        opening: Future[Journal],
        known: Iterator[Generated | None],
        now: float,
    ) -> None:
        """``opening`` reads the shard's journal; ``known`` is what another run generated for the
        samples of the whole shard, in their order."""
        self.lease = lease
        self.reader = reader
        self.opening = opening
        self.journal = Journal()
        self.writer: PartWriter | None = None
        self._verdicts: dict[tuple[int, int], Verdict] = {}
        self.is_open = False
        """Whether the journal was taken in."""
        self.at_end = False
        self.num_open = 0
        """Rows that the engine or a scorer has."""
        self._known = Counts()
        self._handed_over = Counts()
        self.publishing: Future[Part] | None = None
        self._other_run = known
        self._num_other = 0
        self._saved = Counts()
        self._unsaved = Counts()
        self._finished: list[Completion] = []
        self._num_bytes = 0
        self._num_tokens = 0
        self._sampled: dict[tuple[int, int], int] = {}  # what the journal has of running samples
        self._flush: _Flush | None = None
        self._flushed_at = now
        self._num_failed_flushes = 0

    def open(self, part_format: PartFormat) -> bool:
        """Take in the journal, if it has been read; False when it has not. Raises what reading it
        raised."""
        if self.is_open or not self.opening.done():
            return self.is_open
        self.journal = self.opening.result()
        if self.lease.whole:
            journaled = _Scored(self.journal.finished, self._verdicts)
            self.writer = PartWriter(self.reader, part_format, journaled=journaled)
        self.is_open = True
        return True

    def close(self) -> None:
        """Give up everything. May be called twice. A part that is being finished or published is
        given up when that has ended: two threads in one Parquet writer would end the process."""
        self.reader.close()
        if self.writer is None:
            return
        if self.publishing is None:
            self.writer.close()
        else:
            close = self.writer.close
            self.publishing.cancel()
            self.publishing.add_done_callback(lambda _: close())

    @property
    def state(self) -> RunningLease:
        """What is finished, for the driver."""
        flushing = Counts() if self._flush is None else self._flush.counts
        return RunningLease(
            self.lease.attempt,
            self.lease.shard.number,
            self._known,
            self._saved,
            flushing + self._unsaved,
            self._handed_over,
        )

    def finished(self, part: Part | None = None) -> FinishedLease:
        """What is finished when it has ended, with its ``part`` if it is whole."""
        state = self.state
        counts = state.counts if part is None else part.counts
        return FinishedLease(self.lease, part, counts, state.fresh, state.handed_over)

    @property
    def has_all_rows(self) -> bool:
        """Whether every row is finished."""
        if self.writer is not None:
            return self.at_end and self.writer.is_complete
        return self.at_end and not self.num_open

    @property
    def is_safe(self) -> bool:
        """Whether every row of a lease that is not whole is in the journal."""
        return self.has_all_rows and not self._finished and self._flush is None

    @property
    def flushing(self) -> Future[None] | None:
        """The flush on its way, if there is one."""
        return None if self._flush is None else self._flush.future

    def take_known(self, row: Row, samples: Iterable[int], n: int) -> dict[int, Generated | None]:
        """What is known of these samples of a row: of the journal, else of another run, whose
        tokens the journal's begin with. Rows must come in order."""
        skipped = row.ordinal * n - self._num_other
        others = list(itertools.islice(self._other_run, skipped, skipped + n))
        self._num_other += skipped + n
        others += [None] * (n - len(others))
        return {
            sample: self.journal.running.get((row.ordinal, sample)) or others[sample]
            for sample in samples
        }

    def add(self, completion: Completion, num_known: int = 0) -> None:
        """A finished sample; ``num_known`` of its tokens came with its request."""
        if self.writer is not None:
            self.writer.add(completion)
        self._finished.append(completion)
        self._num_bytes += _size(completion)
        saved = self._sampled.pop((completion.ordinal, completion.sample), 0)
        num_tokens = completion.reasoning_tokens + completion.completion_tokens
        self._num_tokens += max(0, num_tokens - max(saved, num_known))

    def keep(self, completion: Completion) -> None:
        """A sample that the journal has; its verdict may be newer."""
        key = (completion.ordinal, completion.sample)
        if self.writer is not None:
            if completion.verdict is not None and self.journal.finished[key].verdict is None:
                self._verdicts[key] = completion.verdict
            self.writer.add_journaled(*key)

    def know(self, ordinal: int, counts: Counts) -> None:
        """A row is finished that was in the journal with all its samples."""
        if self.journal.epochs[ordinal] == self.lease.epoch:
            self._handed_over += counts
        else:
            self._known += counts

    def count(self, counts: Counts) -> None:
        """A row is finished that was not in the journal."""
        self._unsaved += counts

    def forget(self, ordinal: int, sample: int) -> None:
        """A sample begins anew: what the journal has of it does not count."""
        self._sampled.pop((ordinal, sample), None)
        if self._flush is not None:
            self._flush.sampled.pop((ordinal, sample), None)

    def num_saved(self, item: RunningSample) -> int:
        """How many tokens of a running sample would not be lost with the worker."""
        return max(item.num_replayed, self._sampled.get((_ordinal(item), item.sample), 0))

    @property
    def unsaved_tokens(self) -> int:
        """Sampled tokens of finished samples that would be lost with the worker."""
        return self._num_tokens + (0 if self._flush is None else self._flush.num_tokens)

    def is_due(self, now: float, interval_s: float) -> bool:
        """Whether it is time for the journal: after the interval, also while the part is on its way
        to storage, when there is much, and when a lease that is not whole has all its rows."""
        if self._flush is not None:
            return False
        is_late = now - self._flushed_at >= interval_s
        if self.has_all_rows:
            return bool(self._finished) and (is_late or not self.lease.whole)
        return is_late or self._num_bytes >= MAX_UNSAVED_BYTES

    def start_flush(
        self,
        journal: LeaseJournal,
        running: Iterable[RunningSample],
        executor: Executor,
        now: float,
    ) -> None:
        """Send to the journal what it does not have yet; only one flush at a time."""
        self._flushed_at = now
        tails: list[Running] = []
        sampled: dict[tuple[int, int], int] = {}
        for item in running:
            ordinal = _ordinal(item)
            at = self._sampled.get((ordinal, item.sample), 0)
            if item.num_sampled > at:
                tails.append(Running(ordinal, item.sample, at, item.after(at)))
                sampled[ordinal, item.sample] = item.num_sampled
        finished, self._finished = self._finished, []
        counts, self._unsaved = self._unsaved, Counts()
        num_bytes, self._num_bytes = self._num_bytes, 0
        num_tokens, self._num_tokens = self._num_tokens, 0
        if not finished and not tails:
            self._saved += counts
            return
        future = executor.submit(journal.flush, finished, tails)
        self._flush = _Flush(future, finished, counts, num_bytes, num_tokens, sampled, now)

    def end_flush(self) -> float | None:
        """Take note of a flush that ended; when it began, or None when storage failed: then the
        next one brings the same again.

        Raises StorageError when that has happened too often, and OutputError; after these too the
        next one would bring the same again.
        """
        flush, self._flush = self._flush, None
        assert flush is not None
        try:
            flush.future.result()
        except BatchrunError as error:
            self._num_failed_flushes += 1
            self._finished = flush.finished + self._finished
            self._unsaved = flush.counts + self._unsaved
            self._num_bytes += flush.num_bytes
            self._num_tokens += flush.num_tokens
            too_often = self._num_failed_flushes >= _MAX_FAILED_FLUSHES
            if too_often or not isinstance(error, StorageError):
                raise
            return None
        self._num_failed_flushes = 0
        self._saved += flush.counts
        ended = {(item.ordinal, item.sample) for item in self._finished}
        self._sampled |= {key: at for key, at in flush.sampled.items() if key not in ended}
        return flush.started_at

    def finish_part(self) -> PartFile:
        """Close and verify the part; in the publisher's thread."""
        assert self.writer is not None
        return self.writer.finish()


class _Scored(Mapping[tuple[int, int], Completion]):
    """Finished samples with the verdicts that they did not bring; the texts stay where they are."""

    def __init__(
        self,
        finished: Mapping[tuple[int, int], Completion],
        verdicts: Mapping[tuple[int, int], Verdict],
    ) -> None:
        self._finished = finished
        self._verdicts = verdicts

    def __getitem__(self, key: tuple[int, int]) -> Completion:
        completion, verdict = self._finished[key], self._verdicts.get(key)
        return completion if verdict is None else replace(completion, verdict=verdict)

    def __contains__(self, key: object) -> bool:
        return key in self._finished

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._finished)

    def __len__(self) -> int:
        return len(self._finished)


def _ordinal(item: RunningSample) -> int:
    return cast(tuple[str, int], item.key)[1]


def _size(completion: Completion) -> int:
    """About the bytes of a sample in the journal."""
    num_tokens = len(completion.logprobs or ()) + len(
        completion.generated.token_ids if completion.generated is not None else ()
    )
    return (
        len(completion.completion or "")
        + len(completion.reasoning or "")
        + _BYTES_PER_TOKEN * num_tokens
        + 200
    )

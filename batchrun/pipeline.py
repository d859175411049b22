"""From leases to parts and journals: rows in, through the engine, completions out. No Ray in here.

1. :meth:`Pipeline.start` takes a lease. The journal of its shard is read first: what is finished
   there is taken as it is, and what was begun there goes on where it was.
2. Rows become prompts and then requests. The engine is kept a quarter fuller than it can run, so
   a sequence that ends is replaced at the next step; rows of the next lease follow those of the
   one before without a gap. Short rows are read further ahead, so that the engine can begin with
   the longest.
3. Finished samples are scored where the job asks for it, and go to the lease's part writer,
   which puts them into input order (:mod:`batchrun.openrows`, :mod:`batchrun.scoring`).
4. Every ``checkpoint.interval_s`` what is finished and what is begun goes to the journal, and so it
   does when the work has to stop. A lease that is whole and has all its rows is published. Each
   happens in a thread, while the engine goes on (:mod:`batchrun.saving`).

A bad row is a completion with an error. An unreadable shard is a failed lease. Anything else that
goes wrong is raised from :meth:`Pipeline.work`, and whoever runs the pipeline decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait

from batchrun.data.reader import ShardReader
from batchrun.data.schema import InputSchema
from batchrun.data.writer import PartFile, PartFormat
from batchrun.engine.engine import Engine
from batchrun.errors import ShardError
from batchrun.gauges import Gauges
from batchrun.job import Job
from batchrun.leases import Journals, OpenLease
from batchrun.metrics import WORKER_SECONDS, Recorder
from batchrun.openrows import Flight, OpenRows
from batchrun.records import Generated, Lease, Part, Row
from batchrun.reports import DRAIN_S, FailedLease, FinishedLease, ReturnedLease, WorkReport
from batchrun.saving import Saving
from batchrun.worklog import log_ended, log_gone, log_opened

MAX_LEASES = 3
"""Leases that a pipeline asks for at most: one that ends, one in the middle, one that begins."""
BUILD_ROWS = 16
"""Rows that become prompts together."""

_WINDOW = 1.25  # requests in the engine, running and waiting, for each sequence it can run
_LOOKAHEAD = 16  # the same, as long as what waits is small: the order is better the more is known
_MAX_WAITING_TOKENS = 1 << 18  # about 10 MiB, with the texts
_MAX_HELD_BYTES = 64 << 20  # carried columns of rows that are not written yet
_MOST_HELD_BYTES = 512 << 20  # the same, where the engine may run dry
_MAX_ROWS_A_TURN = 256  # rows read between two engine steps: a call stays short on bad rows
_SCORES_S = 2.0  # for scores that are on their way when the work has to stop


class Pipeline:
    """Keeps one engine busy with the rows of a few leases. Not thread-safe, but for
    ``draining``."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        publish: Callable[[PartFile, Lease], Part],
        schema: InputSchema,
        part_format: PartFormat,
        clock: Callable[[], float] = time.monotonic,
        known: Callable[[Lease], Iterator[Generated | None]] | None = None,
        journals: Journals | None = None,
        flight: Flight | None = None,
        keeps_finished: bool = False,
    ) -> None:
        """``publish`` puts a finished part in its place and returns what stands there then.

        ``known`` gives what another run has generated for the samples of a lease's shard, in
        order; it may end early. Without ``journals`` only whole leases can be run. ``flight`` has
        room for as many rows as the engine runs and :data:`BUILD_ROWS`. With ``keeps_finished``
        the journals begin with samples of parts that are made anew; they stay even where the rest
        of their row is lost.
        """
        self._storage_options = job.input.storage_options
        self._engine = engine
        self._known = known
        self._schema = schema
        self._format = part_format
        self._clock = clock
        self._before = engine.stats()
        self._recorder = Recorder()
        self._gauges = Gauges(engine, self._recorder)
        self._leases: list[OpenLease] = []
        self._rows = OpenRows(
            job, engine, part_format, self._recorder, flight, clock, keeps_finished
        )
        self._saving = Saving(publish, journals, job.checkpoint.interval_s, self._recorder, clock)
        self._discarded_tokens = 0
        self.draining = False
        """Set to give the leases at hand back and ask for no more."""
        self._window = max(
            engine.max_sequences + 1, math.ceil(_WINDOW * engine.max_sequences), part_format.n
        )
        self._lookahead = max(self._window, _LOOKAHEAD * engine.max_sequences)

    def start(self, lease: Lease) -> None:
        """Take a lease; its rows follow those of the leases before."""
        reader = ShardReader(
            lease.shard, self._schema, self._storage_options, None if lease.whole else lease.rows
        )
        opening = self._saving.open(lease)
        known = iter(()) if self._known is None else self._known(lease)
        self._leases.append(OpenLease(lease, reader, opening, known, self._clock()))

    def cancel(self, attempt: str) -> None:
        """Drop a lease whose rows are safe by another's work. Does nothing when it has ended."""
        for item in [item for item in self._leases if item.lease.attempt == attempt]:
            self._drop(item)
            log_gone(item.lease, "lease_cancelled", "its rows are safe, or not needed")

    def work(self, seconds: float) -> WorkReport:
        """Work for about so long, or until a lease has ended, or nothing is left to do; when
        ``draining``, make everything safe and give the leases back.

        Raises what is neither a row's nor a shard's fault: storage, a broken engine.
        """
        started = self._clock()
        until = started + seconds
        done: list[FinishedLease] = []
        failed: list[FailedLease] = []
        while not self.draining:
            failed += self._admit()
            if self._engine.num_unfinished:
                self._rows.step()
            self._rows.expire()
            self._rows.take_verdicts(0.0 if self._can_go_on else max(0.0, until - self._clock()))
            self._saving.flush_due(self._leases, self._rows.running)
            self._saving.publish_complete(self._leases)
            waits = not self._busy and not self._rows.num_scoring
            self._collect(max(0.0, until - self._clock()) if waits else 0.0, done, failed)
            if done or failed or not self._leases or self._clock() >= until:
                break
        state = "drain" if self.draining else "generate"
        returned = self._give_back(DRAIN_S, done, failed) if self.draining else []
        self._recorder.add(WORKER_SECONDS, max(0.0, self._clock() - started), state=state)
        return self._report(done, failed, returned)

    def finish(self, timeout_s: float) -> WorkReport:
        """Publish what is complete, journal the rest, for so long at most, and give it back.

        The pipeline is closed then.
        """
        self.draining = True
        done: list[FinishedLease] = []
        failed: list[FailedLease] = []
        returned = self._give_back(timeout_s, done, failed)
        report = self._report(done, failed, returned)
        self.close()
        return report

    def close(self) -> None:
        """Give up everything. May be called twice."""
        self._rows.close()
        self._saving.close()
        for item in self._leases:
            item.close()
        self._leases.clear()

    # -- how much to read ----------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        """Whether there is something to do other than waiting for storage."""
        return bool(self._engine.num_unfinished) or self._can_read

    @property
    def _can_read(self) -> bool:
        """Whether there are rows left that can be read now."""
        left = next((item for item in self._leases if not item.at_end), None)
        return left is not None and left.opening.done() and left.reader.coming is None

    @property
    def _can_go_on(self) -> bool:
        """Whether there is something to do while scores are awaited."""
        return bool(self._engine.num_unfinished) or (
            self._can_read and self._rows.num_scoring <= self._window
        )

    @property
    def _num_in_engine(self) -> int:
        return self._engine.num_waiting + self._engine.num_running

    def _num_wanted(self) -> int:
        """Leases that would keep the engine full: none while rows are left to read, or while so
        many wait that another worker could need the lease sooner."""
        is_full = self._num_in_engine > self._window
        if self.draining or is_full or any(not item.at_end for item in self._leases):
            return 0
        return max(0, MAX_LEASES - len(self._leases))

    def _has_room(self, num_rows: int) -> bool:
        """Whether another row after so many may enter the engine: while it could run dry, and
        beyond that as long as memory stays small."""
        num_requests = self._num_in_engine + (num_rows + 1) * self._format.n
        if self._rows.num_scoring > self._window:
            return False
        held_bytes = sum(item.reader.held_bytes for item in self._leases)
        if num_requests <= self._window:
            # Rows that need no request are held too, behind one that takes long.
            return held_bytes < _MOST_HELD_BYTES or not self._engine.num_unfinished
        return (
            num_requests <= self._lookahead
            and self._engine.num_waiting_tokens < _MAX_WAITING_TOKENS
            and held_bytes < _MAX_HELD_BYTES
        )

    # -- rows into the engine ------------------------------------------------------------------

    def _admit(self) -> list[FailedLease]:
        """Read rows and put them into the engine, as long as it has room for more."""
        failed: list[FailedLease] = []
        left = _MAX_ROWS_A_TURN
        for item in list(self._leases):
            while not item.at_end:
                if left <= 0 or not self._has_room(0) or not self._open(item):
                    break
                try:
                    rows = self._read(item, min(left, BUILD_ROWS))
                except ShardError as error:
                    failed.append(self._give_up(item, error))
                    break
                if not rows and not item.at_end:
                    break  # they are on their way; the engine does not wait for them
                left -= len(rows)
                self._rows.build(item, rows)
            if not item.at_end and item in self._leases:
                break  # one lease after the other
        return failed

    def _open(self, item: OpenLease) -> bool:
        """Whether the lease's journal is there."""
        if item.is_open:
            return True
        if item.open(self._format):
            log_opened(item)
        return item.is_open

    def _read(self, item: OpenLease, most: int) -> list[Row]:
        """The next rows of a lease, as many as are there and as there is room for."""
        rows: list[Row] = []
        while len(rows) < most and item.reader.coming is None and self._has_room(len(rows)):
            row = next(item.reader, None)
            if row is None:
                item.at_end = True
                break
            rows.append(row)
        return rows

    # -- the ends of leases --------------------------------------------------------------------

    def _collect(
        self, timeout_s: float, done: list[FinishedLease], failed: list[FailedLease]
    ) -> None:
        """Take note of what storage has done, or wait so long for it to do something; ``done`` and
        ``failed`` get the leases that ended."""
        waiting = self._saving.pending(self._leases)
        left = next((item for item in self._leases if not item.at_end), None)
        if left is not None:
            coming = left.reader.coming if left.opening.done() else left.opening
            waiting += [] if coming is None else [coming]
        if waiting:
            wait(waiting, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for item in list(self._leases):
            try:
                self._end(item, self._saving.settle(item), done)
            except ShardError as error:
                failed.append(self._give_up(item, error))

    def _give_back(
        self, timeout_s: float, done: list[FinishedLease], failed: list[FailedLease]
    ) -> list[ReturnedLease]:
        """Publish what is complete, journal what is not, for so long at most, and end all leases.

        What storage does not take, or not in time, is generated again, nothing worse.
        """
        until = self._clock() + timeout_s
        self._rows.take_in()
        self._rows.take_verdicts(min(_SCORES_S, timeout_s))
        self._saving.begin_last(self._leases, self._rows.running, until)
        while True:
            for item in list(self._leases):
                try:
                    self._end(item, self._saving.settle_last(item, self._rows.running), done)
                except ShardError as error:
                    failed.append(self._give_up(item, error))
            left_s = until - self._clock()
            if left_s <= 0 or not self._saving.wait(self._leases, left_s):
                break
        returned = [self._return(item) for item in list(self._leases)]
        self._rows.tell_flight()
        return returned

    def _end(
        self, item: OpenLease, finished: FinishedLease | None, done: list[FinishedLease]
    ) -> None:
        """Take leave of a lease all of whose rows are safe, if they are."""
        if finished is not None:
            done.append(finished)
            log_ended(item.lease, finished.part)
            self._remove(item)

    def _return(self, item: OpenLease) -> ReturnedLease:
        """Give a lease back unfinished."""
        saved = item.state.saved
        message = f"given back with {saved.rows} finished rows in the journal"
        log_gone(item.lease, "lease_returned", message)
        self._discarded_tokens += item.unsaved_tokens + self._rows.num_unsaved_tokens(item)
        self._rows.abort(item)
        self._remove(item)
        return ReturnedLease(item.lease.attempt, item.lease.shard.number, saved)

    def _give_up(self, item: OpenLease, error: ShardError) -> FailedLease:
        """Drop a lease whose shard cannot be read, with all its rows."""
        self._drop(item)
        log_gone(item.lease, "lease_failed", error.message)
        hint = f" ({error.hint})" if error.hint else ""
        return FailedLease(item.lease, error.message + hint)

    def _drop(self, item: OpenLease) -> None:
        """Give up a lease with all its rows; what they have sampled is lost."""
        self._discarded_tokens += item.unsaved_tokens + self._rows.abort(item)
        self._remove(item)

    def _remove(self, item: OpenLease) -> None:
        self._leases.remove(item)
        self._saving.forget(item.lease)
        item.close()

    # -- reports -------------------------------------------------------------------------------

    def _report(
        self,
        done: list[FinishedLease],
        failed: list[FailedLease],
        returned: list[ReturnedLease],
    ) -> WorkReport:
        self._gauges.read(len(self._rows))
        stats, before = self._engine.stats(), self._before
        return WorkReport(
            done=tuple(done),
            failed=tuple(failed),
            returned=tuple(returned),
            running=tuple(item.state for item in self._leases),
            num_wanted=self._num_wanted(),
            idle=not self._leases,
            sampled_tokens=stats.sampled_tokens - before.sampled_tokens,
            prompt_tokens=stats.prompt_tokens - before.prompt_tokens,
            prefix_tokens=stats.prefix_tokens - before.prefix_tokens,
            discarded_tokens=self._discarded_tokens,
            unsaved_tokens=self._num_unsaved_tokens(),
            draining=self.draining,
            failures=self._rows.take_failures(),
            metrics=self._recorder.take(),
        )

    def _num_unsaved_tokens(self) -> int:
        """Sampled tokens that would be lost with the worker now."""
        return sum(
            item.unsaved_tokens + self._rows.num_unsaved_tokens(item) for item in self._leases
        )

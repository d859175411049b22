"""From leases to parts and journals: rows in, through the engine, completions out. No Ray in here.

1. :meth:`Pipeline.start` takes a lease. The journal of its shard is read first: what is finished
   there is taken as it is, and what was begun there goes on where it was.
2. Rows become prompts and then requests. The engine is kept a quarter fuller than it can run, so
   a sequence that ends is replaced at the next step; rows of the next lease follow those of the
   one before without a gap. Short rows are read further ahead, so that the engine can begin with
   the longest.
3. Finished samples are scored where the job asks for it, and go to the lease's part writer,
   which puts them into input order.
4. Every ``checkpoint.interval_s`` what is finished and what is begun goes to the journal, and so it
   does when the work has to stop. A lease that is whole and has all its rows is published. Both
   happen in a thread, while the engine goes on.

A bad row is a completion with an error. An unreadable shard is a failed lease. Anything else that
goes wrong is raised from :meth:`Pipeline.work`, and whoever runs the pipeline decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, cast

from batchrun.completions import completion_of, failed_sample, in_order, with_calls
from batchrun.data.journal import Journal
from batchrun.data.reader import ShardReader
from batchrun.data.schema import InputSchema
from batchrun.data.traffic import traffic
from batchrun.data.writer import PartFile, PartFormat
from batchrun.engine.engine import Engine, RunningSample
from batchrun.engine.request import Output, Request
from batchrun.errors import ShardError, StorageError
from batchrun.evaluate import ScoreSpec
from batchrun.job import Job
from batchrun.judge import Judge
from batchrun.leases import Journals, OpenLease, OpenRow
from batchrun.metrics import (
    BUDGET_HITS,
    CHECKPOINT_SECONDS,
    KV_PAGES_TOTAL,
    KV_PAGES_USED,
    ROOFLINE,
    ROW_SECONDS,
    ROWS_IN_FLIGHT,
    SLOTS_TOTAL,
    SLOTS_USED,
    STEP_SECONDS,
    TOKENS,
    WORKER_SECONDS,
    Recorder,
)
from batchrun.records import (
    Completion,
    ErrorKind,
    Generated,
    Lease,
    Part,
    Row,
    RowError,
)
from batchrun.reports import DRAIN_S, FailedLease, FinishedLease, ReturnedLease, WorkReport
from batchrun.rowrequests import RequestBuilder
from batchrun.scores import Verdict
from batchrun.worklog import (
    FailureLog,
    log_ended,
    log_flush_failed,
    log_flushed,
    log_gone,
    log_opened,
    log_retried,
)

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
_ROOFLINE_S = 5.0  # of steps: what a ratio is taken over
_SCORES_S = 2.0  # for scores that are on their way when the work has to stop

_RowKey = tuple[str, int]  # attempt, ordinal


class Flight(Protocol):
    """Is told which rows a death of this process may be due to."""

    def set(self, rows: Iterable[tuple[int, int]]) -> None:
        """These (shard number, ordinal) and no others."""


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
        self._job = job
        self._engine = engine
        self._publish = publish
        self._known = known
        self._journals = journals
        self._flight = flight
        self._keeps_finished = keeps_finished
        self._before = engine.stats()
        self._gauged = self._before
        self._schema = schema
        self._format = part_format
        self._clock = clock
        self._requests = RequestBuilder(job, engine)
        self._leases: list[OpenLease] = []
        self._writers: dict[str, Any] = {}  # journals by attempt
        self._rows: dict[_RowKey, OpenRow] = {}
        self._in_slot: set[_RowKey] = set()
        self._flight_is_late = False
        self._discarded_tokens = 0
        self._recorder = Recorder()
        self._failures = FailureLog()
        self.draining = False
        """Set to give the leases at hand back and ask for no more."""
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="open")
        self._judge: Judge | None = None
        if job.evaluate is not None:
            evaluate = job.evaluate
            self._judge = Judge(ScoreSpec(evaluate.scorer, evaluate.pattern, evaluate.choices))
        # Scorers that may take long do so beside the engine.
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._scoring: dict[Future[Verdict], tuple[OpenRow, Completion]] = {}
        self._window = max(
            engine.max_sequences + 1, math.ceil(_WINDOW * engine.max_sequences), part_format.n
        )
        self._lookahead = max(self._window, _LOOKAHEAD * engine.max_sequences)
        engine.on_admit = self._on_admit

    def start(self, lease: Lease) -> None:
        """Take a lease; its rows follow those of the leases before."""
        reader = ShardReader(
            lease.shard,
            self._schema,
            self._job.input.storage_options,
            None if lease.whole else lease.rows,
        )
        opening: Future[Journal]
        if self._journals is None:
            opening = Future()
            opening.set_result(Journal())
        else:
            opening = self._opener.submit(self._journals.read, lease.shard)
            self._writers[lease.attempt] = self._journals.write(lease)
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
                self._step()
            self._expire()
            self._take_verdicts(0.0 if self._can_go_on else max(0.0, until - self._clock()))
            self._start_flushes()
            self._start_publishing()
            waits = not self._busy and not self._scoring
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
        for key in list(self._rows):
            self._engine.abort(key)
        self._rows.clear()
        self._in_slot.clear()
        self._tell_flight()
        if self._engine.on_admit == self._on_admit:
            self._engine.on_admit = None
        for executor in (self._publisher, self._opener, self._scorer):
            executor.shutdown(wait=False, cancel_futures=True)
        self._scoring.clear()
        if self._judge is not None:
            self._judge.close()
        for item in self._leases:
            item.close()
        self._leases.clear()

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
            self._can_read and len(self._scoring) <= self._window
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
        if len(self._scoring) > self._window:
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
                self._build(item, rows)
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

    def _build(self, item: OpenLease, rows: list[Row]) -> None:
        """Rows into the engine, or straight to the part or the journal where they need not run."""
        if self._flight is not None and rows:
            # A prompt that cannot be made may take the process along as one that runs.
            self._tell_flight((item.lease.shard.number, row.ordinal) for row in rows)
            self._flight_is_late = True
        for row in rows:
            self._add(item, row)

    def _add(self, item: OpenLease, row: Row) -> None:
        n = self._format.n
        message = item.lease.lost.get(row.ordinal)
        lost = None if message is None else RowError(ErrorKind.WORKER_LOST, message)
        if lost is not None and not self._keeps_finished:
            self._end_at_once(item, row, lost, range(n))
            return
        journaled = item.journal.finished
        keys = [(row.ordinal, sample) for sample in range(n)]
        found = [journaled[key] for key in keys if key in journaled]
        finished, unscored = self._score_kept(item, row, found)
        if len(finished) == n:
            item.know(row.ordinal, self._format.count(finished))
            return
        missing = sorted(set(range(n)) - {completion.sample for completion in found})
        requests: list[Request] | RowError = []
        if missing:
            known = item.take_known(row, missing, n)
            requests = lost or self._requests.build(item.lease, row, known)
        if isinstance(requests, RowError):
            for completion in unscored:
                verdict = self._scorer.submit(self._verdict, completion, row).result()
                finished.append(replace(completion, verdict=verdict))
                item.keep(finished[-1])
            self._end_at_once(item, row, requests, missing, finished)
            return
        owed = {request.sample: request for request in requests}
        kept = frozenset(completion.sample for completion in unscored)
        open_row = OpenRow(
            item, row, owed, self._clock(), kept=kept, is_known=not missing, finished=finished
        )
        self._rows[open_row.key] = open_row
        item.num_open += 1
        for completion in unscored:
            self._start_scoring(open_row, completion)
        for request in requests:
            self._engine.add(request)

    def _score_kept(
        self, item: OpenLease, row: Row, found: Iterable[Completion]
    ) -> tuple[list[Completion], list[Completion]]:
        """Take samples that the journal has; the second are those that still need a verdict, as
        they came from a part, and that takes time."""
        finished: list[Completion] = []
        unscored: list[Completion] = []
        for completion in found:
            is_slow = self._judge is not None and not self._judge.is_quick
            if is_slow and completion.verdict is None and completion.completion is not None:
                unscored.append(completion)
                continue
            finished.append(self._scored(completion, row.answer))
            item.keep(finished[-1])
        return finished, unscored

    def _end_at_once(
        self,
        item: OpenLease,
        row: Row,
        error: RowError,
        samples: Iterable[int],
        finished: Iterable[Completion] = (),
    ) -> None:
        """A row that cannot run: an error for each of its samples that is not finished."""
        failed = [self._scored(failed_sample(row, sample, error), row.answer) for sample in samples]
        for completion in failed:
            item.add(completion)
        self._failures.add(item.lease, failed[0])
        item.count(self._format.count(in_order([*finished, *failed])))

    # -- the engine ----------------------------------------------------------------------------

    def _on_admit(self, keys: Iterable[Hashable]) -> None:
        """The engine has given these rows a slot, and is about to run them."""
        found = self._in_slot | cast(set[_RowKey], set(keys))
        # What was sent back into the queue, after an error or for want of memory, has none now.
        self._in_slot = {key for key in found if self._engine.is_running(key)}
        self._tell_flight()

    def _tell_flight(self, building: Iterable[tuple[int, int]] = ()) -> None:
        if self._flight is not None:
            rows = {(self._rows[key].owner.lease.shard.number, key[1]) for key in self._in_slot}
            self._flight.set(rows.union(building))
            self._flight_is_late = False

    def _step(self) -> None:
        """One step of the engine, and what it brought."""
        if self._flight_is_late:
            self._tell_flight()
        started = self._clock()
        outputs = self._engine.step()
        self._recorder.observe(STEP_SECONDS, self._clock() - started)
        for output in outputs:
            self._take(output)

    def _take(self, output: Output) -> None:
        """A finished sample of the engine."""
        open_row = self._rows.get(cast(_RowKey, output.key))
        if open_row is None:
            return  # its lease was given up or its row timed out at this very step
        if output.error is not None and output.error.kind is ErrorKind.ENGINE:
            num_retries = open_row.num_retries.get(output.sample, 0)
            if num_retries < self._job.errors.max_retries:
                open_row.num_retries[output.sample] = num_retries + 1
                open_row.owner.forget(open_row.row.ordinal, output.sample)
                log_retried(open_row.owner.lease, open_row.row.id, open_row.row.ordinal)
                # Without what it took over: that may be what is wrong with it.
                request = replace(open_row.missing[output.sample], generated=None)
                open_row.missing[output.sample] = request
                self._engine.add(request)
                return
        request = open_row.missing.pop(output.sample)
        if request.generated is not None:
            open_row.num_known[output.sample] = len(request.generated.token_ids)
        if not open_row.missing:
            self._leave_slot(open_row)
        queued_s = output.timings.queued_s
        if open_row.queued_s is None or queued_s < open_row.queued_s:
            open_row.queued_s = queued_s
        open_row.prefix_tokens[output.sample] = output.prefix_tokens
        completion = completion_of(open_row.row, output)
        if self._format.traces and output.error is None:
            completion = replace(completion, generated=output.generated)
        if self._format.tool_calls:
            completion = with_calls(completion)
        if self._judge is None or self._judge.is_quick or completion.completion is None:
            self._record(open_row, completion)
            return
        self._start_scoring(open_row, completion)

    def _start_scoring(self, open_row: OpenRow, completion: Completion) -> None:
        open_row.num_scoring += 1
        future = self._scorer.submit(self._verdict, completion, open_row.row)
        self._scoring[future] = (open_row, completion)

    def _verdict(self, completion: Completion, row: Row) -> Verdict:
        """In the scorer's thread."""
        assert self._judge is not None
        return self._judge.judge(completion.completion, row.answer)

    def _take_verdicts(self, timeout_s: float) -> None:
        """Samples whose verdict is there go on; waits so long for one to come."""
        if not self._scoring:
            return
        ready, _ = wait(self._scoring, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for future in [item for item in self._scoring if item in ready]:
            open_row, completion = self._scoring.pop(future)
            if self._rows.get(open_row.key) is not open_row:
                continue  # its lease was given up
            open_row.num_scoring -= 1
            self._record(open_row, replace(completion, verdict=future.result()))

    def _scored(self, completion: Completion, answer: object) -> Completion:
        """The completion with its verdict, where the job asks for one and it takes no time."""
        if self._judge is None or completion.verdict is not None:
            return completion
        return replace(completion, verdict=self._judge.judge(completion.completion, answer))

    def _record(self, open_row: OpenRow, completion: Completion) -> None:
        owner = open_row.owner
        completion = self._scored(completion, open_row.row.answer)
        open_row.finished.append(completion)
        if completion.sample in open_row.kept:
            owner.keep(completion)
            self._end_row(open_row)
            return
        owner.add(completion, open_row.num_known.get(completion.sample, 0))
        prefix_tokens = open_row.prefix_tokens.get(completion.sample, 0)
        self._recorder.add(TOKENS, completion.prompt_tokens - prefix_tokens, kind="prompt")
        self._recorder.add(TOKENS, prefix_tokens, kind="prefix_cached")
        self._recorder.add(TOKENS, completion.reasoning_tokens, kind="reasoning")
        self._recorder.add(TOKENS, completion.completion_tokens, kind="completion")
        self._recorder.add(BUDGET_HITS, int(completion.thinking_budget_hit))
        self._end_row(open_row)

    def _end_row(self, open_row: OpenRow) -> None:
        """Count a row that has all its samples."""
        if not open_row.is_done:
            return
        counts = self._format.count(in_order(open_row.finished))
        self._forget(open_row)
        if open_row.is_known:
            open_row.owner.know(open_row.row.ordinal, counts)
            return
        wrong = next((item for item in open_row.finished if item.error is not None), None)
        if wrong is not None:
            self._failures.add(open_row.owner.lease, wrong)
        open_row.owner.count(counts)
        seconds = self._clock() - open_row.added_at - (open_row.queued_s or 0.0)
        self._recorder.observe(ROW_SECONDS, max(0.0, seconds))

    def _forget(self, open_row: OpenRow) -> None:
        """The row is not in the engine any more."""
        open_row.owner.num_open -= 1
        del self._rows[open_row.key]
        self._leave_slot(open_row)

    def _leave_slot(self, open_row: OpenRow) -> None:
        if open_row.key in self._in_slot:
            self._in_slot.discard(open_row.key)
            self._flight_is_late = True

    def _expire(self) -> None:
        """Rows that took too long become error rows; samples they already have are kept.

        The time in the queue is not the row's.
        """
        limit = self._job.errors.row_timeout_s
        if limit is None:
            return
        now = self._clock()
        late: list[OpenRow] = []
        for key, open_row in self._rows.items():
            if open_row.started_at is None:
                open_row.started_at = now if self._engine.is_running(key) else None
            elif open_row.missing and now - open_row.started_at > limit:
                late.append(open_row)
        for open_row in late:
            self._engine.abort(open_row.key)
            error = RowError(ErrorKind.TIMEOUT, f"not finished within {limit:g} s")
            for sample in sorted(open_row.missing):
                del open_row.missing[sample]
                self._record(open_row, failed_sample(open_row.row, sample, error))

    # -- the ends of leases --------------------------------------------------------------------

    def _give_up(self, item: OpenLease, error: ShardError) -> FailedLease:
        """Drop a lease whose shard cannot be read, with all its rows."""
        self._drop(item)
        log_gone(item.lease, "lease_failed", error.message)
        hint = f" ({error.hint})" if error.hint else ""
        return FailedLease(item.lease, error.message + hint)

    def _drop(self, item: OpenLease) -> None:
        """Give up a lease with all its rows; what they have sampled is lost."""
        self._discarded_tokens += item.unsaved_tokens + self._abort(item)
        self._leases.remove(item)
        self._writers.pop(item.lease.attempt, None)
        item.close()

    def _abort(self, item: OpenLease) -> int:
        """Take the lease's rows out of the engine; how many sampled tokens were in it."""
        num_tokens = 0
        for key in [key for key, open_row in self._rows.items() if open_row.owner is item]:
            num_tokens += self._engine.abort(key)
            self._forget(self._rows[key])
        return num_tokens

    def _running(self, item: OpenLease) -> list[RunningSample]:
        """What the engine is at for a lease."""
        attempt = item.lease.attempt
        return [
            sample
            for sample in self._engine.running()
            if cast(_RowKey, sample.key)[0] == attempt and sample.key in self._rows
        ]

    def _start_flushes(self) -> None:
        if self._journals is None:
            return
        now = self._clock()
        for item in self._leases:
            if item.is_due(now, self._job.checkpoint.interval_s):
                self._start_flush(item, now)

    def _start_flush(self, item: OpenLease, now: float) -> None:
        journal = self._writers[item.lease.attempt]
        item.start_flush(journal, self._running(item), self._publisher, now)

    def _start_publishing(self) -> None:
        for item in self._leases:
            if item.lease.whole and item.publishing is None and item.has_all_rows:
                item.publishing = self._publisher.submit(self._finish_part, item)

    def _finish_part(self, item: OpenLease) -> Part:
        """Close, verify and publish a part; runs beside the engine."""
        return self._publish(item.finish_part(), item.lease)

    def _collect(
        self, timeout_s: float, done: list[FinishedLease], failed: list[FailedLease]
    ) -> None:
        """Take note of what storage has done, or wait so long for it to do something; ``done`` and
        ``failed`` get the leases that ended."""
        waiting = self._being_saved()
        left = next((item for item in self._leases if not item.at_end), None)
        if left is not None:
            coming = left.reader.coming if left.opening.done() else left.opening
            waiting += [] if coming is None else [coming]
        if waiting:
            wait(waiting, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for item in list(self._leases):
            self._settle(item, done, failed)

    def _being_saved(self) -> list[Future[Any]]:
        """Parts and journals on their way to storage."""
        both = ((item.publishing, item.flushing) for item in self._leases)
        return [future for pair in both for future in pair if future is not None]

    def _settle(
        self, item: OpenLease, done: list[FinishedLease], failed: list[FailedLease]
    ) -> None:
        """What storage has done for one lease. Raises what it could not do."""
        if item.flushing is not None and item.flushing.done():
            self._end_flush(item)
        if item.publishing is not None and item.publishing.done():
            self._end_publishing(item, done, failed)
        elif not item.lease.whole and item.is_safe:
            self._end(item, item.finished(), done)

    def _end_flush(self, item: OpenLease) -> None:
        started_at = item.end_flush()
        if started_at is None:
            log_flush_failed(item.lease)
            return
        seconds = max(0.0, self._clock() - started_at)
        self._recorder.observe(CHECKPOINT_SECONDS, seconds)
        log_flushed(item.lease, item.state.saved, seconds)

    def _end_publishing(
        self, item: OpenLease, done: list[FinishedLease], failed: list[FailedLease]
    ) -> None:
        """Its part is in place, or something else stands where it belongs."""
        assert item.publishing is not None
        try:
            part = item.publishing.result()
        except ShardError as error:
            failed.append(self._give_up(item, error))
        else:
            self._end(item, item.finished(part), done)

    def _end(self, item: OpenLease, finished: FinishedLease, done: list[FinishedLease]) -> None:
        done.append(finished)
        log_ended(item.lease, finished.part)
        self._leases.remove(item)
        self._writers.pop(item.lease.attempt, None)
        item.close()

    def _give_back(
        self, timeout_s: float, done: list[FinishedLease], failed: list[FailedLease]
    ) -> list[ReturnedLease]:
        """Publish what is complete, journal what is not, for so long at most, and end all leases.

        What storage does not take, or not in time, is generated again, nothing worse.
        """
        until = self._clock() + timeout_s
        if self._scoring:
            self._take_verdicts(min(_SCORES_S, timeout_s))
        self._start_publishing()
        for item in self._leases:
            if item.publishing is not None or self._journals is None:
                continue
            if item.flushing is not None:
                wait([item.flushing], timeout=max(0.0, until - self._clock()))
                if not item.flushing.done():
                    continue
                with suppress(StorageError):  # the next one brings the same again
                    self._end_flush(item)
            self._start_flush(item, self._clock())
        while True:
            for item in list(self._leases):
                self._settle_last(item, done, failed)
            left, left_s = self._being_saved(), until - self._clock()
            if not left or left_s <= 0:
                break
            wait(left, timeout=left_s, return_when=FIRST_COMPLETED)
        returned: list[ReturnedLease] = []
        for item in list(self._leases):
            state = item.state
            returned.append(ReturnedLease(item.lease.attempt, state.saved))
            message = f"given back with {state.saved.rows} finished rows in the journal"
            log_gone(item.lease, "lease_returned", message)
            self._discarded_tokens += item.unsaved_tokens
            if item.flushing is not None:
                self._discarded_tokens += self._abort(item)
            else:
                self._abort(item)
            self._leases.remove(item)
            item.close()
        self._tell_flight()
        return returned

    def _settle_last(
        self, item: OpenLease, done: list[FinishedLease], failed: list[FailedLease]
    ) -> None:
        """As :meth:`_settle`; what storage does not take costs the other leases nothing. A part
        that cannot be published goes to the journal."""
        try:
            self._settle(item, done, failed)
        except StorageError as error:
            log_gone(item.lease, "lease_not_saved", error.message)
            part = item.publishing
            if part is not None and part.done() and part.exception() is not None:
                item.publishing = None
                if item.flushing is None and self._journals is not None:
                    self._start_flush(item, self._clock())

    # -- reports -------------------------------------------------------------------------------

    def _report(
        self,
        done: list[FinishedLease],
        failed: list[FailedLease],
        returned: list[ReturnedLease],
    ) -> WorkReport:
        self._gauge()
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
            failures=self._failures.take(),
            metrics=self._recorder.take(),
        )

    def _num_unsaved_tokens(self) -> int:
        """Sampled tokens that would be lost with the worker now."""
        count = sum(item.unsaved_tokens for item in self._leases)
        for sample in self._engine.running():
            open_row = self._rows.get(cast(_RowKey, sample.key))
            if open_row is not None:
                count += max(0, sample.num_sampled - open_row.owner.num_saved(sample))
        return count

    def _gauge(self) -> None:
        stats = self._engine.stats()
        self._recorder.set(ROWS_IN_FLIGHT, len(self._rows))
        self._recorder.set(SLOTS_USED, stats.slots_used)
        self._recorder.set(SLOTS_TOTAL, stats.slots_total)
        self._recorder.set(KV_PAGES_USED, stats.blocks_used)
        self._recorder.set(KV_PAGES_TOTAL, stats.blocks_total)
        if stats.least_seconds is not None:
            seconds = stats.step_seconds - self._gauged.step_seconds
            if seconds >= _ROOFLINE_S:
                least = stats.least_seconds - (self._gauged.least_seconds or 0.0)
                self._recorder.set(ROOFLINE, least / seconds)
                self._gauged = stats
        traffic().record(self._recorder)

"""Rows between reading and their end: requests into the engine, its outputs to leases.

A row enters with :meth:`OpenRows.build` and leaves when all its samples are finished: from the
journal, from the engine, or as an error. Finished samples are scored where the job asks for it and
handed to their lease.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Protocol, cast

from batchrun.completions import completion_of, failed_sample, in_order, with_calls
from batchrun.data.writer import PartFormat
from batchrun.engine.engine import Engine, RunningSample
from batchrun.engine.request import Output, Request
from batchrun.job import Job
from batchrun.leases import OpenLease, OpenRow
from batchrun.metrics import BUDGET_HITS, ROW_SECONDS, STEP_SECONDS, TOKENS, Recorder
from batchrun.records import Completion, ErrorKind, Row, RowError
from batchrun.reports import RowFailures
from batchrun.rowrequests import RequestBuilder
from batchrun.scoring import Scoring
from batchrun.worklog import FailureLog, log_retried

_RowKey = tuple[str, int]  # attempt, ordinal


class Flight(Protocol):
    """Is told which rows a death of this process may be due to."""

    def set(self, rows: Iterable[tuple[int, int]]) -> None:
        """These (shard number, ordinal) and no others."""


class OpenRows:
    """The rows that the engine has, or that wait for a verdict. Drives the engine.

    Not thread-safe.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        part_format: PartFormat,
        recorder: Recorder,
        flight: Flight | None,
        clock: Callable[[], float] = time.monotonic,
        keeps_finished: bool = False,
    ) -> None:
        """``flight`` has room for as many rows as the engine runs and those that are built at
        once; ``keeps_finished`` as for the pipeline."""
        self._engine = engine
        self._format = part_format
        self._recorder = recorder
        self._flight = flight
        self._clock = clock
        self._keeps_finished = keeps_finished
        self._max_retries = job.errors.max_retries
        self._timeout_s = job.errors.row_timeout_s
        self._requests = RequestBuilder(job, engine)
        self._scoring = Scoring(job.evaluate)
        self._failures = FailureLog()
        self._rows: dict[_RowKey, OpenRow] = {}
        self._in_slot: set[_RowKey] = set()
        self._flight_is_late = False
        engine.on_admit = self._on_admit

    def __len__(self) -> int:
        """How many rows are open."""
        return len(self._rows)

    @property
    def num_scoring(self) -> int:
        """Samples that wait for their verdict."""
        return len(self._scoring)

    def build(self, item: OpenLease, rows: list[Row]) -> None:
        """Rows into the engine, or straight to the part or the journal where they need not run."""
        if self._flight is not None and rows:
            # A prompt that cannot be made may take the process along as one that runs.
            self.tell_flight((item.lease.shard.number, row.ordinal) for row in rows)
            self._flight_is_late = True
        for row in rows:
            self._add(item, row)

    def step(self) -> None:
        """One step of the engine, and what it brought."""
        if self._flight_is_late:
            self.tell_flight()
        started = self._clock()
        outputs = self._engine.step()
        self._recorder.observe(STEP_SECONDS, self._clock() - started)
        for output in outputs:
            self._take(output)

    def take_in(self) -> None:
        """Take in the tokens that the engine's last step sampled; no step follows."""
        for output in self._engine.take_in():
            self._take(output)

    def take_verdicts(self, timeout_s: float) -> None:
        """Samples whose verdict is there go on; waits so long for one to come."""
        for open_row, completion in self._scoring.take(timeout_s):
            if self._rows.get(open_row.key) is open_row:  # else its lease was given up
                self._record(open_row, completion)

    def expire(self) -> None:
        """Rows that took too long become error rows; samples they already have are kept.

        The time in the queue is not the row's.
        """
        limit = self._timeout_s
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

    def abort(self, item: OpenLease) -> int:
        """Take a lease's rows out of the engine; how many sampled tokens were in it."""
        num_tokens = 0
        for key in [key for key, open_row in self._rows.items() if open_row.owner is item]:
            num_tokens += self._engine.abort(key)
            self._forget(self._rows[key])
        return num_tokens

    def running(self, item: OpenLease) -> list[RunningSample]:
        """What the engine is at for a lease."""
        attempt = item.lease.attempt
        return [
            sample
            for sample in self._engine.running()
            if cast(_RowKey, sample.key)[0] == attempt and sample.key in self._rows
        ]

    def num_unsaved_tokens(self, item: OpenLease) -> int:
        """Sampled tokens of a lease's running samples that would be lost with the worker now."""
        running = self.running(item)
        return sum(max(0, sample.num_sampled - item.num_saved(sample)) for sample in running)

    def take_failures(self) -> tuple[RowFailures, ...]:
        """Rows that failed since the last time, one entry a kind."""
        return self._failures.take()

    def tell_flight(self, building: Iterable[tuple[int, int]] = ()) -> None:
        """Write down which rows have a slot, and those that become prompts."""
        if self._flight is not None:
            rows = {(self._rows[key].owner.lease.shard.number, key[1]) for key in self._in_slot}
            self._flight.set(rows.union(building))
            self._flight_is_late = False

    def close(self) -> None:
        """Give up everything. May be called twice."""
        for key in list(self._rows):
            self._engine.abort(key)
        self._rows.clear()
        self._in_slot.clear()
        self.tell_flight()
        if self._engine.on_admit == self._on_admit:
            self._engine.on_admit = None
        self._scoring.close()

    # -- into the engine -----------------------------------------------------------------------

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
                finished.append(self._scoring.wait_for(completion, row))
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
            self._scoring.start(open_row, completion)
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
            if self._scoring.takes_time(completion):
                unscored.append(completion)
                continue
            finished.append(self._scoring.scored(completion, row.answer))
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
        failed = [
            self._scoring.scored(failed_sample(row, sample, error), row.answer)
            for sample in samples
        ]
        for completion in failed:
            item.add(completion)
        self._failures.add(item.lease, failed[0])
        item.count(self._format.count(in_order([*finished, *failed])))

    # -- out of the engine ---------------------------------------------------------------------

    def _on_admit(self, keys: Iterable[Hashable]) -> None:
        """The engine has given these rows a slot, and is about to run them."""
        found = self._in_slot | cast(set[_RowKey], set(keys))
        # What was sent back into the queue, after an error or for want of memory, has none now.
        self._in_slot = {key for key in found if self._engine.is_running(key)}
        self.tell_flight()

    def _take(self, output: Output) -> None:
        """A finished sample of the engine."""
        open_row = self._rows.get(cast(_RowKey, output.key))
        if open_row is None:
            return  # its lease was given up or its row timed out at this very step
        if output.error is not None and output.error.kind is ErrorKind.ENGINE:
            num_retries = open_row.num_retries.get(output.sample, 0)
            if num_retries < self._max_retries:
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
        if self._scoring.takes_time(completion):
            self._scoring.start(open_row, completion)
        else:
            self._record(open_row, completion)

    def _record(self, open_row: OpenRow, completion: Completion) -> None:
        owner = open_row.owner
        completion = self._scoring.scored(completion, open_row.row.answer)
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

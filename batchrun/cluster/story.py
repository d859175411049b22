"""What the driver of a run knows and decides, as lines of its log.

A shard's name or a row's id, looked for in the log, tells the way of that shard or row: to whom it
was leased, what came from the journal, what was made safe, who was lost with it, who published it.
What workers do with a lease they log themselves (:mod:`batchrun.worklog`), where Ray keeps it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from batchrun.cluster.tally import Progress
from batchrun.events import (
    CancelLease,
    Command,
    DrainRun,
    Event,
    FailShard,
    FinishRun,
    LeaseDone,
    LeaseFailed,
    LeaseReturned,
    OutcomeKind,
    SetAside,
    StartLease,
    StartWorker,
    StopRequested,
    StopWorker,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
)
from batchrun.logs import RepeatGate, log_event
from batchrun.records import Counts, Lease, Part, Shard, Strike
from batchrun.reports import RowFailures, WorkReport

_PROGRESS_EVERY_S = 60.0


@dataclass(slots=True)
class _Given:
    """A lease that a worker has, and what was said of it."""

    worker: str
    lease: Lease
    is_resumed: bool = False
    saved_rows: int = 0


class Story:
    """Logs one line for each thing that happens to a worker, a lease or a shard; see
    :func:`batchrun.logs.log_event`. Remembers the leases that are given, nothing else."""

    def __init__(
        self, shards: Mapping[int, Shard], clock: Callable[[], float] | None = None
    ) -> None:
        """``shards`` are those of the run, by number."""
        self._shards = shards
        self._given: dict[str, _Given] = {}
        self._gate = RepeatGate(_PROGRESS_EVERY_S) if clock is None else RepeatGate(60, clock)

    def begin(self, total_rows: int, parts: Mapping[int, Part], version: str, host: str) -> None:
        """The driver has the lock and the plan."""
        done = sum(part.num_rows for part in parts.values())
        log_event(
            "run_started",
            f"{total_rows} rows in {len(self._shards)} shards, {len(parts)} of them published",
            rows=total_rows,
            rows_published=done,
            version=version,
            host=host,
        )

    def tell(self, event: Event) -> None:
        """A fact, before anything follows from it."""
        match event:
            case WorkerReady(worker, max_sequences, device, paid_s):
                log_event(
                    "worker_ready",
                    f"{max_sequences} sequences at once; {paid_s:.1f} s after it was asked for",
                    worker=worker,
                    device=device or "cpu",
                )
            case WorkerDraining(worker):
                log_event("worker_draining", "ends soon: no more leases", worker=worker)
            case WorkerLost():
                self._lose(event)
            case LeaseDone(worker, attempt, part, counts):
                self._end(worker, attempt, part, counts)
            case LeaseReturned(worker, attempt):
                self._close(attempt, "lease_returned", "given back; its journal is written", worker)
            case LeaseFailed(worker, attempt, message):
                self._close(attempt, "lease_failed", message, worker, level=logging.ERROR)
            case StopRequested(message):
                log_event("run_stopping", message)
            case _:
                pass

    def order(self, command: Command) -> None:
        """A decision, as it is carried out."""
        match command:
            case StartWorker(worker):
                log_event("worker_asked", "asked the cluster for a worker", worker=worker)
            case StopWorker(worker):
                log_event("worker_stopped", "not needed any longer", worker=worker)
            case StartLease(worker, lease):
                self._given[lease.attempt] = _Given(worker, lease)
                what = "all rows, to publish the part" if lease.whole else "some rows"
                log_event(
                    "lease_isolated" if lease.alone else "lease_given",
                    "rows that a worker may have died of run alone" if lease.alone else what,
                    worker=worker,
                    place=_place(lease),
                )
                for ordinal, why in lease.lost.items():
                    log_event(
                        "row_given_up",
                        why,
                        level=logging.ERROR,
                        shard=lease.shard.name,
                        attempt=lease.attempt,
                        row=ordinal,
                    )
            case CancelLease(worker, attempt):
                self._close(attempt, "lease_cancelled", "its rows are safe, or not needed", worker)
            case SetAside(device, message):
                log_event("device_set_aside", message, level=logging.ERROR, device=device)
            case FailShard(shard, message):
                log_event("shard_failed", message, level=logging.ERROR, shard=shard.name)
            case DrainRun(message):
                log_event("run_draining", message, level=logging.WARNING)
            case FinishRun(outcome):
                ok = outcome.kind is OutcomeKind.SUCCESS
                log_event(
                    "run_finished",
                    outcome.message,
                    level=logging.INFO if ok else logging.ERROR,
                    outcome=outcome.kind.value,
                    rows=outcome.counts.rows,
                    failed_rows=outcome.failed_rows,
                )

    def strike(self, strike: Strike) -> None:
        """A death that rows may be to blame for was written down."""
        for number, rows in strike.rows.items():
            log_event(
                "rows_suspect",
                "in the engine of a worker that died"
                if not strike.blind
                else "held by a worker that died",
                level=logging.WARNING,
                worker=strike.worker,
                shard=self._shards[number].name if number in self._shards else str(number),
                row=str(rows),
                cause=strike.cause,
                alone=int(strike.alone),
            )

    def report(self, worker: str, report: WorkReport) -> None:
        """What a worker says of leases that go on, and of rows that failed."""
        for state in report.running:
            given = self._given.get(state.attempt)
            if given is None:
                continue
            if state.journaled.rows and not given.is_resumed:
                self._say_known(given, state.journaled.rows, state.journaled.output_tokens)
            if state.saved.rows > given.saved_rows:
                given.saved_rows = state.saved.rows
                log_event(
                    "lease_flushed",
                    "finished rows are in the journal",
                    worker=worker,
                    place=_place(given.lease),
                    rows=state.saved.rows,
                    tokens=state.saved.output_tokens,
                )
        for done in report.done:  # so quickly that no report had it running
            given = self._given.get(done.lease.attempt)
            num_rows = done.counts.rows - done.fresh.rows
            if given is not None and num_rows > 0 and not given.is_resumed:
                num_tokens = done.counts.output_tokens - done.fresh.output_tokens
                self._say_known(given, num_rows, num_tokens)
        for failures in report.failures:
            self.fail_rows(worker, failures)

    def fail_rows(self, worker: str, failures: RowFailures) -> None:
        """Rows that became error rows: one of them by its id."""
        shard = self._shards.get(failures.shard)
        log_event(
            "row_failed",
            f"{failures.kind.value}; the column `error` of the output says more",
            level=logging.WARNING,
            error_class=f"row_failed {failures.kind.value}",
            worker=worker,
            shard=str(failures.shard) if shard is None else shard.name,
            row=failures.row_id,
            kind=failures.kind.value,
            rows=failures.num_rows,
        )

    def show(self, progress: Progress) -> None:
        """How far the run is; once a minute."""
        if self._gate.admit("progress"):
            workers = ", ".join(f"{n} {state}" for state, n in progress.workers.items() if n)
            log_event(
                "progress",
                f"{progress.done.rows} of {progress.total_rows} rows; workers: {workers or 'none'}",
                rows=progress.done.rows,
                failed_rows=progress.done.failed_rows,
                tokens_per_s=round(progress.tokens_per_s, 1),
                place={} if progress.eta_s is None else {"eta_s": round(progress.eta_s)},
            )

    def _lose(self, event: WorkerLost) -> None:
        level = logging.WARNING
        log_event(
            "worker_lost",
            event.message or "gone",
            level=level,
            worker=event.worker,
            cause=event.cause.value,
            node_lived=int(event.node_lived),
            rows_in_engine="unknown" if event.in_flight is None else len(event.in_flight),
        )
        for attempt in [key for key, item in self._given.items() if item.worker == event.worker]:
            saved = self._given[attempt].saved_rows
            self._close(
                attempt,
                "lease_lost",
                f"lost with its worker; {saved} finished rows are in the journal",
                event.worker,
                level=level,
            )

    def _end(self, worker: str, attempt: str, part: Part | None, counts: Counts) -> None:
        given = self._given.pop(attempt, None)
        counts = counts if part is None else part.counts
        if part is None:
            if given is not None:
                log_event(
                    "lease_journaled",
                    "all its rows are in the journal",
                    worker=worker,
                    place=_place(given.lease),
                    rows=counts.rows,
                    failed_rows=counts.failed_rows,
                    tokens=counts.output_tokens,
                )
            return
        shard = self._shards.get(part.shard)
        by = f" by attempt {part.attempt}" if part.attempt != attempt else ""
        log_event(
            "shard_published" if given is not None else "shard_published_late",
            f"{part.name} stands{by}",
            worker=worker,
            shard=str(part.shard) if shard is None else shard.name,
            attempt=attempt,
            published_by=part.attempt,
            rows=counts.rows,
            failed_rows=counts.failed_rows,
            tokens=counts.output_tokens,
        )

    def _say_known(self, given: _Given, num_rows: int, num_tokens: int) -> None:
        given.is_resumed = True
        log_event(
            "lease_resumed",
            "finished rows were in the journal",
            worker=given.worker,
            place=_place(given.lease),
            rows=num_rows,
            tokens=num_tokens,
        )

    def _close(
        self, attempt: str, event: str, message: str, worker: str, *, level: int = logging.INFO
    ) -> None:
        given = self._given.pop(attempt, None)
        if given is not None:  # else it is late news
            log_event(event, message, level=level, worker=worker, place=_place(given.lease))


def _place(lease: Lease) -> dict[str, str | int]:
    return {"shard": lease.shard.name, "attempt": lease.attempt, "row": str(lease.rows)}

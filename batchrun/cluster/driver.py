"""The driver: one loop from the workers' news over the coordinator to commands.

1. ``opening``: check the job, take the run lock, make or adopt the plan. Nothing left to do ends
   here, without Ray.
2. ``connection`` and ``fleet``: Ray, and the workers as actors.
3. The loop: news -> events -> :class:`~batchrun.coordinator.RunState` -> commands. What it comes to
   is counted in ``tally``, logged by ``story`` and shown by ``view`` and ``board``.
4. The end: manifest and ``_SUCCESS``, workers, Ray and lock given up, whatever happened.

Bulk data never passes through here; what moves is keys and counts.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from batchrun import __version__
from batchrun.cluster.board import Board
from batchrun.cluster.connection import Cluster
from batchrun.cluster.opening import CheckedJob, check
from batchrun.cluster.story import Story
from batchrun.cluster.summary import Retried, Summary, retry_text
from batchrun.cluster.tally import Progress, Tally
from batchrun.cluster.view import NoView, View
from batchrun.cluster.worker import TraceSource, WorkerSettings
from batchrun.coordinator import RunState
from batchrun.data.lock import RunLock
from batchrun.data.resume import OpenedRun
from batchrun.data.retry import Retry, apply_staged
from batchrun.data.strikes import read_strikes, write_strike
from batchrun.data.sweeper import JournalSweeper
from batchrun.errors import StorageError
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
    LeasesWanted,
    Limits,
    LossCause,
    Outcome,
    OutcomeKind,
    RunStarted,
    SetAside,
    StartLease,
    StartWorker,
    StopRequested,
    StopWorker,
    Tick,
    TokensSpent,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
)
from batchrun.job import Job
from batchrun.jobfile import JobSource
from batchrun.logs import RepeatGate, log_context
from batchrun.records import Counts, Part
from batchrun.wording import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchrun.cluster.fleet import Fleet, News, WorkerGone, WorkerReported
    from batchrun.reports import WorkReport

_SHOW_EVERY_S = 0.5
_DRAIN_S = 15.0
_SAY_FAILURES_EVERY_S = 10.0
_SAY_PENDING_AFTER_S = 10.0

_RESTART_CAUSE = {
    LossCause.CRASH: "died",
    LossCause.HANG: "hung",
    LossCause.NODE: "node_lost",
    LossCause.LOAD: "load_failed",
}


def run_job(
    job: Job,
    *,
    source: JobSource | None = None,
    address: str | None = None,
    deterministic: bool = False,
    keep_finished: bool = False,
    stop: threading.Event | None = None,
    view: View | None = None,
) -> Summary:
    """Run ``job`` to its end, or until ``stop`` is set; the summary says how it ended.

    ``source`` gives problems their lines. ``address`` None starts a Ray on this machine, else
    that cluster is joined (``auto``: the one that runs here). ``deterministic`` makes the texts
    equal to the byte however the work is spread. With ``keep_finished`` the finished parts of
    another job's run in the output stay, and the rest runs with this one.

    Raises:
        BatchrunError: what keeps the run from beginning, or from going on: JobError, OutputError,
            ClusterError, OutputHeldError, StorageError, CheckpointError.
    """
    started = time.monotonic()
    view = view or NoView()
    checked = check(job, source, keep_finished=keep_finished)
    with Cluster(job, address, view) as cluster:
        return run_checked(
            checked, cluster, started=started, deterministic=deterministic, stop=stop, view=view
        )


def run_checked(
    checked: CheckedJob,
    cluster: Cluster,
    *,
    started: float,
    deterministic: bool = False,
    stop: threading.Event | None = None,
    view: View | None = None,
    source: TraceSource | None = None,
) -> Summary:
    """:func:`run_job` for a job that was checked, in a cluster that may outlive the run.

    ``started`` is when the clock of the run began; ``source`` is a run whose tokens are taken
    over as far as they are the same.
    """
    view = view or NoView()
    with ExitStack() as stack:
        if not cluster.is_local or cluster.is_choosy:
            cluster.connect()  # what it cannot give is known before anything is written
        lock = stack.enter_context(RunLock(checked.store, checked.run))
        name = checked.job.name
        stack.enter_context(log_context(run=checked.run, job=name, epoch=lock.epoch))
        opened = checked.open(lock.confirm)
        driver = _Driver(checked, opened, lock, started, view, stop or threading.Event())
        stack.callback(driver.close)
        return driver.run(cluster, deterministic, source)


class _Driver:
    """One run from its lock to its end."""

    def __init__(
        self,
        checked: CheckedJob,
        opened: OpenedRun,
        lock: RunLock,
        started: float,
        view: View,
        stop: threading.Event,
    ) -> None:
        job = checked.job
        self._checked = checked
        self._opened = opened
        self._lock = lock
        self._started = started
        self._view = view
        self._stop = stop
        self._retry = retry = opened.retry
        todo = {} if retry is None else retry.rows
        done = {number: part for number, part in opened.parts.items() if number not in todo}
        self._state = RunState(
            opened.shards,
            done,
            epoch=lock.epoch,
            max_workers=job.resources.most_workers,
            min_workers=job.resources.fewest_workers,
            max_failed_rows=job.errors.max_failed_rows,
            max_retries=job.errors.max_retries,
            todo=todo,
            strikes=read_strikes(checked.store, checked.run),
            canary_rows=0 if retry is not None else job.errors.canary_rows,
            num_samples=job.generation.n,
            limits=_limits(job),
        )
        self._story = Story(self._state.shards)
        self._failures_shown = RepeatGate(_SAY_FAILURES_EVERY_S)
        self._sweeper = JournalSweeper(checked.store, checked.run)
        kept = {number: _without(opened.parts[number], len(rows)) for number, rows in todo.items()}
        self._tally = Tally(opened.total_rows, len(opened.shards), done, kept)
        self._board = Board(job, opened, self._tally, epoch=lock.epoch, started=started)
        self._fleet: Fleet | None = None
        self._cluster: Cluster | None = None
        self._outcome: Outcome | None = None
        self._ready_at: float | None = None  # when the first worker had loaded
        self._restarts = 0
        self._shown_at = float("-inf")

    def run(self, cluster: Cluster, deterministic: bool, source: TraceSource | None) -> Summary:
        """Work until the coordinator ends the run."""
        self._cluster = cluster
        opened = self._opened
        self._story.begin(opened.total_rows, opened.parts, __version__, socket.gethostname())
        if not self._stop.is_set():
            self._say_begin()
        commands = self._state.handle(RunStarted(time.monotonic()))
        if not self._state.finished:
            if (url := self._board.serve()) is not None:
                self._view.say(f"metrics: {url}")
            self._fleet = self._make_fleet(cluster, deterministic, source)
            if not cluster.is_local:  # a Ray of our own has no dashboard
                self._board.mirror()
        self._do(commands)
        while self._outcome is None:
            if self._stop.is_set() or self._lock.cancelled.is_set():
                asked = "interrupted" if self._stop.is_set() else "cancelled through the output"
                self._drain(asked)
                break
            self._lock.check()
            cluster.check_alive()
            try:
                self._turn(self._the_fleet)
            except StorageError as error:
                self._drain(error.message)  # whose storage still answers saves what it has
                raise
            except Exception:
                cluster.check_alive(at_once=True)  # what failed may have failed for that
                raise
        return self._end()

    def _say_begin(self) -> None:
        """What there is to do, where that is not simply everything."""
        if self._retry is not None:
            self._view.say(retry_text(self._retry))
        elif self._opened.parts:
            done, total = self._tally.done().rows, self._tally.total_rows
            self._view.say(f"resuming: {done:,} of {total:,} rows are done already")

    def close(self) -> None:
        """End the workers and the metrics' endpoint. May be called twice."""
        if self._fleet is not None and not (self._cluster and self._cluster.is_lost):
            self._fleet.stop_all()
        self._sweeper.close()
        self._board.close()

    @property
    def _the_fleet(self) -> Fleet:
        assert self._fleet is not None
        return self._fleet

    def _make_fleet(
        self, cluster: Cluster, deterministic: bool, source: TraceSource | None
    ) -> Fleet:
        shape = cluster.connect()
        from batchrun.cluster.fleet import Fleet

        job = self._checked.job
        settings = WorkerSettings(
            job=job,
            run=self._checked.run,
            schema=self._opened.schema,
            part_format=self._checked.part_format,
            num_threads=shape.num_threads,
            num_neighbours=cluster.num_neighbours(),
            deterministic=deterministic,
            source=source,
            retry=self._retry,
        )
        return Fleet(settings, shape, job.errors.hang_timeout_s, spares=cluster.spares)

    def _turn(self, fleet: Fleet) -> None:
        for news in fleet.wait(0.2):
            self._take(news)
        self._handle(Tick(time.monotonic()))
        now = time.monotonic()
        if now - self._shown_at >= _SHOW_EVERY_S:
            self._shown_at = now
            self._show(now)

    def _handle(self, event: Event) -> None:
        self._story.tell(event)
        self._do(self._state.handle(event))

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            self._story.order(command)
            match command:
                case StartWorker(worker):
                    self._the_fleet.start(worker)
                case StopWorker(worker):
                    self._the_fleet.stop(worker)
                    self._board.stopped(worker)
                case StartLease(worker, lease):
                    self._the_fleet.give(worker, lease)
                case CancelLease(worker, attempt):
                    self._tally.give_up(attempt)
                    self._the_fleet.cancel(worker, attempt)
                case SetAside(device, message):
                    self._view.say(f"{device} gets no more work: {message}")
                case DrainRun(message):
                    self._drain(message)
                case FailShard() | FinishRun():
                    self._conclude(command)

    def _conclude(self, command: Command) -> None:
        """The commands that hold also while a run is being stopped."""
        match command:
            case FailShard(shard, message):
                if self._retry is not None:
                    self._view.say(f"shard {shard.name} stays as it is: {message}")
                    return
                self._tally.fail(shard.number, shard.num_rows)
                self._opened.directory.mark_failed(shard, message)
                self._view.say(f"shard {shard.name} cannot be run: {message}")
            case FinishRun(outcome):
                self._outcome = outcome
            case _:
                pass

    def _take(self, news: News) -> None:
        from batchrun.cluster.fleet import WorkerGone, WorkerLoaded, WorkerReported

        match news:
            case WorkerLoaded(worker, loaded):
                self._ready_at = self._ready_at or time.monotonic()
                self._board.loaded(news)
                self._handle(
                    WorkerReady(worker, loaded.max_sequences, loaded.device, loaded.load_s)
                )
            case WorkerReported():
                self._take_report(news)
            case WorkerGone():
                self._take_loss(news)

    def _take_loss(self, news: WorkerGone) -> None:
        worker, cause = news.worker, news.cause
        if news.error is not None and cause is LossCause.LOAD and not self._state.num_ready:
            raise news.error  # the same everywhere: no other try would help
        self._count_loss(worker, _RESTART_CAUSE[cause])
        self._view.say(f"worker {worker} is lost ({cause}): {news.message}")
        if news.stacks:
            self._view.say(f"where it stood:\n{news.stacks}")
        event = WorkerLost(worker, cause, news.message, news.node_lived, news.in_flight)
        strike = self._state.strike(event)
        if strike is not None:
            # Before anything is decided: what is known of rows that kill outlives this driver.
            write_strike(self._checked.store, self._checked.run, self._lock.epoch, strike)
            self._story.strike(strike)
        self._handle(event)

    def _take_report(self, news: WorkerReported) -> None:
        worker, report = news.worker, news.report
        self._board.reported(news)
        self._tally.report(worker, report)
        self._story.report(worker, report)
        self._say_failures(report)
        if report.draining:
            self._handle(WorkerDraining(worker))
        for event in self._events(worker, report):
            self._handle(event)
        # Last: a limit that the very end of a run passes stops nothing.
        self._handle(TokensSpent(worker, report.prompt_tokens + report.sampled_tokens))
        if report.draining and report.idle:
            self._the_fleet.stop(worker)
            self._count_loss(worker, "preempted")
            self._handle(WorkerLost(worker, LossCause.NODE, "drained", node_lived=False))
        else:
            self._handle(LeasesWanted(worker, report.num_wanted))

    def _say_failures(self, report: WorkReport) -> None:
        """Rows that failed, as it happens: of each kind one by name every few seconds."""
        for failures in report.failures:
            kind = failures.kind.value
            num_rows = self._failures_shown.admit(kind, failures.num_rows)
            if num_rows:
                more = f", and {num_rows - 1:,} more rows" if num_rows > 1 else ""
                self._view.say(f"row {quoted(failures.row_id)} failed: {kind}{more}")

    def _events(self, worker: str, report: WorkReport) -> Iterator[Event]:
        """The ends of leases in a report, counted."""
        for done in report.done:
            if done.part is not None and self._retry is not None:
                self._replace(done.part, self._retry)
            self._tally.end(done)
            if done.part is not None:
                self._sweeper.published(done.part.shard)
            yield LeaseDone(worker, done.lease.attempt, done.part, done.counts)
        for failed in report.failed:
            self._tally.give_up(failed.lease.attempt)
            yield LeaseFailed(worker, failed.lease.attempt, failed.message)
        for returned in report.returned:
            self._tally.give_back(returned)
            yield LeaseReturned(worker, returned.attempt)

    def _replace(self, part: Part, retry: Retry) -> None:
        """Put a staged part in the place of the one that it was made from."""
        if part.shard not in self._state.done:
            store, run, confirm = self._checked.store, self._checked.run, self._lock.confirm
            apply_staged(store, run, part.shard, retry.number, confirm)

    def _count_loss(self, worker: str, cause: str) -> None:
        self._restarts += 1
        self._board.lost(worker, cause)
        self._tally.lose(worker)

    def _show(self, now: float) -> None:
        """How far the run is, wherever that is to be seen."""
        workers = self._the_fleet.states()
        progress = self._tally.progress(now, self._started, workers)
        if self._the_fleet.oldest_start_s > _SAY_PENDING_AFTER_S and workers["starting"]:
            progress = replace(progress, note="waiting for the first worker to load its model")
        elif stranded := self._state.stranded_on:
            note = f"waiting for another device: set aside is {', '.join(sorted(stranded))}"
            progress = replace(progress, note=note)
        self._board.show(now, progress)
        self._view(progress)
        self._story.show(progress)

    def _drain(self, message: str) -> None:
        """Stop in good order: what is complete is published, the rest is journaled, in time."""
        self._view.say(f"stopping ({message}): what was generated is made safe first")
        if self._fleet is not None:
            for news in self._fleet.finish(_DRAIN_S):
                self._board.reported(news)
                self._tally.report(news.worker, news.report)
                self._story.report(news.worker, news.report)
                self._say_failures(news.report)
                for event in self._events(news.worker, news.report):
                    self._stop_with(event)
        self._stop_with(StopRequested(message))

    def _stop_with(self, event: Event) -> None:
        """Take in a fact while the run is being stopped."""
        self._story.tell(event)
        for command in self._state.handle(event):
            if isinstance(command, FailShard | FinishRun):
                self._story.order(command)
            self._conclude(command)

    def _end(self) -> Summary:
        """Manifest and ``_SUCCESS``, where the run came to its end; the summary."""
        assert self._outcome is not None
        outcome = self._outcome
        self.close()
        if outcome.kind in (OutcomeKind.SUCCESS, OutcomeKind.TOO_MANY_FAILURES):
            self._lock.confirm()
            self._finish(success=outcome.kind is OutcomeKind.SUCCESS)
        now = time.monotonic()
        progress = self._tally.progress(now, self._started, {})
        self._board.save(now, progress)
        summary = self._summary(progress, now)
        if self._fleet is not None:  # else nothing was to do, and nothing is to tell
            self._board.record(outcome.kind.value, outcome.message, summary.exit_code)
        return summary

    def _summary(self, progress: Progress, now: float) -> Summary:
        assert self._outcome is not None
        outcome, state = self._outcome, self._state
        retried = None
        if self._retry is not None:
            retried = Retried.of(self._retry, state.done, self._opened.num_unfinished)
            parts = {**self._opened.parts, **state.done}
            counts = sum((part.counts for part in parts.values()), Counts())
            outcome = replace(outcome, counts=counts, failed_rows=counts.failed_rows)
        generated = progress.generated
        return Summary(
            name=self._checked.job.name,
            run_id=self._checked.run,
            output=self._checked.job.output.path,
            outcome=outcome.kind,
            message=outcome.message,
            total_rows=self._tally.total_rows,
            counts=outcome.counts,
            failed_rows=outcome.failed_rows,
            num_shards=self._tally.num_shards,
            failed_shards={
                state.shards[number].name: why for number, why in outcome.failed_shards.items()
            },
            generated_rows=generated.rows,
            generated_tokens=generated.output_tokens,
            journaled_rows=self._tally.journaled_rows,
            sampled_tokens=self._tally.sampled_tokens,
            prefix_tokens=self._tally.prefix_tokens,
            discarded_tokens=self._tally.discarded_tokens,
            restarts=self._restarts,
            elapsed_s=now - self._started,
            startup_s=(self._ready_at or now) - self._started,
            retried=retried,
        )

    def _finish(self, *, success: bool) -> None:
        """Manifest and ``_SUCCESS``. Of a retry a shard that failed has its part still, and of a
        run that is not finished yet there is none of both."""
        if self._opened.num_unfinished:
            return
        failed = self._state.failed if self._retry is None else {}
        self._opened.directory.finish(
            self._opened.shards, failed, success=success, known=self._state.done
        )


def _without(part: Part, num_rows: int) -> Counts:
    """The counts of a part without so many of its failed rows."""
    counts = part.counts
    return replace(
        counts, rows=counts.rows - num_rows, failed_rows=max(0, counts.failed_rows - num_rows)
    )


def _limits(job: Job) -> Limits:
    limits, resources = job.limits, job.resources
    price = resources.price_per_gpu_hour or 0.0  # a worker has one GPU, or one share of the CPU
    return Limits(limits.max_hours, limits.max_tokens, limits.max_cost, price)

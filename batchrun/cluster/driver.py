"""The driver: one loop from the workers' news over the coordinator to commands.

1. ``opening``: check the job, take the run lock, make or adopt the plan. Nothing left to do ends
   here, without Ray.
2. ``session`` and ``fleet``: Ray, and the workers as actors.
3. The loop: news -> events -> :class:`~batchrun.coordinator.RunState` -> commands.
4. The end: manifest and ``_SUCCESS``, workers, Ray and lock given up, whatever happened.

Bulk data never passes through here; what moves is keys and counts.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from batchrun import __version__
from batchrun.cluster.capacity import Capacity, WorkerShape, plan_shape
from batchrun.cluster.chronicle import Chronicle
from batchrun.cluster.opening import CheckedJob, check
from batchrun.cluster.session import (
    forget_ray,
    head_address,
    head_answers,
    nodes_are_coming,
    ray_lives,
    ray_session,
    read_capacity,
)
from batchrun.cluster.story import Story
from batchrun.cluster.summary import Retried, Summary, retry_text
from batchrun.cluster.tally import Progress, Tally
from batchrun.cluster.worker import TraceSource, WorkerSettings
from batchrun.coordinator import RunState
from batchrun.data import run as bookkeeping
from batchrun.data.history import History, Moment, write_history
from batchrun.data.lock import RunLock
from batchrun.data.retry import Retry, apply_staged
from batchrun.data.run import OpenedRun
from batchrun.data.strikes import read_strikes, write_strike
from batchrun.data.sweeper import JournalSweeper
from batchrun.data.traffic import traffic
from batchrun.errors import InterruptedRunError, StorageError
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
from batchrun.metrics import (
    ETA,
    LAST_PROGRESS,
    RESTARTS,
    ROWS,
    ROWS_LEFT,
    SLOTS_USED,
    TOKENS,
    TOKENS_DISCARDED,
    WORKER_SECONDS,
    WORKERS,
    Recorder,
    RunMetrics,
)
from batchrun.records import Counts, Part
from batchrun.wording import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchrun.cluster.fleet import Fleet, News, WorkerGone, WorkerReported
    from batchrun.cluster.raymetrics import RayMetrics
    from batchrun.reports import WorkReport

_SHOW_EVERY_S = 0.5
_SAVE_EVERY_S = 3.0
_RECORD_EVERY_S = 10.0
_GENERATED = ("reasoning", "completion")  # the kinds of tokens that a worker makes
_DRAIN_S = 15.0
_SAY_FAILURES_EVERY_S = 10.0
_CHECK_ALIVE_EVERY_S = 1.0
_SAY_PENDING_AFTER_S = 10.0
_GIVE_UP_PENDING_AFTER_S = 60.0
_HEAD_SILENT_S = 20.0  # Ray ends this process after 60

_RESTART_CAUSE = {
    LossCause.CRASH: "died",
    LossCause.HANG: "hung",
    LossCause.NODE: "node_lost",
    LossCause.LOAD: "load_failed",
}


class View(Protocol):
    """Where a run is shown."""

    def say(self, text: str) -> None:
        """One line of news for a person."""

    def __call__(self, progress: Progress) -> None:
        """How far the run is now."""


class NoView:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def __call__(self, progress: Progress) -> None:
        """Nothing."""


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
        driver = _Driver(checked, checked.open(), lock, started, view, stop or threading.Event())
        stack.callback(driver.close)
        return driver.run(cluster, deterministic, source)


class Cluster:
    """The cluster of one run, or of several of one job after each other; connected to when it is
    needed, and until the end of the ``with``."""

    def __init__(
        self, job: Job, address: str | None, view: View, *, keeps_workers: bool = False
    ) -> None:
        """With ``keeps_workers`` the next run gets the workers of the one before, with the model
        that they have loaded; the runs must agree in model, resources and determinism."""
        self.is_local = address is None
        self.is_lost = False
        """Whether its head is dead: whatever is asked of Ray then waits for it."""
        self._head: str | None = None
        self.spares: list[Any] | None = [] if keeps_workers else None
        """Idle workers without a run."""
        self._resources = job.resources
        self._runtime_env = job.ray.runtime_env
        self._address = address
        self._stack = ExitStack()
        self._view = view
        self._shape: WorkerShape | None = None
        self._capacity: Capacity | None = None
        self._check_at = 0.0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_lost:
            self._stack.close()

    @property
    def is_choosy(self) -> bool:
        """Whether the job asks for something that a machine may not have."""
        return self._resources.accelerator_type is not None or self._resources.gpus_per_worker == 1

    def connect(self) -> WorkerShape:
        """The shape of a worker in this cluster; raises ClusterError when it can hold none."""
        if self._shape is None:
            wanted = self._resources
            self._capacity = self._stack.enter_context(
                ray_session(self._address, wanted.most_workers, self._runtime_env)
            )
            self._stack.callback(self._end_spares)
            if not self.is_local:
                self._head = head_address()
            gpus = wanted.gpus_per_worker
            self._shape = plan_shape(
                self._capacity,
                wanted.most_workers,
                None if gpus == "auto" else gpus,
                wanted.accelerator_type,
            )
            if not self._capacity.fits(self._shape, wanted.fewest_workers):
                self._wait_for_nodes(self._capacity, self._shape, wanted.fewest_workers)
        return self._shape

    def check_alive(self, *, at_once: bool = False) -> None:
        """Raise InterruptedRunError when the Ray of this machine, or the head of the cluster, has
        died: workers would be waited for in vain. Looks for a Ray of this machine once a second;
        a head may be silent for a while, as it may be started again."""
        if self._head is not None:
            self._check_head(self._head)
        now = time.monotonic()
        if self.is_local and (at_once or now >= self._check_at):
            self._check_at = now + _CHECK_ALIVE_EVERY_S
            if not ray_lives():
                raise InterruptedRunError(
                    "the Ray that this run started has died",
                    "everything finished so far is kept; submit again to resume. Memory may have "
                    "been short; Ray's own logs are in /tmp/ray",
                )

    def _check_head(self, address: str) -> None:
        """Return when the head answers. Meanwhile nothing is asked of Ray, which would wait for it
        and then end this process without a word for a person."""
        silent_since: float | None = None
        while not head_answers(address):
            now = time.monotonic()
            if silent_since is None:
                silent_since = now
                self._view.say(f"the head of the cluster at {address} does not answer")
            elif now - silent_since > _HEAD_SILENT_S:
                self._head = None
                self.is_lost = True
                forget_ray()
                raise InterruptedRunError(
                    f"the head of the cluster at {address} is dead: it has not answered for "
                    f"{_HEAD_SILENT_S:g} s",
                    "everything finished so far is kept; submit again to resume",
                )
            time.sleep(1.0)

    def num_neighbours(self) -> int:
        """How many workers may share one machine."""
        assert self._capacity is not None and self._shape is not None
        most = max((n.num_cpus // self._shape.num_cpus for n in self._capacity.nodes), default=1)
        return max(1, min(self._resources.most_workers, most))

    def _end_spares(self) -> None:
        from batchrun.cluster.fleet import end_actor

        for actor in self.spares or ():
            end_actor(actor)

    def _wait_for_nodes(self, capacity: Capacity, shape: WorkerShape, num_workers: int) -> None:
        """Bear a cluster that cannot hold the workers yet, as long as it is growing."""
        if self.is_local:
            capacity.require(shape, num_workers)
        self._view.say(f"waiting for a node: a worker needs {shape}; the cluster has {capacity}")
        waited_since = time.monotonic()
        while not capacity.fits(shape, num_workers):
            time.sleep(1.0)
            capacity = read_capacity()
            waited = time.monotonic() - waited_since
            if waited > _GIVE_UP_PENDING_AFTER_S and not nodes_are_coming():
                capacity.require(shape, num_workers)


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
        self._metrics = RunMetrics(job.name, checked.run)
        self._ray_metrics: RayMetrics | None = None
        self._fleet: Fleet | None = None
        self._cluster: Cluster | None = None
        self._outcome: Outcome | None = None
        self._ready_at: float | None = None  # when the first worker had loaded
        self._chronicle = Chronicle(lock.epoch, __version__, socket.gethostname())
        self._recorded_at = float("-inf")
        self._restarts = 0
        self._counted_discarded = 0
        self._counted = Counts()  # rows that the counters of the metrics hold already
        self._shown_at = self._saved_at = float("-inf")

    def run(self, cluster: Cluster, deterministic: bool, source: TraceSource | None) -> Summary:
        """Work until the coordinator ends the run."""
        self._cluster = cluster
        opened = self._opened
        self._story.begin(opened.total_rows, opened.parts, __version__, socket.gethostname())
        if not self._stop.is_set():
            self._say_begin()
        commands = self._state.handle(RunStarted())
        if not self._state.finished:
            self._serve_metrics()
            self._fleet = self._make_fleet(cluster, deterministic, source)
            if not cluster.is_local:  # a Ray of our own has no dashboard
                from batchrun.cluster.raymetrics import RayMetrics

                self._ray_metrics = RayMetrics(self._metrics)
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
        self._metrics.close()

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

    def _serve_metrics(self) -> None:
        wanted = self._checked.job.metrics
        if wanted.port is not None:
            port = self._metrics.serve(wanted.host, wanted.port)
            self._view.say(f"metrics: http://{wanted.host}:{port}/metrics")

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
                    self._metrics.forget_worker(worker)
                case StartLease(worker, lease):
                    self._the_fleet.give(worker, lease)
                case CancelLease(worker, attempt):
                    self._tally.give_up(attempt)
                    self._the_fleet.cancel(worker, attempt)
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
            case WorkerLoaded(worker, loaded, waited_s):
                self._ready_at = self._ready_at or time.monotonic()
                self._spent(worker, "load", loaded.load_s - loaded.compile_s)
                self._spent(worker, "compile", loaded.compile_s)
                self._spent(worker, "provision", max(0.0, waited_s - loaded.load_s))
                self._chronicle.begin(worker, loaded.host, loaded.device)
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
        self._metrics.merge(worker, report.metrics)
        self._spent(worker, "starved", news.starved_s)
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
            self._lock.check()
            apply_staged(self._checked.store, self._checked.run, part.shard, retry.number)

    def _count_loss(self, worker: str, cause: str) -> None:
        self._restarts += 1
        self._metrics.add(RESTARTS, cause=cause)
        self._chronicle.lose(worker, cause)
        self._metrics.forget_worker(worker)
        self._tally.lose(worker)

    def _spent(self, worker: str, state: str, seconds: float) -> None:
        recorder = Recorder()
        recorder.add(WORKER_SECONDS, max(0.0, seconds), state=state)
        self._metrics.merge(worker, recorder.take())

    def _show(self, now: float) -> None:
        """Progress for the person, the endpoint, and now and then the output."""
        workers = self._the_fleet.states()
        progress = self._tally.progress(now, self._started, workers)
        if self._the_fleet.oldest_start_s > _SAY_PENDING_AFTER_S and workers["starting"]:
            progress = replace(progress, note="waiting for the first worker to load its model")
        self._count(progress)
        self._view(progress)
        self._story.show(progress)
        if now - self._saved_at >= _SAVE_EVERY_S:
            self._saved_at = now
            self._observe(now, progress)
            self._save(progress)
            if now - self._recorded_at >= _RECORD_EVERY_S:
                self._recorded_at = now
                self._record(self._chronicle.take())
            if self._ray_metrics is not None:
                self._ray_metrics.update()

    def _count(self, progress: Progress) -> None:
        """Bring the endpoint's series up to date. Rows that a lost worker had finished and that
        are generated again count once: the counters wait until the rows are there again."""
        generated, counted = progress.generated, self._counted
        failed = max(generated.failed_rows, counted.failed_rows)
        done = max(generated.rows - generated.failed_rows, counted.rows - counted.failed_rows)
        self._metrics.add(ROWS, failed - counted.failed_rows, status="failed")
        new = done - (counted.rows - counted.failed_rows)
        self._metrics.add(ROWS, new, status="done")
        if new or failed > counted.failed_rows:
            self._metrics.set(LAST_PROGRESS, time.time())
        self._counted = Counts(rows=done + failed, failed_rows=failed)
        # Tokens that were taken for lost may turn up in the journal.
        discarded = max(self._tally.discarded_tokens, self._counted_discarded)
        self._metrics.add(TOKENS_DISCARDED, discarded - self._counted_discarded)
        self._counted_discarded = discarded
        self._metrics.set(ROWS_LEFT, progress.left_rows)
        if progress.eta_s is not None:
            self._metrics.set(ETA, progress.eta_s)
        for state, count in progress.workers.items():
            self._metrics.set(WORKERS, count, state=state)
        requests = Recorder()
        traffic().record(requests)
        self._metrics.merge("driver", requests.take())

    def _save(self, progress: Progress) -> None:
        with contextlib.suppress(StorageError):  # what may be lost must not end a run
            self._opened.directory.write_progress(
                bookkeeping.Progress(
                    epoch=self._lock.epoch,
                    total_rows=progress.total_rows,
                    counts=progress.done,
                    workers=progress.workers.get("ready", 0),
                    rows_per_s=progress.rows_per_s,
                    tokens_per_s=progress.tokens_per_s,
                    eta_s=progress.eta_s,
                )
            )

    def _observe(self, now: float, progress: Progress) -> None:
        """Note the moment in the history."""
        workers = {
            name: (
                int(sum(numbers[TOKENS.name].get((kind,), 0) for kind in _GENERATED)),
                int(sum(numbers[SLOTS_USED.name].values())),
                {labels[0]: spent for labels, spent in numbers[WORKER_SECONDS.name].items()},
            )
            for name, numbers in self._metrics.by_worker(TOKENS, SLOTS_USED, WORKER_SECONDS)
        }
        moment = Moment(
            at=now - self._started,
            rows=progress.generated.rows,
            failed_rows=progress.generated.failed_rows,
            sampled_tokens=self._tally.sampled_tokens,
            discarded_tokens=self._tally.discarded_tokens,
            in_flight=sum(in_flight for _, in_flight, _ in workers.values()),
            workers=progress.workers.get("ready", 0),
        )
        self._chronicle.observe(moment, workers)

    def _record(self, history: History) -> None:
        with contextlib.suppress(StorageError):  # the report may lack it; the run does not
            write_history(self._checked.store, self._checked.run, history)

    def _drain(self, message: str) -> None:
        """Stop in good order: what is complete is published, the rest is journaled, in time."""
        self._view.say(f"stopping ({message}): what was generated is made safe first")
        if self._fleet is not None:
            for news in self._fleet.finish(_DRAIN_S):
                self._metrics.merge(news.worker, news.report.metrics)
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
        outcome, state = self._outcome, self._state
        self.close()
        if outcome.kind in (OutcomeKind.SUCCESS, OutcomeKind.TOO_MANY_FAILURES):
            self._lock.check()
            self._finish(success=outcome.kind is OutcomeKind.SUCCESS)
        now = time.monotonic()
        progress = self._tally.progress(now, self._started, {})
        self._save(progress)
        parts = {**self._opened.parts, **state.done}
        counts = sum((part.counts for part in parts.values()), Counts())
        retried = None
        if self._retry is not None:
            retried = Retried.of(self._retry, state.done, self._opened.num_unfinished)
            outcome = replace(outcome, counts=counts, failed_rows=counts.failed_rows)
        self._observe(now, progress)
        generated = progress.generated
        summary = Summary(
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
            generated_tokens=generated.reasoning_tokens + generated.completion_tokens,
            journaled_rows=self._tally.journaled_rows,
            sampled_tokens=self._tally.sampled_tokens,
            prefix_tokens=self._tally.prefix_tokens,
            discarded_tokens=self._tally.discarded_tokens,
            restarts=self._restarts,
            elapsed_s=now - self._started,
            startup_s=(self._ready_at or now) - self._started,
            retried=retried,
        )
        if self._fleet is not None:  # else nothing was to do, and nothing is to tell
            self._record(
                self._chronicle.take(outcome.kind.value, outcome.message, summary.exit_code)
            )
        return summary

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

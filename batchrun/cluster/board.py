"""Where a run shows how far it is: its metrics' endpoint, Ray's metrics, its output."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

from batchrun import __version__
from batchrun.cluster.chronicle import Chronicle
from batchrun.data.history import Moment, write_history
from batchrun.data.resume import OpenedRun
from batchrun.data.run import Progress as SavedProgress
from batchrun.data.traffic import traffic
from batchrun.errors import StorageError
from batchrun.job import Job
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
from batchrun.records import Counts

if TYPE_CHECKING:
    from batchrun.cluster.fleet import WorkerLoaded, WorkerReported
    from batchrun.cluster.raymetrics import RayMetrics
    from batchrun.cluster.tally import Progress, Tally

_SAVE_EVERY_S = 3.0
_RECORD_EVERY_S = 10.0
_GENERATED = ("reasoning", "completion")  # the kinds of tokens that a worker makes


class Board:
    """What is to be seen of a run from outside: its metrics, and its progress and history in the
    output, for ``status`` and ``report``. Nothing that it writes is needed to resume."""

    def __init__(
        self, job: Job, opened: OpenedRun, tally: Tally, *, epoch: int, started: float
    ) -> None:
        """``started`` is when the clock of the run began."""
        self._job = job
        self._directory = opened.directory
        self._tally = tally
        self._epoch = epoch
        self._started = started
        self._metrics = RunMetrics(job.name, opened.directory.run)
        self._ray_metrics: RayMetrics | None = None
        self._chronicle = Chronicle(epoch, __version__, socket.gethostname())
        self._counted = Counts()  # rows that the counters of the metrics hold already
        self._counted_discarded = 0
        self._saved_at = self._recorded_at = float("-inf")

    def serve(self) -> str | None:
        """Start the endpoint that the job asks for; its URL, None where it asks for none."""
        wanted = self._job.metrics
        if wanted.port is None:
            return None
        port = self._metrics.serve(wanted.host, wanted.port)
        return f"http://{wanted.host}:{port}/metrics"

    def mirror(self) -> None:
        """Show the metrics on Ray's as well."""
        from batchrun.cluster.raymetrics import RayMetrics

        self._ray_metrics = RayMetrics(self._metrics)

    def close(self) -> None:
        """End the endpoint. May be called twice."""
        self._metrics.close()

    def loaded(self, news: WorkerLoaded) -> None:
        """A worker has its model."""
        loaded = news.loaded
        self._spent(news.worker, "load", loaded.load_s - loaded.compile_s)
        self._spent(news.worker, "compile", loaded.compile_s)
        self._spent(news.worker, "provision", news.waited_s - loaded.load_s)
        self._chronicle.begin(news.worker, loaded.host, loaded.device)

    def reported(self, news: WorkerReported) -> None:
        """A worker has worked."""
        self._metrics.merge(news.worker, news.report.metrics)
        self._spent(news.worker, "starved", news.starved_s)

    def stopped(self, worker: str) -> None:
        """A worker is not needed any more."""
        self._metrics.forget_worker(worker)

    def lost(self, worker: str, cause: str) -> None:
        """A worker is gone, and another may take its place."""
        self._metrics.add(RESTARTS, cause=cause)
        self._chronicle.lose(worker, cause)
        self._metrics.forget_worker(worker)

    def show(self, now: float, progress: Progress) -> None:
        """How far the run is at ``now``: for the endpoint, and now and then in the output."""
        self._count(progress)
        if now - self._saved_at < _SAVE_EVERY_S:
            return
        self._saved_at = now
        self.save(now, progress)
        if now - self._recorded_at >= _RECORD_EVERY_S:
            self._recorded_at = now
            self.record()
        if self._ray_metrics is not None:
            self._ray_metrics.update()

    def save(self, now: float, progress: Progress) -> None:
        """Note the moment in the history, and write the progress."""
        self._observe(now, progress)
        saved = SavedProgress(
            epoch=self._epoch,
            total_rows=progress.total_rows,
            counts=progress.done,
            workers=progress.workers.get("ready", 0),
            rows_per_s=progress.rows_per_s,
            tokens_per_s=progress.tokens_per_s,
            eta_s=progress.eta_s,
        )
        with contextlib.suppress(StorageError):  # what may be lost must not end a run
            self._directory.write_progress(saved)

    def record(self, outcome: str = "", message: str = "", exit_code: int | None = None) -> None:
        """Write the history up to now, with how the run ended once it has."""
        history = self._chronicle.take(outcome, message, exit_code)
        with contextlib.suppress(StorageError):  # the report may lack it; the run does not
            write_history(self._directory.store, self._directory.run, history)

    def _spent(self, worker: str, state: str, seconds: float) -> None:
        recorder = Recorder()
        recorder.add(WORKER_SECONDS, max(0.0, seconds), state=state)
        self._metrics.merge(worker, recorder.take())

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

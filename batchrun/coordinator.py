"""All decisions of a run in one pure state machine: facts in, commands out.

::

    LeasesWanted, LeaseDone, LeaseFailed          StartWorker, StopWorker
    WorkerReady, WorkerDraining, WorkerLost  -->  StartLease, FailShard
    RunStarted, StopRequested, Tick               FinishRun

No ray, no I/O, no clock: time stands in :class:`Tick`. A shard is always in exactly one place:
pending, leased, done or failed. Facts may come late, twice or from workers that were given up;
a published part counts whoever brings the news, because publishing is create-only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
from batchrun.records import Counts, Lease, Part, Shard, Strike
from batchrun.rows import Rows

__all__ = [
    "CancelLease",
    "Command",
    "DrainRun",
    "Event",
    "FailShard",
    "FinishRun",
    "LeaseDone",
    "LeaseFailed",
    "LeaseReturned",
    "LeasesWanted",
    "Limits",
    "LossCause",
    "Outcome",
    "OutcomeKind",
    "RunStarted",
    "RunState",
    "StartLease",
    "StartWorker",
    "StopRequested",
    "StopWorker",
    "Tick",
    "TokensSpent",
    "WorkerDraining",
    "WorkerLost",
    "WorkerReady",
]

# After so many loads failed in a row with no worker at work, more tries are no help.
MAX_LOAD_FAILURES = 3
# Beside workers at work, a failing load is tried again after this long.
_LOAD_RETRY_S = 60.0


# -- state -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Worker:
    """What is known of a living worker."""

    ready: bool = False
    draining: bool = False
    wanted: int = 0
    leases: dict[str, int] = field(default_factory=dict)  # attempt -> shard number


class RunState:
    """The run. ``done`` are parts published before; ``epoch`` is the run lock's.

    ``max_failed_rows`` is a count, or a fraction of all rows when it is below 1; ``max_retries``
    is how often a shard may outlive the worker that ran it alone.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        done: Mapping[int, Part],
        *,
        epoch: int,
        max_workers: int,
        min_workers: int | None = None,
        max_failed_rows: float = 0,
        max_retries: int = 2,
        strikes: Iterable[Strike] = (),
        canary_rows: int = 0,
        num_samples: int = 1,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        speculate_after_s: float = 30.0,
    ) -> None:
        self.shards = {shard.number: shard for shard in shards}
        self.done: dict[int, Part] = {
            number: part for number, part in done.items() if number in self.shards
        }
        self.failed: dict[int, str] = {}
        self.pending: deque[int] = deque(
            number for number in self.shards if number not in self.done
        )
        self.workers: dict[str, _Worker] = {}
        self.finished = False
        self._epoch = epoch
        self._num_workers = max_workers
        self._max_failed_rows = max_failed_rows
        self._max_retries = max_retries
        self._now = 0.0
        self._num_started = 0
        self._num_attempts = 0
        self._attempts: dict[str, int] = {}  # attempts of living leases -> shard number
        self._suspects: dict[int, int] = {}  # shard -> workers that died with it alone
        self._load_failures = 0
        self._no_start_before = 0.0

    def strike(self, event: WorkerLost) -> Strike | None:
        """What is to be written down before ``event`` is handed in: None when the death is
        nobody's fault, or of a worker that is gone already."""
        raise NotImplementedError

    @property
    def num_ready(self) -> int:
        """Workers that have loaded their model and are not ending."""
        return sum(worker.ready and not worker.draining for worker in self.workers.values())

    def handle(self, event: Event) -> list[Command]:
        """Take in a fact; the commands to carry out, in order. After the end there are none."""
        if self.finished:
            return []
        commands: list[Command] = []
        match event:
            case RunStarted():
                pass
            case Tick(now):
                self._now = max(self._now, now)
            case WorkerReady(name):
                self._on_ready(name)
            case WorkerDraining(name):
                if name in self.workers:
                    self.workers[name].draining = True
            case WorkerLost():
                commands += self._on_lost(event)
            case LeasesWanted(name, count):
                if name in self.workers:
                    self.workers[name].wanted = max(0, count)
            case LeaseDone(_, attempt, part) if part is not None:
                self._on_done(attempt, part)
            case LeaseFailed(_, attempt, message):
                commands += self._on_failed(attempt, message)
            case StopRequested(message):
                return self._finish(OutcomeKind.INTERRUPTED, message)
        if len(self.done) + len(self.failed) == len(self.shards):
            return commands + self._finish_complete()
        if self._load_failures >= MAX_LOAD_FAILURES and not self.num_ready:
            message = event.message if isinstance(event, WorkerLost) else ""
            return commands + self._finish(OutcomeKind.NO_WORKERS, message)
        return commands + self._start_workers() + self._start_leases()

    def _on_ready(self, name: str) -> None:
        worker = self.workers.get(name)
        if worker is not None:
            worker.ready = True
            self._load_failures = 0

    def _on_lost(self, event: WorkerLost) -> list[Command]:
        worker = self.workers.pop(event.worker, None)
        if worker is None:
            return []
        if not worker.ready and event.node_lived:
            self._load_failures += 1
            if self._load_failures >= MAX_LOAD_FAILURES:
                self._no_start_before = self._now + _LOAD_RETRY_S
        commands: list[Command] = []
        back: list[int] = []
        alone = len(worker.leases) == 1
        for attempt, number in worker.leases.items():
            del self._attempts[attempt]
            if number in self.done:
                continue  # by late news of an earlier attempt
            if event.node_lived:
                self._suspects[number] = self._suspects.get(number, 0) + alone
            if self._suspects.get(number, 0) > self._max_retries:
                times = self._suspects[number]
                message = f"worker_lost: {times} workers died with it ({event.message})"
                commands += self._fail(number, message)
            else:
                back.append(number)
        self.pending.extendleft(reversed(back))
        return commands

    def _on_done(self, attempt: str, part: Part) -> None:
        """Count the part, whoever brings the news: of a late worker too."""
        number = part.shard
        self._release(attempt)
        if number not in self.shards or number in self.done:
            return
        self.done[number] = part
        self.failed.pop(number, None)
        if number in self.pending:
            self.pending.remove(number)

    def _on_failed(self, attempt: str, message: str) -> list[Command]:
        number = self._attempts.get(attempt)
        self._release(attempt)
        if number is None or number in self.done:
            return []  # of a lease that was given to another worker meanwhile
        return self._fail(number, message)

    def _fail(self, number: int, message: str) -> list[Command]:
        self.failed[number] = message
        return [FailShard(self.shards[number], message)]

    def _release(self, attempt: str) -> None:
        if self._attempts.pop(attempt, None) is not None:
            for worker in self.workers.values():
                worker.leases.pop(attempt, None)

    def _start_workers(self) -> list[Command]:
        """Workers up to the number asked for, but never more than shards that are left."""
        if self._now < self._no_start_before:
            return []
        left = len(self.shards) - len(self.done) - len(self.failed)
        living = sum(not worker.draining for worker in self.workers.values())
        commands: list[Command] = []
        for _ in range(min(self._num_workers, left) - living):
            self._num_started += 1
            name = f"{self._epoch}-{self._num_started}"
            self.workers[name] = _Worker()
            commands.append(StartWorker(name))
        return commands

    def _start_leases(self) -> list[Command]:
        """One lease for every idle worker first, then more for those that have room.

        While some workers are still to come or idle, one shard each is kept for them: a worker
        that is early does not take everything.
        """
        commands: list[Command] = []
        open_workers = {
            name: worker
            for name, worker in self.workers.items()
            if worker.ready and not worker.draining
        }
        for name, worker in open_workers.items():
            if self.pending and not worker.leases:
                commands.append(self._start_lease(name, worker))
        kept = sum(not worker.leases and not worker.draining for worker in self.workers.values())
        for name, worker in open_workers.items():
            while worker.wanted > 0 and len(self.pending) > kept and not self._isolated(worker):
                number = self._next_unsuspected()
                if number is None:
                    break
                commands.append(self._start_lease(name, worker, number))
        return commands

    def _start_lease(self, name: str, worker: _Worker, number: int | None = None) -> StartLease:
        """Lease a pending shard, the first in line when ``number`` is None."""
        if number is None:
            number = self.pending.popleft()
        else:
            self.pending.remove(number)
        self._num_attempts += 1
        attempt = f"{self._epoch:06d}-{self._num_attempts:06d}"
        self._attempts[attempt] = number
        worker.leases[attempt] = number
        worker.wanted = max(0, worker.wanted - 1)
        return StartLease(
            name,
            Lease(
                self.shards[number], self._epoch, attempt, Rows.all(self.shards[number].num_rows)
            ),
        )

    def _isolated(self, worker: _Worker) -> bool:
        """Whether the worker runs a shard that must be alone, because a worker died with it."""
        return any(number in self._suspects for number in worker.leases.values())

    def _next_unsuspected(self) -> int | None:
        return next((number for number in self.pending if number not in self._suspects), None)

    def _finish_complete(self) -> list[Command]:
        counts = self._counts()
        failed_rows = counts.failed_rows + self._rows(self.failed)
        total = self._rows(self.shards)
        allowed = self._max_failed_rows
        if 0 < allowed < 1:
            allowed *= total
        if self.failed:
            kind = OutcomeKind.TOO_MANY_FAILURES
            message = f"{len(self.failed)} of {len(self.shards)} shards could not be run"
        elif failed_rows > allowed:
            kind = OutcomeKind.TOO_MANY_FAILURES
            message = f"{failed_rows} of {total} rows failed"
        else:
            kind = OutcomeKind.SUCCESS
            message = f"{total} rows done" + (f", {failed_rows} failed" if failed_rows else "")
        return self._finish(kind, message)

    def _finish(self, kind: OutcomeKind, message: str) -> list[Command]:
        self.finished = True
        counts = self._counts()
        outcome = Outcome(
            kind=kind,
            message=message,
            counts=counts,
            failed_rows=counts.failed_rows + self._rows(self.failed),
            failed_shards=dict(self.failed),
        )
        return [*(StopWorker(name) for name in self.workers), FinishRun(outcome)]

    def _counts(self) -> Counts:
        return sum((part.counts for part in self.done.values()), Counts())

    def _rows(self, numbers: Iterable[int]) -> int:
        return sum(self.shards[number].num_rows for number in numbers)

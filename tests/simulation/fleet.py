"""A fleet on a virtual clock that drives the real coordinator: how long, how much for nothing.

A worker takes rows in at a steady rate, its own within a spread, and a row is finished one
latency later, so that a lease ends that long after its last row went in. Workers write their
journal every interval; what a lost one did since then is done again. Some deaths are machines
that go away, some are processes that die with rows in flight, some rows are deadly.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from batchrun.coordinator import (
    CancelLease,
    Event,
    FailShard,
    FinishRun,
    LeaseDone,
    LeasesWanted,
    LossCause,
    Outcome,
    RunStarted,
    RunState,
    StartLease,
    StartWorker,
    StopWorker,
    Tick,
    TokensSpent,
    WorkerLost,
    WorkerReady,
)
from batchrun.records import Counts, Lease, Part, Shard
from batchrun.rows import Rows


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What is simulated. Times in seconds; ``rows_per_s`` is of one worker."""

    num_shards: int
    num_workers: int
    rows_per_shard: int = 1000
    rows_per_s: float = 10.0
    max_sequences: int = 64
    losses_per_hour: float = 0.05
    crash_share: float = 0.2
    """Of the losses, those in which the process dies and the machine stays."""
    num_poison: int = 3
    load_s: float = 180.0
    speed_spread: float = 0.1
    journal_s: float = 30.0
    report_s: float = 10.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FleetResult:
    """What came of it. Rows are counted once a sample of work, ``wasted_rows`` what was done more
    than once; ``handled_s`` is real time inside the coordinator."""

    outcome: Outcome
    makespan_s: float
    ideal_s: float
    total_rows: int
    wasted_rows: float
    num_events: int
    handled_s: float
    num_losses: int
    num_leases: int
    num_isolated: int
    lost_rows: frozenset[tuple[int, int]]
    poison: frozenset[tuple[int, int]]
    published: frozenset[int]

    @property
    def events_per_s(self) -> float:
        """Events that the coordinator takes in a second of real time."""
        return self.num_events / max(self.handled_s, 1e-9)

    @property
    def overhead(self) -> float:
        """How much longer than the ideal, as a fraction."""
        return self.makespan_s / self.ideal_s - 1

    @property
    def waste(self) -> float:
        """Rows done for nothing, as a fraction of all."""
        return self.wasted_rows / max(1, self.total_rows)


@dataclass(slots=True)
class _Work:
    """A lease in a worker: ``rows`` without those that the journal had, taken in from ``began``."""

    lease: Lease
    rows: Rows
    began: float = -1.0
    ends: float = -1.0  # of taking in; the lease itself ends one latency later


@dataclass(slots=True)
class _Worker:
    rate: float
    ready: bool = False
    work: dict[str, _Work] = field(default_factory=dict)
    free_at: float = 0.0
    journaled_at: float = 0.0
    wants: bool = False


class Fleet:
    """The workers, the journal and the clock."""

    def __init__(self, plan: FleetPlan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._shards = [
            Shard(number, f"{number}.parquet", "", 1, "f", (0,), 0, plan.rows_per_shard)
            for number in range(plan.num_shards)
        ]
        self._poison = frozenset(
            (self._random.randrange(plan.num_shards), self._random.randrange(plan.rows_per_shard))
            for _ in range(plan.num_poison)
        )
        self._state = RunState(
            self._shards,
            {},
            epoch=1,
            max_workers=plan.num_workers,
            max_failed_rows=plan.num_poison,
            speculate_after_s=plan.journal_s,
        )
        self._now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._num_queued = 0
        self._workers: dict[str, _Worker] = {}
        self._journal: dict[int, Rows] = {}  # of shards that are not published
        self._published: set[int] = set()
        self._lost_rows: set[tuple[int, int]] = set()
        self._outcome: Outcome | None = None
        self._done_rows = 0.0  # all that was done, once and more
        self._num_events = self._num_losses = self._num_leases = self._num_isolated = 0
        self._handled_s = 0.0
        self._latency = plan.max_sequences / plan.rows_per_s

    def run(self) -> FleetResult:
        """From the first event to the last."""
        plan = self._plan
        self._handle(RunStarted())
        self._every(1.0, self._tick)
        while self._outcome is None:
            self._now, _, act = heapq.heappop(self._queue)
            act()
        total = plan.num_shards * plan.rows_per_shard
        fleet_rate = plan.num_workers * plan.rows_per_s
        return FleetResult(
            outcome=self._outcome,
            makespan_s=self._now,
            ideal_s=plan.load_s + total / fleet_rate + self._latency,
            total_rows=total,
            wasted_rows=self._done_rows - total + len(self._lost_rows),
            num_events=self._num_events,
            handled_s=self._handled_s,
            num_losses=self._num_losses,
            num_leases=self._num_leases,
            num_isolated=self._num_isolated,
            lost_rows=frozenset(self._lost_rows),
            poison=self._poison,
            published=frozenset(self._published),
        )

    # -- the clock -------------------------------------------------------------------------

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._num_queued += 1
        heapq.heappush(self._queue, (when, self._num_queued, act))

    def _every(self, seconds: float, act: Callable[[], None]) -> None:
        def again() -> None:
            act()
            self._at(self._now + seconds, again)

        self._at(self._now + seconds, again)

    def _tick(self) -> None:
        self._handle(Tick(self._now))

    # -- the coordinator -------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        began = time.perf_counter()
        commands = self._state.handle(event)
        self._handled_s += time.perf_counter() - began
        self._num_events += 1
        for command in commands:
            match command:
                case StartWorker(name):
                    self._start(name)
                case StartLease(name, lease):
                    self._give(name, lease)
                case CancelLease(name, attempt):
                    self._cancel(name, attempt)
                case StopWorker():
                    pass
                case FailShard(shard, message):
                    raise AssertionError(f"shard {shard.number} failed: {message}")
                case FinishRun(outcome):
                    self._outcome = outcome

    # -- workers ---------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        plan, spread = self._plan, self._plan.speed_spread
        rate = plan.rows_per_s * self._random.uniform(1 - spread, 1 + spread)
        self._workers[name] = _Worker(rate)
        lifetime_s = self._random.expovariate(plan.losses_per_hour / 3600)
        self._at(self._now + plan.load_s, lambda: self._load(name))
        self._at(self._now + lifetime_s, lambda: self._end(name))

    def _load(self, name: str) -> None:
        worker = self._workers.get(name)
        if worker is None:
            return
        worker.ready = True
        worker.free_at = worker.journaled_at = self._now
        self._handle(WorkerReady(name, self._plan.max_sequences, device=name))
        first = self._random.uniform(0, self._plan.report_s)
        self._at(self._now + first, lambda: self._report(name))

    def _report(self, name: str) -> None:
        worker = self._workers.get(name)
        if worker is None:
            return
        self._handle(TokensSpent(name, int(self._now * 100)))
        self._handle(LeasesWanted(name, int(worker.wants)))
        self._at(self._now + self._plan.report_s, lambda: self._report(name))

    def _give(self, name: str, lease: Lease) -> None:
        worker = self._workers[name]
        known = self._journal.get(lease.shard.number, Rows())
        rows = lease.rows - known - Rows.of(lease.lost)
        work = worker.work[lease.attempt] = _Work(lease, rows)
        self._num_leases += 1
        self._num_isolated += lease.alone
        idle = worker.free_at <= self._now
        work.began = max(worker.free_at, self._now) + (0.1 if idle else 0.0)
        work.ends = worker.free_at = work.began + len(rows) / worker.rate
        worker.wants = False
        # It asks for more when what is left to take in would soon leave slots empty.
        ask_at = max(self._now, work.ends - 1.25 * self._latency)
        self._at(ask_at, lambda: self._ask(name, lease.attempt))
        deadly = [row for number, row in self._poison if number == lease.shard.number]
        for row in deadly:
            if row in rows:
                into = sum(1 for ordinal in rows if ordinal < row)
                dies_at = work.began + into / worker.rate + 0.5
                self._at(dies_at, lambda: self._die(name, lease.attempt))
        ends_at = work.ends + (self._latency if rows else 1.0)
        self._at(ends_at, lambda: self._finish(name, lease.attempt))

    def _ask(self, name: str, attempt: str) -> None:
        worker = self._workers.get(name)
        if worker is not None and attempt in worker.work and next(reversed(worker.work)) == attempt:
            worker.wants = True
            self._handle(LeasesWanted(name, 1))

    def _finish(self, name: str, attempt: str) -> None:
        worker = self._workers.get(name)
        work = None if worker is None else worker.work.pop(attempt, None)
        if worker is None or work is None:
            return
        lease, number = work.lease, work.lease.shard.number
        self._done_rows += len(work.rows)
        if lease.whole:
            self._publish(lease)
            counts = Counts(rows=lease.shard.num_rows, failed_rows=len(lease.lost))
            part = Part(number, "part", attempt, 1, "", lease.shard.num_rows, counts)
            self._handle(LeaseDone(name, attempt, part))
        else:
            self._journal[number] = self._journal.get(number, Rows()) | lease.rows
            self._handle(LeaseDone(name, attempt, None, Counts(rows=len(lease.rows))))
        if name in self._workers:
            self._handle(LeasesWanted(name, int(not worker.work or worker.wants)))

    def _publish(self, lease: Lease) -> None:
        number = lease.shard.number
        assert number not in self._published
        self._published.add(number)
        self._journal.pop(number, None)
        self._lost_rows |= {(number, ordinal) for ordinal in lease.lost}

    def _cancel(self, name: str, attempt: str) -> None:
        worker = self._workers[name]
        work = worker.work.pop(attempt)
        self._done_rows += self._progress(worker, work, self._now)
        if not worker.work:
            worker.free_at = self._now

    def _progress(self, worker: _Worker, work: _Work, when: float) -> float:
        """Rows of a lease that were done, in parts or whole, by then."""
        return min(float(len(work.rows)), max(0.0, (when - work.began) * worker.rate))

    # -- deaths ----------------------------------------------------------------------------

    def _end(self, name: str) -> None:
        """A machine goes away, or a process dies for no reason."""
        if name in self._workers:
            self._lose(name, lived=self._random.random() < self._plan.crash_share)

    def _die(self, name: str, attempt: str) -> None:
        """A process dies of one of its rows."""
        worker = self._workers.get(name)
        if worker is not None and attempt in worker.work:
            self._lose(name, lived=True)

    def _lose(self, name: str, *, lived: bool) -> None:
        worker = self._workers.pop(name)
        self._num_losses += 1
        interval = self._plan.journal_s
        since_ready = max(0.0, self._now - worker.journaled_at)
        flushed_at = worker.journaled_at + since_ready // interval * interval
        flying: list[tuple[int, int]] = []
        for work in worker.work.values():
            self._done_rows += self._progress(worker, work, self._now)
            number = work.lease.shard.number
            safe, _ = work.rows.split(int(self._progress(worker, work, flushed_at)))
            poison = Rows.of(row for of, row in self._poison if of == number)
            safe -= poison
            self._journal[number] = self._journal.get(number, Rows()) | safe
            flying += [(number, row) for row in self._slots(worker, work)]
        cause = LossCause.CRASH if lived else LossCause.NODE
        known = tuple(flying) if worker.ready else None
        self._handle(WorkerLost(name, cause, "gone", lived, known))

    def _slots(self, worker: _Worker, work: _Work) -> Iterable[int]:
        """Rows that have a slot: taken in less than one latency ago."""
        taken = int(self._progress(worker, work, self._now)) + 1
        gone = int(self._progress(worker, work, self._now - self._latency))
        if work.began > self._now:
            return ()
        return work.rows.split(gone)[1].split(taken - gone)[0]

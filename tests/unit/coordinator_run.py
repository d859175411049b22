"""A run under test, and short ways to say what happens to it."""

from __future__ import annotations

from typing import Any

from batchrun.coordinator import (
    CancelLease,
    Command,
    Event,
    FinishRun,
    LeaseDone,
    LeaseReturned,
    LossCause,
    Outcome,
    OutcomeKind,
    RunStarted,
    RunState,
    SetAside,
    StartLease,
    StartWorker,
    WorkerLost,
    WorkerReady,
)
from batchrun.records import Counts, Lease, Part, Shard
from batchrun.rows import Rows


def shard(number: int, rows: int = 10) -> Shard:
    """A shard of a few rows."""
    return Shard(number, f"{number}.parquet", f"/in/{number}.parquet", 1, "f", (0,), 0, rows)


def part(of: Shard, attempt: str = "", failed_rows: int = 0, empty: int = 0) -> Part:
    """The published part of a shard."""
    counts = Counts(rows=of.num_rows, failed_rows=failed_rows, empty=empty)
    return Part(of.number, f"part-{of.number}", attempt, 1, "", of.num_rows, counts)


class Run:
    """What was commanded so far. Workers are called 3-1, 3-2 and so on."""

    def __init__(
        self,
        sizes: int | list[int],
        num_workers: int = 1,
        *,
        done: int = 0,
        now: float = 0,
        **options: Any,
    ) -> None:
        """``sizes`` are the rows of each shard, or so many shards of 10 rows; it starts ``now``."""
        sizes = [10] * sizes if isinstance(sizes, int) else sizes
        self.shards = [shard(number, rows) for number, rows in enumerate(sizes)]
        self.state = RunState(
            self.shards,
            {number: part(self.shards[number]) for number in range(done)},
            epoch=3,
            max_workers=num_workers,
            **options,
        )
        self.leases: dict[str, list[Lease]] = {}
        self.outcome: Outcome | None = None
        self.aside: list[str] = []  # devices
        self.last: list[Command] = []
        self.handle(RunStarted(now))

    def handle(self, *events: Event) -> list[Command]:
        """The commands that these facts lead to."""
        self.last = [command for event in events for command in self.state.handle(event)]
        for command in self.last:
            match command:
                case StartWorker(name):
                    assert name not in self.leases
                    self.leases[name] = []
                case StartLease(name, lease):
                    self.leases[name].append(lease)
                case CancelLease(name, attempt):
                    held = self.leases[name]
                    held[:] = [lease for lease in held if lease.attempt != attempt]
                case SetAside(device, _):
                    self.aside.append(device)
                case FinishRun(outcome):
                    self.outcome = outcome
        return self.last

    @property
    def workers(self) -> list[str]:
        """All workers ever started."""
        return list(self.leases)

    def ready(self, *names: str, max_sequences: int = 16, device: str = "") -> None:
        """These workers, or all, have loaded."""
        for name in names or self.workers:
            self.handle(WorkerReady(name, max_sequences, device))

    def done(self, worker: str, failed_rows: int = 0, empty: int = 0) -> Lease:
        """The worker publishes its oldest lease, or has its rows in the journal."""
        lease = self.leases[worker].pop(0)
        if lease.whole:
            made = part(lease.shard, lease.attempt, failed_rows + len(lease.lost), empty)
            self.handle(LeaseDone(worker, lease.attempt, made))
        else:
            counts = Counts(rows=len(lease.rows), failed_rows=failed_rows, empty=empty)
            self.handle(LeaseDone(worker, lease.attempt, counts=counts))
        return lease

    def give_back(self, worker: str) -> None:
        """The worker gives its oldest lease back."""
        self.handle(LeaseReturned(worker, self.leases[worker].pop(0).attempt))

    def lost(
        self,
        worker: str,
        *in_flight: tuple[int, int],
        cause: LossCause = LossCause.CRASH,
        node: bool = True,
        known: bool = True,
    ) -> None:
        """The worker is gone, with these rows in flight (``known``: it is known which)."""
        self.leases[worker] = []
        self.handle(WorkerLost(worker, cause, "boom", node, in_flight if known else None))

    def held(self, worker: str) -> list[int]:
        """Numbers of the shards that the worker was given and has not finished."""
        return [lease.shard.number for lease in self.leases[worker]]

    def rows(self, worker: str) -> list[tuple[int, list[int]]]:
        """The same with their rows."""
        return [(lease.shard.number, list(lease.rows)) for lease in self.leases[worker]]

    def sizes(self, worker: str) -> list[int]:
        """How many rows each lease of the worker has."""
        return [len(lease.rows) for lease in self.leases[worker]]


def ended(run: Run) -> tuple[OutcomeKind, int]:
    """How the run ended, and how many rows count as failed."""
    assert run.outcome is not None
    return run.outcome.kind, run.outcome.failed_rows


def ranges(*pairs: tuple[int, int]) -> Rows:
    """Rows by half-open ranges."""
    return Rows.of_ranges(pairs)

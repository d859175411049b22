"""What the coordinator is told and what it answers: facts about the past, and commands.

::

    RunStarted, Tick, TokensSpent, StopRequested          StartWorker, StopWorker
    WorkerReady, WorkerDraining, WorkerLost          -->  StartLease, CancelLease
    LeasesWanted, LeaseDone, LeaseReturned, LeaseFailed   FailShard, DrainRun, FinishRun

Facts may come late, twice, or from workers that were given up. All values are small and plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from batchrun.records import Counts, Lease, Part, Shard


class LossCause(StrEnum):
    """Why a worker is gone; the label ``cause`` of ``batchrun_worker_restarts_total``."""

    CRASH = "crash"
    HANG = "hang"
    NODE = "node"
    LOAD = "load"


class OutcomeKind(StrEnum):
    """How a run ended. ``CANARY_FAILED`` is exit 3, ``LIMIT_REACHED`` exit 75."""

    SUCCESS = "success"
    TOO_MANY_FAILURES = "too_many_failures"
    CANARY_FAILED = "canary_failed"
    INTERRUPTED = "interrupted"
    LIMIT_REACHED = "limit_reached"
    NO_WORKERS = "no_workers"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run. ``failed_rows`` counts all rows of ``failed_shards`` too.

    ``counts`` are those of published parts: rows that are in the journal only are not in them.
    """

    kind: OutcomeKind
    message: str
    counts: Counts
    failed_rows: int
    failed_shards: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a submission may use; None is no limit.

    ``price_per_worker_hour`` is what ``max_cost`` is counted in: that of a GPU times the GPUs of
    a worker.
    """

    max_hours: float | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    price_per_worker_hour: float = 0.0


# -- events: past facts ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The driver is ready to carry out commands; ``now`` as of :class:`Tick`."""

    now: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded its model and can run ``max_sequences`` at once.

    ``device`` names what it runs on, for example ``host/GPU-uuid``, the same after a restart
    there; empty when it is not known. ``paid_s`` is for how long the device has been held for it
    (process start, load), which counts towards ``Limits.max_cost``.
    """

    worker: str
    max_sequences: int = 16
    device: str = ""
    paid_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker will end soon (its node is taken away): it gets no more leases.

    What it holds it ends or gives back (:class:`LeaseDone`, :class:`LeaseReturned`).
    """

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone.

    ``node_lived`` is whether its machine outlived it: then the rows that had a slot are under
    suspicion, unless it was draining. ``in_flight`` names them, as (shard number, ordinal); empty
    when it is known that there were none; None when nothing is known, and then all rows of its
    leases are suspects. A driver asks :meth:`~batchrun.coordinator.RunState.strike` for what it
    has to write down *before* it hands this in.
    """

    worker: str
    cause: LossCause
    message: str = ""
    node_lived: bool = True
    in_flight: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class LeasesWanted:
    """A worker has room for rows of so many leases more than it holds."""

    worker: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class LeaseDone:
    """All rows of a lease are safe: published when there is a ``part``, else in the journal.

    A whole lease always brings its part, whoever published it. ``counts`` are those of all rows
    of a lease that is not whole, of those too that the journal had before; a part has its own.
    """

    worker: str
    attempt: str
    part: Part | None = None
    counts: Counts = field(default_factory=Counts)


@dataclass(frozen=True, slots=True)
class LeaseReturned:
    """A worker gives a lease back unfinished, after its journal was written: it drains."""

    worker: str
    attempt: str


@dataclass(frozen=True, slots=True)
class LeaseFailed:
    """The shard's input cannot be read; no other try would help."""

    worker: str
    attempt: str
    message: str


@dataclass(frozen=True, slots=True)
class TokensSpent:
    """Tokens of prompts and sampled tokens that a worker has computed since it began, all told."""

    worker: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; ``now`` in seconds on any clock that never goes back."""

    now: float


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The run has been stopped: whoever asked, the workers have been drained meanwhile.

    The answer ends with :class:`FinishRun`. Somebody who asks a driver to stop does not lead here
    at once: the driver first lets its workers write their journals.
    """

    message: str = "interrupted"


Event = (
    RunStarted
    | WorkerReady
    | WorkerDraining
    | WorkerLost
    | LeasesWanted
    | LeaseDone
    | LeaseReturned
    | LeaseFailed
    | TokensSpent
    | Tick
    | StopRequested
)


# -- commands: imperatives ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker under this name, which was never used before."""

    worker: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End the worker; what it holds is not waited for."""

    worker: str


@dataclass(frozen=True, slots=True)
class StartLease:
    """Give the worker rows of a shard."""

    worker: str
    lease: Lease


@dataclass(frozen=True, slots=True)
class CancelLease:
    """Let the worker give up a lease whose rows are safe by another's work, or whose shard has
    failed. News of it are not needed, and late ones do no harm."""

    worker: str
    attempt: str


@dataclass(frozen=True, slots=True)
class SetAside:
    """A device ends whatever runs on it; workers that start there get nothing to do. No more than
    news: whoever it is for is told."""

    device: str
    message: str


@dataclass(frozen=True, slots=True)
class FailShard:
    """Record that the shard cannot be run."""

    shard: Shard
    message: str


@dataclass(frozen=True, slots=True)
class DrainRun:
    """Stop in good order, as on SIGTERM: let all workers write their journals and publish what is
    complete, hand their news in, then :class:`StopRequested`."""

    message: str


@dataclass(frozen=True, slots=True)
class FinishRun:
    """The run is over; always the last command."""

    outcome: Outcome


Command = (
    StartWorker
    | StopWorker
    | StartLease
    | CancelLease
    | SetAside
    | FailShard
    | DrainRun
    | FinishRun
)

"""What a worker says of its work: small plain values, for the driver."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchrun.metrics import MetricsDelta
from batchrun.records import Counts, ErrorKind, Lease, Part

DRAIN_S = 20.0
"""The most that a worker which drains may take to give everything back."""


@dataclass(frozen=True, slots=True)
class FailedLease:
    """A lease that ends without a part of this run: its shard cannot be read, or something else
    stands where the part belongs. Plain text, for the driver."""

    lease: Lease
    message: str


@dataclass(frozen=True, slots=True)
class RunningLease:
    """What is finished of a lease that goes on.

    ``known`` came from the journal and is of earlier epochs; ``handed_over`` came from there too,
    but was generated under the epoch of this lease, by whoever has or had the rows beside it. The
    rest was generated under this lease: ``saved`` is in the journal by now, ``unsaved`` would be
    lost with the worker.
    """

    attempt: str
    shard: int
    known: Counts
    saved: Counts
    unsaved: Counts
    handed_over: Counts = field(default_factory=Counts)

    @property
    def journaled(self) -> Counts:
        """What was in the journal when the lease began."""
        return self.known + self.handed_over

    @property
    def fresh(self) -> Counts:
        """What was generated under this lease."""
        return self.saved + self.unsaved

    @property
    def counts(self) -> Counts:
        """Everything that is finished."""
        return self.journaled + self.fresh


@dataclass(frozen=True, slots=True)
class FinishedLease:
    """A lease that ended: with its part in place when it is whole, else with its rows in the
    journal. ``counts`` are those of all its rows, ``fresh`` of those generated under it,
    ``handed_over`` of those that others generated under its epoch."""

    lease: Lease
    part: Part | None
    counts: Counts
    fresh: Counts
    handed_over: Counts = field(default_factory=Counts)


@dataclass(frozen=True, slots=True)
class ReturnedLease:
    """A lease of a shard that was given back unfinished; ``fresh`` was generated and is in the
    journal."""

    attempt: str
    shard: int
    fresh: Counts


@dataclass(frozen=True, slots=True)
class RowFailures:
    """Rows that became error rows of one kind: how many, and the shard and id of the first."""

    kind: ErrorKind
    num_rows: int
    shard: int
    row_id: str


@dataclass(frozen=True, slots=True)
class WorkReport:
    """What one call of :meth:`~batchrun.pipeline.Pipeline.work` brought.

    ``num_wanted`` is how many further leases would keep the engine full; ``idle`` says that
    nothing is left to do. Of the pipeline so far are ``sampled_tokens``, of unfinished rows too,
    ``prompt_tokens``, those that were computed, ``prefix_tokens``, those of prompts that did not
    have to be, and ``discarded_tokens``, sampled for nothing. ``unsaved_tokens`` would be lost
    with the worker now. A ``draining`` pipeline takes no further leases. ``failures`` are rows
    that failed since the last report, one entry a kind.
    """

    done: tuple[FinishedLease, ...] = ()
    failed: tuple[FailedLease, ...] = ()
    returned: tuple[ReturnedLease, ...] = ()
    running: tuple[RunningLease, ...] = ()
    num_wanted: int = 0
    idle: bool = True
    sampled_tokens: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    discarded_tokens: int = 0
    unsaved_tokens: int = 0
    draining: bool = False
    failures: tuple[RowFailures, ...] = ()
    metrics: MetricsDelta = field(default_factory=MetricsDelta)

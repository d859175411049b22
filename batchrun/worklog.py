"""What a worker does with its leases, as lines of its log: small, and never a word of a row."""

from __future__ import annotations

import logging

from batchrun.leases import OpenLease
from batchrun.logs import log_event
from batchrun.records import Completion, Counts, ErrorKind, Lease, Part
from batchrun.reports import RowFailures


def log_opened(item: OpenLease) -> None:
    """The journal of a lease's shard was read."""
    journal = item.journal
    running = [sampled for sampled in journal.running.values() if sampled is not None]
    log_event(
        "lease_opened",
        "begins" if not (journal.finished or running) else "goes on with what the journal has",
        place=_place(item.lease),
        samples_journaled=len(journal.finished),
        samples_begun=len(running),
        tokens_begun=sum(len(sampled.token_ids) for sampled in running),
    )


def log_flushed(lease: Lease, saved: Counts, seconds: float) -> None:
    """A write to the journal ended."""
    log_event(
        "journal_written",
        f"took {seconds:.3f} s",
        place=_place(lease),
        rows=saved.rows,
        tokens=saved.output_tokens,
    )


def log_flush_failed(lease: Lease) -> None:
    """Storage did not take a write to the journal; it is tried again."""
    log_event(
        "journal_not_written",
        "storage failed; tried again with the next write",
        level=logging.WARNING,
        error_class="journal_not_written",
        place=_place(lease),
    )


def log_ended(lease: Lease, part: Part | None) -> None:
    """All rows of a lease are safe."""
    message = "all rows are in the journal" if part is None else f"{part.name} stands"
    by: dict[str, str | int] = {} if part is None else {"published_by": part.attempt}
    log_event("lease_ended", message, place=_place(lease) | by)


def log_gone(lease: Lease, event: str, message: str) -> None:
    """A lease ended without all its rows."""
    log_event(event, message, place=_place(lease))


def log_retried(lease: Lease, row_id: str, ordinal: int) -> None:
    """A sample that the engine failed on is run again."""
    log_event(
        "row_retried",
        "the engine failed on a sample; it runs again",
        level=logging.WARNING,
        error_class="row_retried",
        place=_place(lease) | {"row": row_id, "ordinal": ordinal},
    )


class FailureLog:
    """Rows that became error rows: logged, and gathered by kind for the driver."""

    def __init__(self) -> None:
        self._failures: dict[ErrorKind, RowFailures] = {}

    def add(self, lease: Lease, completion: Completion) -> None:
        """A row is finished, and this sample of it has an error."""
        kind = ErrorKind((completion.error or "").partition(":")[0])
        earlier = self._failures.get(kind)
        if earlier is None:
            self._failures[kind] = RowFailures(kind, 1, lease.shard.number, completion.id[:200])
        else:
            self._failures[kind] = RowFailures(
                kind, earlier.num_rows + 1, earlier.shard, earlier.row_id
            )
        log_event(
            "row_failed",
            f"{kind.value}; the column `error` of the output says more",
            level=logging.WARNING,
            error_class=f"row_failed {kind.value}",
            place=_place(lease) | {"row": completion.id, "ordinal": completion.ordinal},
            kind=kind.value,
        )

    def take(self) -> tuple[RowFailures, ...]:
        """Those since the last time, one a kind."""
        taken, self._failures = tuple(self._failures.values()), {}
        return taken


def _place(lease: Lease) -> dict[str, str | int]:
    return {
        "shard": lease.shard.name,
        "epoch": lease.epoch,
        "attempt": lease.attempt,
        "row": str(lease.rows),
    }

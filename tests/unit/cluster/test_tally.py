"""Counting a run: every row once, wherever it lies and whoever is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchrun.cluster.tally import Tally
from batchrun.records import Counts, Lease, Part, Shard
from batchrun.reports import FinishedLease, ReturnedLease, RunningLease, WorkReport
from batchrun.rows import Rows
from batchrun.scores import Scores

NONE = Counts()


def part(shard: int, rows: int, tokens: int = 0) -> Part:
    """A published part with so many rows and completion tokens."""
    counts = Counts(rows=rows, completion_tokens=tokens)
    return Part(shard, f"part-{shard}", f"a{shard}", 1, "", rows, counts)


def running(
    attempt: str, shard: int, known: Counts = NONE, saved: Counts = NONE, unsaved: Counts = NONE
) -> WorkReport:
    """A worker's report of one lease."""
    return WorkReport(running=(RunningLease(attempt, shard, known, saved, unsaved),))


def lease(attempt: str, shard: int, rows: int) -> Lease:
    """A lease of the first rows of a shard."""
    return Lease(Shard(shard, "a", "a", 1, "", (0,), 0, 10), 1, attempt, Rows.all(rows))


def published(attempt: str, part: Part, fresh: Counts | None = None) -> FinishedLease:
    """A lease that ended in a part, all of it new unless it is said what was."""
    whole = lease(attempt, part.shard, part.num_rows)
    return FinishedLease(whole, part, part.counts, part.counts if fresh is None else fresh)


def test_running_rows_move_to_their_part() -> None:
    """Rows of a running attempt count until its part does, and never twice."""
    tally = Tally(10, 2, {})
    tally.report("w", running("a0", 0, unsaved=Counts(rows=3)))
    assert tally.done().rows == 3
    tally.end(published("a0", part(0, 5)))
    assert tally.done().rows == 5
    tally.end(published("late", part(0, 5)))
    assert (tally.done().rows, tally.generated().rows) == (5, 5)


def test_rows_of_ranges_wait_in_the_journal_for_their_part() -> None:
    """Ranges add up while they are journaled; whoever assembles them generates nothing."""
    tally = Tally(10, 1, {})
    for attempt, rows in (("a0", 4), ("a1", 6)):
        counts = Counts(rows=rows, completion_tokens=rows)
        tally.end(FinishedLease(lease(attempt, 0, rows), None, counts, counts))
    assert (tally.done().rows, tally.journaled_rows) == (10, 10)
    state = RunningLease("a2", 0, NONE, NONE, NONE, handed_over=Counts(rows=3))
    tally.report("w", WorkReport(running=(state,)))
    assert (tally.done().rows, tally.journaled_rows) == (10, 10)
    found = published("a2", part(0, 10), fresh=NONE)
    tally.end(replace(found, handed_over=Counts(rows=10)))
    assert (tally.done().rows, tally.generated().rows, tally.journaled_rows) == (10, 10, 0)


def test_what_an_earlier_submit_journaled_is_done_and_not_generated() -> None:
    """It is known as soon as a lease has read it."""
    tally = Tally(10, 1, {})
    tally.report("w", running("a0", 0, known=Counts(rows=4), unsaved=Counts(rows=1)))
    assert (tally.done().rows, tally.generated().rows, tally.journaled_rows) == (5, 1, 4)


def test_lost_worker_takes_what_was_not_safe_with_it() -> None:
    """What it had journaled is done and generated still; the rest is lost, with its tokens."""
    tally = Tally(10, 2, {})
    state = RunningLease("a0", 0, NONE, Counts(rows=2), Counts(rows=3, reasoning_tokens=7))
    tally.report("w1", WorkReport(running=(state,), unsaved_tokens=9, discarded_tokens=1))
    tally.report("w2", running("a1", 1, unsaved=Counts(rows=1)))
    assert tally.done().rows == 6
    tally.lose("w1")
    assert (tally.done().rows, tally.generated().rows, tally.discarded_tokens) == (3, 3, 10)
    tally.lose("w1")
    assert tally.discarded_tokens == 10


def test_what_a_lost_worker_saved_without_telling_is_counted() -> None:
    """Of seven rows that a killed worker generated it had told of two as safe and of two as not;
    it saved six. The others are found in the journal by who goes on: they are no loss, and neither
    they nor their tokens are missing from what this submit generated."""

    def rows(count: int) -> Counts:
        return Counts(rows=count, completion_tokens=10 * count)

    tally = Tally(10, 1, {})
    state = RunningLease("a0", 0, NONE, rows(2), rows(2))
    tally.report("w1", WorkReport(running=(state,), sampled_tokens=40, unsaved_tokens=20))
    tally.lose("w1")
    assert (tally.generated().rows, tally.discarded_tokens, tally.sampled_tokens) == (2, 20, 40)
    tally.report("w2", WorkReport(sampled_tokens=40))
    found = published("a1", part(0, 10, 100), fresh=rows(4))
    tally.end(replace(found, handed_over=rows(6)))
    assert tally.generated() == tally.done() == rows(10)
    assert (tally.discarded_tokens, tally.sampled_tokens) == (0, 100)


@pytest.mark.parametrize("is_dropped_first", [True, False])
def test_what_a_second_try_takes_over_counts_once(is_dropped_first: bool) -> None:
    """The first try at a lease lives and has told of what it saved: its rows and tokens are no
    news when the second one, which began with them, is the first to end."""

    def rows(count: int) -> Counts:
        return Counts(rows=count, completion_tokens=10 * count)

    tally = Tally(10, 1, {})
    state = RunningLease("a0", 0, NONE, rows(6), rows(1))
    tally.report("w1", WorkReport(running=(state,), sampled_tokens=70))
    state = RunningLease("a1", 0, NONE, NONE, rows(3), handed_over=rows(6))
    tally.report("w2", WorkReport(running=(state,), sampled_tokens=30))
    assert (tally.generated(), tally.done().rows, tally.journaled_rows) == (rows(10), 10, 6)
    state = RunningLease("a0", 0, NONE, rows(6), rows(3))
    tally.report("w1", WorkReport(running=(state,), sampled_tokens=90))
    assert tally.done().rows == 10, "two have a row, but there are no more"
    state = RunningLease("a0", 0, NONE, rows(6), rows(1))
    tally.report("w1", WorkReport(running=(state,), sampled_tokens=70))
    if is_dropped_first:
        tally.give_up("a0")
    tally.report("w2", WorkReport(sampled_tokens=40))
    found = published("a1", part(0, 10, 100), fresh=rows(4))
    tally.end(replace(found, handed_over=rows(6)))
    tally.give_up("a0")
    assert tally.generated() == rows(10)
    assert (tally.discarded_tokens, tally.sampled_tokens) == (0, 110)


def test_leases_that_are_given_back_lose_nothing() -> None:
    """Their rows are in the journal."""
    tally = Tally(10, 2, {})
    tally.report("w", running("a0", 0, saved=Counts(rows=2), unsaved=Counts(rows=3)))
    tally.give_back(ReturnedLease("a0", 0, Counts(rows=5)))
    tally.lose("w")
    assert (tally.done().rows, tally.generated().rows, tally.journaled_rows) == (5, 5, 5)


def test_a_lease_that_was_given_back_before_it_was_reported_counts_once() -> None:
    """A worker that drains right after it began: who goes on takes over what is counted already."""
    tally = Tally(10, 1, {})
    fresh = Counts(rows=6, completion_tokens=60)
    tally.report("w1", WorkReport(sampled_tokens=60))
    tally.give_back(ReturnedLease("a0", 0, fresh))
    assert tally.done().rows == 6
    tally.report("w2", WorkReport(sampled_tokens=40))
    found = published("a1", part(0, 10, 100), fresh=Counts(rows=4, completion_tokens=40))
    tally.end(replace(found, handed_over=fresh))
    assert (tally.sampled_tokens, tally.generated().rows) == (100, 10)


def test_generated_is_without_what_was_there() -> None:
    """Parts of earlier submits are done, and not generated."""
    tally = Tally(10, 2, {0: part(0, 4)})
    tally.end(published("a1", part(1, 6)))
    assert (tally.done().rows, tally.generated().rows) == (10, 6)


def test_failed_shards_count_as_failed_rows() -> None:
    """All rows of a shard that failed are failed, until somebody publishes it after all."""
    tally = Tally(10, 2, {})
    tally.report("w", running("a1", 1, unsaved=Counts(rows=2)))
    tally.give_up("a1")
    tally.fail(1, 6)
    assert (tally.done().rows, tally.done().failed_rows) == (6, 6)
    tally.end(published("a1", part(1, 6)))
    assert (tally.done().rows, tally.done().failed_rows) == (6, 0)


def test_rates_and_eta() -> None:
    """Rates are over the last half minute; the ETA is what is left at that rate."""
    tally = Tally(100, 1, {})
    tally.progress(0.0, 0.0, {})
    state = RunningLease("a", 0, NONE, NONE, Counts(rows=20))
    tally.report("w", WorkReport(running=(state,), sampled_tokens=500))
    progress = tally.progress(10.0, 0.0, {"ready": 1})
    assert (progress.rows_per_s, progress.tokens_per_s, progress.eta_s) == (2.0, 50.0, 40.0)
    assert progress.left_rows == 80


def test_accuracy_of_what_is_done() -> None:
    """Scores of published and running rows add up."""
    before = Part(0, "p", "a0", 1, "", 2, Counts(2, scores=Scores((1, 1), 1)))
    tally = Tally(10, 2, {0: before})
    tally.report("w", running("a1", 1, unsaved=Counts(rows=3, scores=Scores((0, 3), 3))))
    assert tally.done().scores == Scores((1, 4), 4)
    assert tally.generated().rows == 3
    tally.lose("w")
    assert tally.done().scores == Scores((1, 1), 1)


def test_a_lease_that_was_given_up_does_not_come_back_with_a_late_report() -> None:
    """Its worker learns of it at its next call; what the call before says is not counted."""
    tally = Tally(10, 2, {})
    tally.report("w", running("a0", 0, unsaved=Counts(rows=3)))
    tally.give_up("a0")
    tally.report("w", running("a0", 0, unsaved=Counts(rows=4)))
    assert (tally.done().rows, tally.generated().rows) == (0, 0)

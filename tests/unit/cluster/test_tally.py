"""Counting a run: shards once, attempts as long as they live."""

from __future__ import annotations

from batchrun.cluster.tally import Tally
from batchrun.records import Counts, Part
from batchrun.scores import Scores


def part(shard: int, rows: int, tokens: int = 0) -> Part:
    """A published part with so many rows and completion tokens."""
    counts = Counts(rows=rows, completion_tokens=tokens)
    return Part(shard, f"part-{shard}", f"a{shard}", 1, "", rows, counts)


def test_running_rows_move_to_their_part() -> None:
    """Rows of a running attempt count until its part does, and never twice."""
    tally = Tally(10, 2, {})
    tally.run("w", "a0", Counts(rows=3))
    assert tally.done().rows == 3
    tally.publish("a0", part(0, 5))
    assert tally.done().rows == 5
    tally.publish("late", part(0, 5))
    assert tally.done().rows == 5


def test_lost_worker_takes_its_rows_with_it() -> None:
    """What a lost worker had not published is no longer done; its tokens are discarded ones."""
    tally = Tally(10, 2, {})
    tally.run("w1", "a0", Counts(rows=3, reasoning_tokens=7, completion_tokens=2))
    tally.run("w2", "a1", Counts(rows=1))
    tally.lose("w1")
    assert (tally.done().rows, tally.discarded_tokens) == (1, 9)


def test_generated_is_without_what_was_there() -> None:
    """Parts of earlier submits are done, and not generated."""
    tally = Tally(10, 2, {0: part(0, 4)})
    tally.publish("a1", part(1, 6))
    assert (tally.done().rows, tally.generated().rows) == (10, 6)


def test_failed_shards_count_as_failed_rows() -> None:
    """All rows of a shard that failed are failed, until somebody publishes it after all."""
    tally = Tally(10, 2, {})
    tally.fail(1, 6)
    assert (tally.done().rows, tally.done().failed_rows) == (6, 6)
    tally.publish("a1", part(1, 6))
    assert (tally.done().rows, tally.done().failed_rows) == (6, 0)


def test_rates_and_eta() -> None:
    """Rates are over the last half minute; the ETA is what is left at that rate."""
    tally = Tally(100, 1, {})
    tally.progress(0.0, 0.0, {})
    tally.run("w", "a", Counts(rows=20))
    tally.sampled_tokens["w"] = 500
    progress = tally.progress(10.0, 0.0, {"ready": 1})
    assert (progress.rows_per_s, progress.tokens_per_s, progress.eta_s) == (2.0, 50.0, 40.0)
    assert progress.left_rows == 80


def test_accuracy_of_what_is_done() -> None:
    """Scores of published and running rows add up."""
    published = Part(0, "p", "a0", 1, "", 2, Counts(2, scores=Scores((1, 1), 1)))
    tally = Tally(10, 2, {0: published})
    tally.run("w", "a1", Counts(rows=3, scores=Scores((0, 3), 3)))
    assert tally.done().scores == Scores((1, 4), 4)
    assert tally.generated().rows == 3
    tally.lose("w")
    assert tally.done().scores == Scores((1, 1), 1)

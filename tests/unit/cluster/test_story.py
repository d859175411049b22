"""The story of a run: what facts and decisions are as lines of its log."""

from __future__ import annotations

import pytest

from batchrun.cluster import story as module
from batchrun.cluster.story import Story
from batchrun.events import (
    CancelLease,
    FailShard,
    LeaseDone,
    LeaseReturned,
    LossCause,
    StartLease,
    WorkerLost,
)
from batchrun.records import Counts, ErrorKind, Lease, Part, Shard, Strike
from batchrun.reports import RowFailures, RunningLease, WorkReport
from batchrun.rows import Rows

SHARDS = {
    number: Shard(number, f"{number}.parquet", f"in/{number}.parquet", 1, "f", (0,), 0, 100)
    for number in range(3)
}
PART = Part(0, "part-0.parquet", "000001-000002", 1, "s", 100, Counts(rows=100, failed_rows=2))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Every line, as a value."""
    lines: list[dict[str, object]] = []

    def log_event(
        event: str,
        message: str,
        *,
        level: int = 20,
        error_class: str = "",
        place: dict[str, object] | None = None,
        **fields: object,
    ) -> None:
        lines.append({"event": event, "level": level, **(place or {}), **fields})

    monkeypatch.setattr(module, "log_event", log_event)
    return lines


def lease(number: int, attempt: str, **more: object) -> Lease:
    """All rows of a shard, if not otherwise said."""
    return Lease(SHARDS[number], 1, attempt, **{"rows": Rows.all(100), **more})  # type: ignore[arg-type]


def of_shard(lines: list[dict[str, object]], number: int) -> list[object]:
    """The events that a look for a shard's name finds."""
    return [line["event"] for line in lines if line.get("shard") == SHARDS[number].name]


def test_a_lost_worker_stands_in_the_story_of_its_shards(told: list[dict[str, object]]) -> None:
    """Each lease that it held is lost by name, with the rows that were saved; its suspects are
    named by ordinals; late news of it is no second end."""
    story = Story(SHARDS)
    story.order(StartLease("w1", lease(0, "a1")))
    story.order(StartLease("w2", lease(1, "a2")))
    running = RunningLease("a1", 0, Counts(rows=5), Counts(rows=7), Counts(rows=1))
    story.report("w1", WorkReport(running=(running,)))
    story.strike(Strike("w1", {0: Rows.of([3, 4, 9])}, cause="crash"))
    story.tell(WorkerLost("w1", LossCause.CRASH, "died", in_flight=((0, 3), (0, 4), (0, 9))))
    story.tell(LeaseReturned("w1", "a1"))
    story.order(StartLease("w2", lease(0, "a3", rows=Rows.of([3]), whole=False, alone=True)))
    expected = ["lease_given", "lease_resumed", "lease_flushed", "rows_suspect", "lease_lost"]
    assert [*expected, "lease_isolated"] == of_shard(told, 0)
    assert ["lease_given"] == of_shard(told, 1)
    by_event = {line["event"]: line for line in told}
    assert (5, "0-99") == (by_event["lease_resumed"]["rows"], by_event["lease_resumed"]["row"])
    assert "3-4,9" == by_event["rows_suspect"]["row"]
    assert 3 == by_event["worker_lost"]["rows_in_engine"]
    assert ("w2", "3") == (by_event["lease_isolated"]["worker"], by_event["lease_isolated"]["row"])


def test_the_end_of_a_shard_says_whose_part_stands(told: list[dict[str, object]]) -> None:
    """The one who published need not be the one who brings the news."""
    story = Story(SHARDS)
    story.order(StartLease("w1", lease(0, "000001-000001")))
    story.order(StartLease("w2", lease(0, "000001-000002")))
    story.tell(LeaseDone("w1", "000001-000001", PART))
    story.order(CancelLease("w2", "000001-000002"))
    story.order(CancelLease("w2", "000001-000002"))
    story.order(StartLease("w1", lease(1, "000001-000003", whole=False)))
    story.tell(LeaseDone("w1", "000001-000003", None, Counts(rows=100)))
    story.order(FailShard(SHARDS[2], "cannot be read"))
    given = ["lease_given", "lease_given"]
    assert [*given, "shard_published", "lease_cancelled"] == of_shard(told, 0)
    assert ["lease_given", "lease_journaled"] == of_shard(told, 1)
    assert ["shard_failed"] == of_shard(told, 2)
    assert ("000001-000002", 2) == (told[2]["published_by"], told[2]["failed_rows"])


def test_failed_rows_are_named(told: list[dict[str, object]]) -> None:
    """One row a kind by its id, with how many there were."""
    Story(SHARDS).report(
        "w1", WorkReport(failures=(RowFailures(ErrorKind.TOO_LONG, 4, 1, "row-17"),))
    )
    (line,) = told
    assert ("row_failed", "row-17", "too_long", 4) == tuple(
        line[key] for key in ("event", "row", "kind", "rows")
    )
    assert SHARDS[1].name == line["shard"]

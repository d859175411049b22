"""What a lease in work knows to be safe is what the journal has, and nothing else."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, cast

import pytest

from batchrun.data.journal import Journal, Running
from batchrun.data.reader import ShardReader
from batchrun.data.writer import PartWriter
from batchrun.engine.engine import RunningSample
from batchrun.errors import OutputError, StorageError
from batchrun.leases import OpenLease
from batchrun.records import Completion, Counts, FinishReason, Generated, Lease, Shard
from batchrun.rows import Rows

SHARD = Shard(0, "in.parquet", "/in.parquet", 1, "f", (0,), 0, 2)
DONE = Completion(0, 0, "in.parquet:0", "yes", None, FinishReason.STOP, 3, 0, 1)


@dataclass
class Sample:
    """A sample in the engine, with the tokens 0, 1, 2 ..."""

    num_sampled: int
    num_replayed: int = 0
    key: tuple[str, int] = ("000001-000001", 1)
    sample: int = 0

    def after(self, start: int) -> Generated:
        """What was sampled from ``start`` on."""
        return Generated(tuple(range(start, self.num_sampled)))


class Slow(Executor):
    """Runs nothing, and ends it when it is told."""

    def submit(self, _: Any, *args: Any, **__: Any) -> Future[Any]:
        """Keep what was to be done."""
        self.args = args
        self.future: Future[Any] = Future()
        return self.future


class Nowhere:
    """A journal that keeps what it got."""

    def flush(self, finished: list[Completion], running: list[Running]) -> None:
        """Nothing."""


def test_what_began_anew_during_a_flush_is_not_safe_by_it() -> None:
    """The journal has tokens that the engine failed on; the sample's new ones are unsaved, and the
    next flush brings them from the first on."""
    opening: Future[Journal] = Future()
    reader = cast(ShardReader, None)
    item = OpenLease(Lease(SHARD, 1, "000001-000001", Rows.all(2)), reader, opening, iter(()), 0.0)
    slow = Slow()

    def flush(num_sampled: int) -> None:
        item.start_flush(Nowhere(), [cast(RunningSample, Sample(num_sampled))], slow, 0.0)

    flush(8)
    item.forget(1, 0)
    slow.future.set_result(None)
    item.end_flush()
    assert item.num_saved(cast(RunningSample, Sample(3))) == 0
    flush(3)
    assert slow.args == ([], [Running(1, 0, 0, Generated((0, 1, 2)))])


def test_what_the_journal_refused_is_not_safe() -> None:
    """Whatever is wrong with it: the next flush brings the same again, and until one has come
    through the lease is not at its end."""
    opening: Future[Journal] = Future()
    reader = cast(ShardReader, None)
    lease = Lease(SHARD, 1, "000001-000001", Rows.all(2), whole=False)
    item = OpenLease(lease, reader, opening, iter(()), 0.0)
    item.at_end = True
    item.add(DONE)
    item.count(Counts(rows=1))
    slow = Slow()
    for error in (OutputError("the bucket is gone"), StorageError("it does not answer")):
        item.start_flush(Nowhere(), [], slow, 0.0)
        assert slow.args == ([DONE], [])
        slow.future.set_exception(error)
        with pytest.raises(type(error)):
            item.end_flush()
        assert not item.is_safe
    item.start_flush(Nowhere(), [], slow, 0.0)
    slow.future.set_result(None)
    assert item.end_flush() == 0.0
    assert item.is_safe and item.state.saved.rows == 1


class Watched:
    """A part that is written; knows whether it was given up."""

    is_closed = False

    def close(self) -> None:
        """Give it up."""
        self.is_closed = True


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_part_is_not_given_up_under_the_thread_that_finishes_it(is_begun: bool) -> None:
    """A lease may be cancelled, or given back, while its part is being published: the other try at
    it was first, or there is no time left."""
    opening: Future[Journal] = Future()
    reader = cast(ShardReader, Watched())
    item = OpenLease(Lease(SHARD, 1, "000001-000001", Rows.all(2)), reader, opening, iter(()), 0.0)
    writer = Watched()
    item.writer = cast(PartWriter, writer)
    item.publishing = Future()
    if is_begun:
        item.publishing.set_running_or_notify_cancel()
    item.close()
    assert (writer.is_closed, item.publishing.cancelled()) == (not is_begun, not is_begun)
    if is_begun:
        item.publishing.set_exception(StorageError("it does not answer"))
    assert writer.is_closed

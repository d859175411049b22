"""The journal goes once nobody needs it, and never before."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from batchrun.data.journal import JournalWriter
from batchrun.data.layout import SUCCESS, journal_folder, run_id
from batchrun.data.store import Store
from batchrun.data.sweeper import JournalSweeper
from batchrun.data.verify import verify_run
from batchrun.errors import StorageError
from batchrun.records import Completion, FinishReason, Lease, Shard
from batchrun.rows import Rows
from tests.unit.data.test_run import Site
from tests.unit.data.test_verify import finished

RUN = "0123456789abcdef"


def journal(store: Store, shard: Shard, run: str = RUN) -> None:
    """One journaled row of the shard."""
    lease = Lease(shard, 1, "000001-000001", Rows.all(shard.num_rows))
    row = Completion(0, 0, "id", "text", None, FinishReason.STOP, 3, 0, 1)
    JournalWriter(store, run, lease).flush([row])


def shard(number: int) -> Shard:
    """A shard of two rows."""
    return Shard(number, "a", "/a", 1, "f", (0,), 0, 2)


def test_the_journals_of_published_shards_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are kept, and a deletion that failed is tried again."""
    store = Store.open(str(tmp_path))
    for number in range(3):
        journal(store, shard(number))
    delete, tries, deleted = store.delete, [], threading.Event()

    def fail_first(paths: list[str]) -> None:
        tries.append(paths)
        if len(tries) == 1:
            raise StorageError("away")
        delete(paths)
        deleted.set()

    monkeypatch.setattr(store, "delete", fail_first)
    sweeper = JournalSweeper(store, RUN, every_s=0.01)
    sweeper.published(1)
    sweeper.published(7)
    assert deleted.wait(20)
    sweeper.close()
    sweeper.close()
    assert store.folders(journal_folder(RUN)) == ("000000", "000002")


def test_a_successful_run_leaves_no_journal(tmp_path: Path) -> None:
    """Everything under journal/ goes at the end, what a worker wrote late too."""
    site = finished(tmp_path, Store.open(str(tmp_path / "out")))
    run = run_id(site.semantic)
    opened = site.open()
    for item in opened.shards:
        journal(site.store, item, run)
    assert verify_run(site.store).problems == (), "a journal beside its part harms nobody"
    opened.directory.finish(opened.shards, {}, success=True)
    assert site.store.list(journal_folder(run)) == ()
    assert site.store.info(SUCCESS) is not None


def test_a_run_that_ends_with_failures_keeps_its_journal(tmp_path: Path) -> None:
    """The next submit goes on from it."""
    site = Site(tmp_path, Store.open(str(tmp_path / "out")))
    site.input("a.parquet", 3)
    site.input("b.parquet", 4)
    opened = site.open()
    site.run(opened, [0])
    run = run_id(site.semantic)
    journal(site.store, opened.shards[1], run)
    opened.directory.finish(opened.shards, {1: "broken"}, success=False)
    assert site.store.folders(journal_folder(run)) == ("000001",)


def test_the_journal_of_a_dropped_shard_goes_with_it(tmp_path: Path) -> None:
    """Input that changed before it was finished gets a new number, and its old rows are gone."""
    site = Site(tmp_path, Store.open(str(tmp_path / "out")))
    site.input("a.parquet", 3)
    opened = site.open()
    run = run_id(site.semantic)
    journal(site.store, opened.shards[0], run)
    site.input("a.parquet", 5)
    assert [item.number for item in site.open().shards] == [1]
    assert site.store.list(journal_folder(run)) == ()

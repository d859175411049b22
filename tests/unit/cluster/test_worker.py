"""A worker that nobody could end does no harm to an output that is not its run's any more."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from batchrun.cluster.worker import Worker, WorkerSettings
from batchrun.data.lock import RunLock
from batchrun.data.reader import ShardReader
from batchrun.data.status import discard
from batchrun.data.store import Store
from batchrun.data.writer import PartFormat, PartWriter
from batchrun.errors import StorageError
from batchrun.job import parse_job
from batchrun.jobfile import JobSource
from batchrun.records import Lease
from batchrun.rows import Rows
from tests.unit.data.test_run import Site
from tests.unit.data.test_writer import completion


def test_a_worker_of_a_discarded_run_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is on its way while the run is discarded is deleted with it; one that would
    come later is not published."""
    site = Site(tmp_path, Store.open(str(tmp_path / "out")))
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        site.input(name)
    opened = site.open()
    run = opened.directory.run
    job = parse_job(
        JobSource.of_mapping(
            {
                "model": {"path": "tiny"},
                "input": {"path": str(tmp_path / "in"), "prompt_column": "prompt"},
                "output": {"path": str(tmp_path / "out")},
            }
        )
    )
    worker = Worker(WorkerSettings(job, run, opened.schema, PartFormat(run), 1, 1, False))
    with RunLock(site.store, run) as lock:
        epoch = lock.epoch

    def publish(number: int) -> None:
        shard = opened.shards[number]
        lease = Lease(shard, epoch, f"{epoch:06d}-00000{number}", Rows.all(shard.num_rows))
        with (
            ShardReader(shard, opened.schema) as reader,
            PartWriter(reader, PartFormat(run)) as writer,
        ):
            for row in reader:
                writer.add(completion(row))
            worker._publish(writer.finish(), lease)

    publish(0)
    delete, late = site.store.delete, [1]

    def delete_late(paths: Iterable[str]) -> None:
        if late:
            publish(late.pop())
        delete(paths)

    monkeypatch.setattr(site.store, "delete", delete_late)
    discard(site.store)
    with pytest.raises(StorageError, match="the run of this worker is no longer in"):
        publish(2)
    assert site.store.list() == ()

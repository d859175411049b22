"""A worker that no Ray watches over: one process that opens a run, takes a shard of it and
publishes it. Stopped and continued, it is a machine that comes back after its time.

    python -m tests.chaos.zombie < job.json     prints whose the part is that stands at the end
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.faults import install

_ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def zombie_process(raw: Mapping[str, object]) -> Iterator[subprocess.Popen[str]]:
    """The process, for a job; killed at the end if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.zombie"],
        cwd=_ROOT,
        env=dict(os.environ),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(raw))
    process.stdin.close()
    process.stdin = None
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def is_stopped(pid: int) -> bool:
    """Whether a process stands still after SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def main() -> int:
    """Be the worker; release the run's lock before the work, as a lost driver's would be."""
    install()
    from batchrun.cluster.opening import check
    from batchrun.cluster.worker import Worker, WorkerSettings
    from batchrun.data.lock import RunLock
    from batchrun.job import parse_job
    from batchrun.jobfile import JobSource
    from batchrun.records import Lease
    from batchrun.rows import Rows

    job = parse_job(JobSource.of_mapping(json.load(sys.stdin)))
    checked = check(job, None)
    with RunLock(checked.store, checked.run) as lock:
        opened, epoch = checked.open(), lock.epoch
    worker = Worker(
        WorkerSettings(job, checked.run, opened.schema, checked.part_format, 1, 1, True)
    )
    worker.load()
    shard = opened.shards[0]
    leases: tuple[Lease, ...] = (
        Lease(shard, epoch, f"{epoch:06d}-000001", Rows.all(shard.num_rows)),
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        report = worker.work(leases, (), 1.0, False)
        leases = ()
        for done in report.done:
            assert done.part is not None
            print(done.part.attempt)  # noqa: T201 - for the test
            worker.finish(5.0)
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""What is killed, stopped or hung loses nothing: the rows are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import batchrun as package
from batchrun.cluster.summary import Summary
from batchrun.data.status import read_status
from batchrun.data.store import Store

from .conftest import Command, Work, descendants, sums, worker_pids
from .faults import DEADLY

NUM_SHARDS = 6
ROWS = 3
# Long enough to be disturbed: every sample is as long as it may be.
LONG = {"max_tokens": 64, "ignore_eos": True, "temperature": 2.0}


@pytest.fixture(scope="module")
def undisturbed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A run of the long job in which nothing happened, and the input of all others."""
    work = Work(tmp_path_factory.mktemp("undisturbed"))
    for number in range(NUM_SHARDS):
        work.write(f"{number}", sums(ROWS, start=1 + ROWS * number))
    raw = work.raw(generation=LONG, resources={"max_sequences": 4})
    summary = package.run(raw, deterministic=True)
    assert (summary.exit_code, summary.restarts) == (0, 0)
    return work


def disturbed_job(undisturbed: Work, name: str, **errors: object) -> dict[str, object]:
    """The same job with an output of its own."""
    return undisturbed.raw(
        name, generation=LONG, resources={"max_sequences": 4}, errors={"hang_timeout_s": 60}
    ) | {"errors": {"hang_timeout_s": 60.0, **errors}}


@contextmanager
def meanwhile(action: Callable[[threading.Event], None]) -> Iterator[None]:
    """Do something in a thread while the ``with`` runs."""
    ended = threading.Event()
    thread = threading.Thread(target=action, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)
    assert not thread.is_alive()


def is_busy(pid: int) -> bool:
    """Whether a worker is in the middle of its work: Ray shows the method in the title."""
    return "Worker.work" in descendants(os.getpid()).get(pid, "")


def check_same(undisturbed: Work, name: str, summary: Summary) -> None:
    """The rows of a disturbed run are those of the undisturbed one, to the byte."""
    assert summary.exit_code == 0
    assert undisturbed.rows(name) == undisturbed.rows()
    assert undisturbed.parts(name) == undisturbed.parts()


def test_hung_worker_is_replaced(undisturbed: Work) -> None:
    """A worker that stands still for hang_timeout_s is killed and replaced."""
    job = disturbed_job(undisturbed, "hung", hang_timeout_s=2.0)

    def freeze(ended: threading.Event) -> None:
        while not ended.wait(0.02):
            pids = worker_pids(os.getpid()) if undisturbed.parts("hung") else set()
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            if pids:
                return

    with meanwhile(freeze):
        summary = package.run(job, deterministic=True)
    assert summary.restarts == 1
    check_same(undisturbed, "hung", summary)


def test_shard_that_kills_workers_is_failed(work: Work, cluster: str) -> None:
    """A shard whose reading ends its worker, before any row runs, is tried once more with nothing
    beside it, and is failed then, with exit code 3; the other shard is done."""
    work.write("a", sums(4))
    work.write(DEADLY, sums(4, start=50))
    summary = package.run(work.raw(errors={"max_retries": 0}))
    assert (summary.exit_code, summary.failed_rows) == (3, 4)
    # One more where rows of the other shard were in the engine and were suspected first.
    assert summary.restarts in (2, 3)
    assert [DEADLY in name for name in summary.failed_shards] == [True]
    assert "worker_lost" in next(iter(summary.failed_shards.values()))
    assert len(work.rows()) == 4


def test_sigterm_ends_with_75_and_resumes(
    undisturbed: Work, batchrun: Callable[..., Command], cluster: str
) -> None:
    """SIGTERM of the driver: exit code 75 within seconds, and the next submit does the rest. What
    was published stays as it is."""
    raw = disturbed_job(undisturbed, "stopped")
    path = undisturbed.job_file("stopped", **{k: v for k, v in raw.items() if k != "output"})
    command = batchrun("run", path, "--address", cluster, "--deterministic")
    command.wait_until(lambda: len(undisturbed.parts("stopped")) >= 1)
    command.process.send_signal(signal.SIGTERM)
    code, out, err = command.end(timeout_s=20)
    assert (code, out) == (75, "")
    assert "submit again to resume" in err and "Traceback" not in err
    status = read_status(Store.open(str(undisturbed.folder / "stopped")))
    assert (status.live, status.succeeded) == (False, False)
    assert 0 < status.counts.rows < ROWS * NUM_SHARDS
    folder = undisturbed.folder / "stopped"
    kept = {name: (folder / name).read_bytes() for name in undisturbed.parts("stopped")}
    check_same(undisturbed, "stopped", package.run(raw, deterministic=True))
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_sigterm_while_ray_starts(
    work: Work, batchrun: Callable[..., Command], cluster: str
) -> None:
    """A submit told to stop while its Ray is starting ends as any other time: exit code 75, a
    line that says so, no traceback."""
    work.write("a", sums(3))
    command = batchrun("submit", work.job_file())
    command.wait_until((work.folder / "out" / "_batchrun" / "lock.json").exists)
    time.sleep(0.5)
    command.process.send_signal(signal.SIGTERM)
    code, out, err = command.end(timeout_s=60)
    assert (code, out) == (75, "")
    assert "submit again to resume" in err and "Traceback" not in err


def test_death_of_the_own_ray(
    undisturbed: Work, batchrun: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the Ray that submit started dies under it, the run ends with exit code 75 and says so:
    it does not wait for workers that can never come, nor start a second Ray."""
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")  # instead of 5 s
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # instead of 3 s
    raw = disturbed_job(undisturbed, "rayless")
    raw["generation"] = LONG | {"n": 50}
    path = undisturbed.job_file("rayless", **{k: v for k, v in raw.items() if k != "output"})
    command = batchrun("submit", path)
    command.wait_until(lambda: bool(worker_pids(command.process.pid)))
    raylet = next(
        pid for pid, text in descendants(command.process.pid).items() if "/raylet " in text
    )
    os.kill(raylet, signal.SIGKILL)
    code, out, err = command.end(timeout_s=60)
    assert (code, out) == (75, "")
    assert "the Ray that this run started has died" in err and "submit again to resume" in err

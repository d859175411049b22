"""What is killed, stopped or hung loses nothing: the rows are those of an undisturbed run."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import batchrun as package
from batchrun.cluster.driver import run_job
from batchrun.cluster.summary import Summary
from batchrun.cluster.tally import Progress
from batchrun.data.status import read_status
from batchrun.data.store import Store
from batchrun.job import parse_job
from batchrun.jobfile import JobSource

from .conftest import Command, Work, descendants, is_alive, sums, worker_pids
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


def signal_worker(work: Work, name: str, number: int) -> Callable[..., None]:
    """An action: when a part is there, send the workers of this session a signal."""

    def action(ended: threading.Event) -> None:
        while not ended.is_set():
            pids = worker_pids(os.getpid()) if work.parts(name) else set()
            for pid in pids:
                os.kill(pid, number)
            if pids:
                return
            time.sleep(0.02)

    return action


def is_busy(pid: int) -> bool:
    """Whether a worker is in the middle of its work: Ray shows the method in the title."""
    return "Worker.work" in descendants(os.getpid()).get(pid, "")


def check_same(undisturbed: Work, name: str, summary: Summary) -> None:
    """The rows of a disturbed run are those of the undisturbed one, to the byte."""
    assert summary.exit_code == 0
    assert undisturbed.rows(name) == undisturbed.rows()
    assert undisturbed.parts(name) == undisturbed.parts()


def test_killed_worker_is_replaced(undisturbed: Work) -> None:
    """SIGKILL of the actor in the middle: a new one goes on, no row twice, none missing."""
    with meanwhile(signal_worker(undisturbed, "killed", signal.SIGKILL)):
        summary = package.run(disturbed_job(undisturbed, "killed"), deterministic=True)
    assert summary.restarts == 1
    check_same(undisturbed, "killed", summary)


def test_hung_worker_is_replaced(undisturbed: Work) -> None:
    """A worker that stands still for hang_timeout_s is killed and replaced."""
    job = disturbed_job(undisturbed, "hung", hang_timeout_s=2.0)
    with meanwhile(signal_worker(undisturbed, "hung", signal.SIGSTOP)):
        summary = package.run(job, deterministic=True)
    assert summary.restarts == 1
    check_same(undisturbed, "hung", summary)


def test_drained_worker_finishes_its_leases(undisturbed: Work) -> None:
    """SIGTERM (the node is taken away): what the worker has is published, another takes over."""
    with meanwhile(signal_worker(undisturbed, "drained", signal.SIGTERM)):
        summary = package.run(disturbed_job(undisturbed, "drained"), deterministic=True)
    assert (summary.restarts, summary.discarded_tokens) == (1, 0)
    check_same(undisturbed, "drained", summary)


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


def test_killed_driver_is_resumed(undisturbed: Work, batchrun: Callable[..., Command]) -> None:
    """SIGKILL of `batchrun submit`: its Ray goes with it, and the next submit does the rest."""
    raw = disturbed_job(undisturbed, "driver")
    path = undisturbed.job_file("driver", **{k: v for k, v in raw.items() if k != "output"})
    command = batchrun("submit", path, "--deterministic")
    command.wait_until(lambda: len(undisturbed.parts("driver")) >= 2)
    # Ray's two agents notice within a minute that their node is gone; they hold nothing.
    below = {
        pid: line for pid, line in descendants(command.process.pid).items() if "Agent" not in line
    }
    assert any("raylet" in line for line in below.values())
    assert any("ray::Worker" in line for line in below.values())
    command.process.kill()
    command.process.wait()
    kept = {
        name: (undisturbed.folder / "driver" / name).read_bytes()
        for name in undisturbed.parts("driver")
    }
    deadline = time.monotonic() + 20
    while any(map(is_alive, below)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [line.strip() for pid, line in below.items() if is_alive(pid)] == []
    assert not read_status(Store.open(str(undisturbed.folder / "driver"))).live
    summary = package.run(raw, deterministic=True)
    assert 0 < summary.generated_rows <= ROWS * (NUM_SHARDS - len(kept))
    for name, content in kept.items():
        assert (undisturbed.folder / "driver" / name).read_bytes() == content
    check_same(undisturbed, "driver", summary)


def test_sigterm_ends_with_75_and_resumes(
    undisturbed: Work, batchrun: Callable[..., Command], cluster: str
) -> None:
    """SIGTERM of the driver: exit code 75 within seconds, and the next submit does the rest."""
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
    check_same(undisturbed, "stopped", package.run(raw, deterministic=True))


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


def test_death_of_the_own_ray(undisturbed: Work, batchrun: Callable[..., Command]) -> None:
    """When the Ray that submit started dies under it, the run ends with exit code 75 and says so:
    it does not wait for workers that can never come, nor start a second Ray."""
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


class Scraper:
    """A view that reads the run's Prometheus endpoint each time it is shown progress."""

    def __init__(self) -> None:
        self.url = ""
        self.scrapes: list[str] = []

    def say(self, text: str) -> None:
        """Learn where the endpoint is."""
        if found := re.fullmatch(r"metrics: (http://\S+)", text):
            self.url = found[1]

    def __call__(self, progress: Progress) -> None:
        """Scrape."""
        with urllib.request.urlopen(self.url, timeout=5) as answer:
            self.scrapes.append(answer.read().decode())

    def values(self, series: str) -> list[float]:
        """A series in each scrape, summed over its labels."""
        pattern = re.compile(rf"^{series}(?:{{[^}}]*}})? (\S+)$", re.MULTILINE)
        return [sum(float(x) for x in pattern.findall(text)) for text in self.scrapes]


def test_metrics_are_served_during_the_run(undisturbed: Work) -> None:
    """Counters only grow, gauges say what is left, labels name job, run and worker."""
    scraper = Scraper()
    # Several seconds of work, so that there are scrapes in the middle of it.
    generation = {**LONG, "max_tokens": 400}
    raw = undisturbed.raw(
        "scraped", generation=generation, metrics={"port": 0}, resources={"max_sequences": 2}
    )
    job = parse_job(JobSource.of_mapping({"name": "my job", **raw}))
    summary = run_job(job, view=scraper)
    assert summary.exit_code == 0
    rows = scraper.values("batchrun_rows_total")
    tokens = scraper.values("batchrun_tokens_total")
    left = scraper.values("batchrun_rows_left")
    assert rows == sorted(rows) and tokens == sorted(tokens) and tokens[-1] > 0
    assert left[0] == ROWS * NUM_SHARDS and left == sorted(left, reverse=True)
    assert max(scraper.values("batchrun_state_slots_used")) > 0
    last = scraper.scrapes[-1]
    assert f'job="my job",run="{summary.run_id}"' in last
    assert re.search(r'batchrun_tokens_total{[^}]*kind="reasoning"[^}]*worker="[^"]+"', last)
    with pytest.raises(OSError):
        urllib.request.urlopen(scraper.url, timeout=1)

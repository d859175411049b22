"""Work is handed from the lost to the living; rows that kill, first rows that fail, limits."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

import batchrun as package
from batchrun.cluster.driver import run_job
from batchrun.cluster.summary import Summary
from batchrun.cluster.tally import Progress
from batchrun.cluster.view import View
from batchrun.data.cancel import request_cancel
from batchrun.data.journal import read_journal
from batchrun.data.layout import journal_folder, strikes_folder
from batchrun.data.plan import read_plan
from batchrun.data.schema import InputColumns
from batchrun.data.status import read_status
from batchrun.data.store import Store
from batchrun.errors import InterruptedRunError
from batchrun.job import parse_job
from batchrun.jobfile import JobSource

from .conftest import Command, Work, answer_of, descendants, is_alive, sums, worker_pids
from .faults import DIE, HANG
from .test_failures import LONG, is_busy, meanwhile

NUM_ROWS = 90


@dataclass
class Told:
    """A view that keeps what it is told, and does something once at some progress."""

    at: Callable[[Progress], bool] = lambda progress: False
    do: Callable[[], object] = lambda: None
    lines: list[str] = field(default_factory=list)
    seen: list[Progress] = field(default_factory=list)
    done: bool = False

    def say(self, text: str) -> None:
        """A line for a person."""
        self.lines.append(text)

    def __call__(self, progress: Progress) -> None:
        """A moment of the run."""
        self.seen.append(progress)
        if not self.done and self.at(progress):
            self.done = True
            self.do()


def run(raw: dict[str, object], view: View | None = None) -> Summary:
    """Run a job in this session's cluster, equal to the byte."""
    job = parse_job(JobSource.of_mapping(raw))
    return run_job(job, deterministic=True, view=view or Told())


def store_of(work: Work, name: str) -> Store:
    """The store of an output."""
    return Store.open(str(work.folder / name))


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


@dataclass
class Undisturbed:
    """A run in which nothing happened, and what its endpoint said meanwhile."""

    work: Work
    summary: Summary
    scraper: Scraper


@pytest.fixture(scope="module")
def undisturbed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """One big shard and a small one, and what one worker makes of them in `out`."""
    work, scraper = Work(tmp_path_factory.mktemp("big")), Scraper()
    work.write("big", sums(NUM_ROWS))
    work.write("small", sums(2, start=200))
    raw = work.raw(generation=LONG, resources={"max_sequences": 4}, metrics={"port": 0})
    summary = run({"name": "my job", **raw}, scraper)
    assert (summary.exit_code, summary.restarts, summary.num_shards) == (0, 0, 2)
    assert summary.sampled_tokens == summary.generated_tokens
    return Undisturbed(work, summary, scraper)


@pytest.fixture(scope="module")
def big(undisturbed: Undisturbed) -> Work:
    """The input of the undisturbed run, and its rows in `out`."""
    return undisturbed.work


def test_metrics_are_served_during_the_run(undisturbed: Undisturbed) -> None:
    """Counters only grow, gauges say what is left, labels name job, run and worker."""
    scraper = undisturbed.scraper
    rows = scraper.values("batchrun_rows_total")
    tokens = scraper.values("batchrun_tokens_total")
    left = scraper.values("batchrun_rows_left")
    assert rows == sorted(rows) and tokens == sorted(tokens) and tokens[-1] > 0
    assert left[0] == NUM_ROWS + 2 and left == sorted(left, reverse=True)
    assert max(scraper.values("batchrun_state_slots_used")) > 0
    last = scraper.scrapes[-1]
    assert f'job="my job",run="{undisturbed.summary.run_id}"' in last
    assert re.search(r'batchrun_tokens_total{[^}]*kind="reasoning"[^}]*worker="[^"]+"', last)
    with pytest.raises(OSError):
        urllib.request.urlopen(scraper.url, timeout=1)


def big_job(work: Work, name: str, **sections: dict[str, object]) -> dict[str, object]:
    """The same job with two workers and a quick journal."""
    return work.raw(
        name,
        **{
            "generation": LONG,
            "resources": {"workers": 2, "max_sequences": 4},
            "checkpoint": {"interval_s": 0.5},
            **sections,
        },
    )


def test_a_big_shard_feeds_two_workers_and_outlives_one(big: Work) -> None:
    """Two workers share a shard by ranges of its rows. When one is killed, the other takes over
    what it had, and at most what came after its last write to the journal is generated again."""

    def kill_one() -> None:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            for pid in filter(is_busy, worker_pids(os.getpid())):
                os.kill(pid, signal.SIGKILL)
                return

    def are_both_at_work(progress: Progress) -> bool:
        return progress.workers.get("ready") == 2 and 8 < progress.done.rows < NUM_ROWS - 16

    view = Told(are_both_at_work, kill_one)
    summary = run(big_job(big, "ranges"), view)
    assert (summary.exit_code, summary.restarts) == (0, 1)
    assert big.rows("ranges") == big.rows()
    assert big.parts("ranges") == big.parts()
    total = summary.counts.reasoning_tokens + summary.counts.completion_tokens
    assert total == 64 * (NUM_ROWS + 2)
    # Rows that it made safe after its last report are counted, though it told nobody.
    assert (summary.generated_rows, summary.generated_tokens) == (NUM_ROWS + 2, total)
    # What it did in its last second and did not finish is far from a whole shard.
    assert abs(summary.sampled_tokens - total) < total / 3
    store = store_of(big, "ranges")
    assert store.list(journal_folder(summary.run_id)) == ()
    # One death is one strike, and none when it came between two leases.
    assert len(store.list(strikes_folder(summary.run_id))) <= 1


def test_nothing_that_was_journaled_is_generated_again(
    big: Work, batchrun: Callable[..., Command]
) -> None:
    """SIGKILL of `batchrun submit`: its Ray and its workers go with it, and the next submit samples
    exactly the tokens that neither a part nor the journal has."""
    raw = big_job(big, "killed", resources={"max_sequences": 4})
    path = big.job_file("killed", **{k: v for k, v in raw.items() if k != "output"})  # type: ignore[arg-type]
    command = batchrun("submit", path, "--deterministic")
    journal = big.folder / "killed" / "_batchrun"
    command.wait_until(lambda: len(list(journal.glob("*/journal/*/*"))) >= 3)
    # Ray's two agents notice within a minute that their node is gone; they hold nothing.
    below = {
        pid: line for pid, line in descendants(command.process.pid).items() if "Agent" not in line
    }
    assert any("raylet" in line for line in below.values())
    assert any("ray::Worker" in line for line in below.values())
    command.process.kill()
    command.process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, below)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [line.strip() for pid, line in below.items() if is_alive(pid)] == []
    store = store_of(big, "killed")
    assert not read_status(store).live
    [run_id] = store.folders("_batchrun")
    known = 0
    for shard in read_plan(store, run_id, InputColumns()).shards.values():
        found = read_journal(store, run_id, shard)
        known += sum(
            item.reasoning_tokens + item.completion_tokens for item in found.finished.values()
        )
        known += sum(len(item.token_ids) for item in found.running.values())
    assert known > 0 and big.parts("killed") == []
    summary = run(raw)
    total = summary.counts.reasoning_tokens + summary.counts.completion_tokens
    assert summary.sampled_tokens == total - known
    assert summary.exit_code == 0
    assert big.rows("killed") == big.rows()


def test_a_drain_hands_over_every_token(big: Work) -> None:
    """SIGTERM of both workers at once, whose nodes are taken away: others go on where they were,
    and no token is sampled twice."""

    def drain() -> None:
        for pid in worker_pids(os.getpid()):
            os.kill(pid, signal.SIGTERM)

    view = Told(lambda progress: progress.workers.get("ready") == 2 and progress.done.rows > 4,
                drain)  # fmt: skip
    summary = run(big_job(big, "drained", checkpoint={"interval_s": 60}), view)
    assert (summary.exit_code, summary.restarts, summary.discarded_tokens) == (0, 2, 0)
    assert summary.sampled_tokens == summary.generated_tokens
    assert big.rows("drained") == big.rows()
    assert big.parts("drained") == big.parts()


def test_cancelled_through_the_output(big: Work) -> None:
    """Whoever can write the output can stop the run: exit code 75, everything kept, and the next
    submit goes on without a token twice."""
    raw = big_job(big, "cancelled", resources={"max_sequences": 1})
    store = store_of(big, "cancelled")

    def ask(ended: threading.Event) -> None:
        while not any("/journal/" in item.path for item in store.list("_batchrun")):
            if ended.wait(0.1):
                return
        request_cancel(store, store.folders("_batchrun")[0])

    with meanwhile(ask):
        first = run(raw)
    assert first.exit_code == 75
    assert isinstance(first.error, InterruptedRunError)
    assert "cancelled" in first.error.message and first.journaled_rows > 0
    second = run(big_job(big, "cancelled"))
    assert second.exit_code == 0
    assert first.sampled_tokens + second.sampled_tokens == (
        second.counts.reasoning_tokens + second.counts.completion_tokens
    )
    assert big.rows("cancelled") == big.rows()


def test_rows_that_kill_become_error_rows(work: Work, cluster: str) -> None:
    """A row that ends its worker's process and one that hangs it are found by running suspects
    alone; they end as error rows and their neighbours are answered. Where the worker stood is
    told. Within the tolerance that is a success, else exit code 3; nobody runs them again."""
    prompts = [*sums(3), DIE, *sums(3, start=30)]
    work.write("a", prompts)
    work.write("b", [HANG, *sums(2, start=60)])
    errors = {"max_retries": 0, "hang_timeout_s": 2.0, "max_failed_rows": 2}
    raw = work.raw(errors=errors, resources={"max_sequences": 4})
    view = Told()
    summary = run(raw, view)
    rows = work.rows()
    assert [row["error"] is None for row in rows] == [
        row["prompt"] not in (DIE, HANG) for row in rows
    ]
    assert {
        row["completion"] == answer_of(str(row["prompt"])) for row in rows if not row["error"]
    } == {True}
    died, hung = (next(row for row in rows if row["prompt"] == text) for text in (DIE, HANG))
    assert str(died["error"]).startswith("worker_lost: ")
    assert str(hung["error"]).startswith("worker_lost: ")
    assert "no engine step for 2 s" in str(hung["error"])
    assert any("_stand_still" in line for line in view.lines)
    assert (summary.exit_code, summary.failed_rows) == (0, 2)
    again = run({**raw, "errors": {**errors, "max_failed_rows": 1}})
    assert (again.exit_code, again.restarts, again.generated_rows) == (3, 0, 0)


def test_first_rows_that_fail_stop_the_run(work: Work, cluster: str) -> None:
    """With canary_rows so many rows are run first, by one worker; when they fail nothing else is
    run, and the exit code is 3."""
    work.write("a", ["", "", "", *sums(40)])
    raw = work.raw(errors={"canary_rows": 3}, resources={"workers": 2, "max_sequences": 2})
    summary = run(raw)
    assert (summary.exit_code, summary.sampled_tokens) == (3, 0)
    assert work.parts() == []


def test_limits_end_with_75_and_the_next_submit_goes_on(work: Work, cluster: str) -> None:
    """At max_tokens the run stops in good order, saying which limit it was."""
    for number in range(3):
        work.write(f"{number}", sums(15, start=1 + 15 * number))
    raw = work.raw(generation=LONG, limits={"max_tokens": 1500}, resources={"max_sequences": 2})
    summary = run(raw)
    assert summary.exit_code == 75 and summary.error is not None
    assert "max_tokens" in summary.error.message
    assert summary.sampled_tokens > 0
    second = run({**raw, "limits": {}})
    assert (second.exit_code, second.counts.rows) == (0, 45)
    assert summary.sampled_tokens + second.sampled_tokens == 45 * 64
    assert len(work.rows()) == 45
    assert package.run(raw).generated_rows == 0

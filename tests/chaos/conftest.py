"""A field of rows, runs over it that are disturbed, and what every one of them has to end in."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchrun.cluster.driver import run_job
from batchrun.cluster.summary import Summary
from batchrun.cluster.tally import Progress
from batchrun.data.layout import PART_NAME
from batchrun.data.store import Store
from batchrun.data.verify import verify_run
from batchrun.job import parse_job
from batchrun.jobfile import JobSource
from tests.chaos.engine import Ledger
from tests.chaos.faults import RUNTIME_ENV, marks, plan_path
from tests.integration.conftest import Command, Work, batchrun, work, worker_pids

__all__ = ["batchrun", "work"]

NUM_SHARDS = 4
ROWS = 10  # of each
TOKENS = 40  # of each row
SEQUENCES = 4
STEP_S = 0.01
INTERVAL_S = 1.0
FLUSH_S = 1.0  # what one flush may take on a busy machine
POISON = "POISON"

_OWNERS: dict[Path, str] = {}  # of a plan: the test that made it

Rows = list[dict[str, object]]


@dataclass
class Watcher:
    """A view that calls back at each progress, and keeps what is said."""

    at: Callable[[Progress], None] = lambda progress: None
    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line for a person."""
        self.lines.append(text)

    def __call__(self, progress: Progress) -> None:
        """A moment of the run."""
        self.at(progress)


@dataclass
class Field:
    """Input files and the runs over them. Outputs may be elsewhere: ``base`` is a folder or a
    bucket's URL."""

    work: Work
    base: str
    storage_options: dict[str, object] = field(default_factory=dict)
    input_options: dict[str, object] = field(default_factory=dict)
    input_url: str = ""
    record: Callable[[str, object], None] = lambda name, value: None
    test: str = ""
    faulted_at: float | None = None

    def at(self, base: str, storage_options: Mapping[str, object]) -> Field:
        """The same with outputs elsewhere."""
        return Field(self.work, base, dict(storage_options), record=self.record, test=self.test)

    def output(self, name: str) -> str:
        """The URL of an output."""
        return f"{self.base}/{name}"

    def raw(self, name: str, **sections: Mapping[str, object]) -> dict[str, object]:
        """A job that takes some seconds; ``sections`` are merged into it."""
        standard: dict[str, dict[str, object]] = {
            "generation": {"max_tokens": TOKENS, "ignore_eos": True},
            "resources": {"max_sequences": SEQUENCES},
            "checkpoint": {"interval_s": INTERVAL_S},
            "output": {"path": self.output(name), "storage_options": self.storage_options},
            "errors": {"hang_timeout_s": 30.0},
            "ray": {"runtime_env": RUNTIME_ENV},
        }
        for key, values in sections.items():
            standard[key] = {**standard.get(key, {}), **values}
        return self.work.raw(name, **standard)

    def plan(self, name: str, **faults: Any) -> None:
        """What befalls the workers of a run; see :mod:`tests.chaos.faults`."""
        settings = {"max_sequences": SEQUENCES, "step_s": STEP_S, **faults.pop("engine", {})}
        path = plan_path(self.work.folder / "in", self.output(name))
        # Two tests of one name would count each other's tokens.
        assert _OWNERS.setdefault(path, self.test) == self.test, f"{name} is taken"
        path.write_text(json.dumps({"engine": settings, **faults}))

    def run(
        self,
        name: str,
        view: Watcher | None = None,
        stop: threading.Event | None = None,
        **sections: Mapping[str, object],
    ) -> Summary:
        """Run the job in this session's cluster."""
        job = parse_job(JobSource.of_mapping(self.raw(name, **sections)))
        return run_job(job, deterministic=True, view=view or Watcher(), stop=stop)

    def command(
        self,
        start: Callable[..., Command],
        name: str,
        address: str,
        *more: str,
        **sections: Mapping[str, object],
    ) -> Command:
        """Run the job by a process of its own in a cluster."""
        path = self.work.folder / f"job-{name}.yaml"
        path.write_text(json.dumps(self.raw(name, **sections)))
        return start("run", path, "--address", address, "--deterministic", "--json", *more)

    def store(self, name: str) -> Store:
        """Where an output is, past any proxy."""
        return Store.open(self.output(name), self.storage_options)

    def rows(self, name: str) -> Rows:
        """The rows of an output as they stand in its parts."""
        store = self.store(name)
        found: Rows = []
        for item in store.list(recursive=False):
            if PART_NAME.fullmatch(item.path):
                data = store.read(item.path)
                assert data is not None
                found += pq.read_table(io.BytesIO(data)).to_pylist()
        return found

    def marks(self, name: str) -> Path:
        """Where the workers of a run leave marks."""
        return marks(plan_path(self.work.folder / "in", self.output(name)))

    def sampled(self, name: str) -> int:
        """Tokens that all processes of a run have sampled so far."""
        return sum(count for count, _ in Ledger.read(self.marks(name) / "ledger"))

    def fault(self) -> None:
        """Take note that the fault happens now."""
        self.faulted_at = time.time()

    def check(
        self,
        name: str,
        expected: Rows,
        *,
        losses: int,
        failed: Mapping[str, str] | None = None,
        step_s: float = STEP_S,
    ) -> None:
        """Every promise at once: the output is proved, its rows are those of the undisturbed run,
        and with each of ``losses`` at most an interval and a flush of generation is lost.

        ``failed`` are prompts that became error rows, with how their error begins.
        """
        verdict = verify_run(self.store(name))
        rows = self.rows(name)
        count = Counter(str(row["id"]) for row in rows)
        wanted = Counter(str(row["id"]) for row in expected)
        lost, twice = sum((wanted - count).values()), sum((count - wanted).values())
        needed = sum(int(str(row["completion_tokens"])) for row in rows)
        again = self.sampled(name) - needed
        self.record("lost", lost)
        self.record("twice", twice)
        self.record("again", again)
        self.record("recovery_s", self.recovery_s(name))
        assert (verdict.problems, lost, twice) == ((), 0, 0)
        bad = failed or {}
        for row, other in zip(rows, expected, strict=True):
            if row["prompt"] in bad:
                assert str(row["error"]).startswith(bad[str(row["prompt"])])
                assert row["id"] == other["id"] and row["completion"] is None
            else:
                assert row == other
        most = losses * SEQUENCES * (INTERVAL_S + FLUSH_S) / step_s
        assert 0 <= again + len(bad) * TOKENS, "tokens came from nowhere"
        assert again <= most

    def recovery_s(self, name: str) -> float | None:
        """From the fault to the first token of a process that began after it."""
        happened = [
            path.stat().st_mtime
            for path in self.marks(name).glob("*-[0-9]*")
            if path.name.startswith(("put-", "prompt-"))
        ]
        at = self.faulted_at or min(happened, default=None)
        if at is None:
            return None
        later = [first - at for _, first in Ledger.read(self.marks(name) / "ledger") if first > at]
        return round(min(later), 1) if later else None


def _questions(shard: int) -> list[str]:
    return [f"question {shard}-{number}: {'why ' * (number % 5)}?" for number in range(ROWS)]


@pytest.fixture(scope="session")
def _ground(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, Rows]:
    """The input of all runs, and what an undisturbed one makes of it."""
    work = Work(tmp_path_factory.mktemp("chaos"))
    for shard in range(NUM_SHARDS):
        work.write(f"{shard}", _questions(shard))
    field = Field(work, str(work.folder))
    field.plan("undisturbed", engine={"step_s": 0.0})
    summary = field.run("undisturbed")
    assert (summary.exit_code, summary.restarts) == (0, 0)
    assert field.sampled("undisturbed") == NUM_SHARDS * ROWS * TOKENS == summary.sampled_tokens
    return work, field.rows("undisturbed")


@pytest.fixture
def field(
    _ground: tuple[Work, Rows],
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> Field:
    """The field, for one test."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "say which fault of the matrix this is: @pytest.mark.fault(...)"
    record_property("fault", marker.args)
    work = _ground[0]
    return Field(work, str(work.folder), record=record_property, test=request.node.name)


@pytest.fixture
def expected(_ground: tuple[Work, Rows]) -> Rows:
    """The rows of the undisturbed run."""
    return _ground[1]


@pytest.fixture
def own_field(
    work: Work,
    cluster: str,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> Callable[[Sequence[Sequence[str]]], tuple[Field, Rows]]:
    """A field with rows of the test's own: makes it of the prompts of its shards, and runs it
    undisturbed."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None
    record_property("fault", marker.args)

    def make(shards: Sequence[Sequence[str]]) -> tuple[Field, Rows]:
        for number, prompts in enumerate(shards):
            work.write(f"{number}", prompts)
        made = Field(work, str(work.folder), record=record_property, test=request.node.name)
        made.plan("undisturbed", engine={"step_s": 0.0})
        assert made.run("undisturbed").exit_code == 0
        return made, made.rows("undisturbed")

    return make


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
        thread.join(timeout=30)
    assert not thread.is_alive()


def busy_workers(above: int | None = None) -> list[int]:
    """The workers below a process (this one) that are in the middle of their work."""
    found = []
    for pid in worker_pids(above or os.getpid()):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "Worker.work" in title:
            found.append(pid)
    return sorted(found)


def wait_for(
    condition: Callable[[], object], ended: threading.Event, every_s: float = 0.05
) -> bool:
    """Wait until something holds; False when the run ended before."""
    while not condition():
        if ended.wait(every_s):
            return False
    return True


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was injected, and what became of it."""
    lines = []
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if getattr(report, "when", "") == "call"
    ]
    for report in reports:
        found = dict(report.user_properties)
        if "fault" in found:
            number, what = found["fault"]
            cells = [str(found.get(name, "-")) for name in ("lost", "twice", "again")]
            recovery = found.get("recovery_s")
            cells.append("-" if recovery is None else f"{recovery:g}")
            lines.append((int(number), what, "yes" if report.passed else "NO", *cells))
    if not lines:
        return
    write = terminalreporter.write_line
    write("")
    head = ("survived", "rows lost", "rows twice", "tokens again", "recovery s")
    write(f"{'row':>3}  {'fault':58} " + " ".join(f"{name:>12}" for name in head))
    for number, what, *cells in sorted(lines):
        write(f"{number:>3}  {what[:58]:58} " + " ".join(f"{cell:>12}" for cell in cells))
    survived = sum(1 for line in lines if line[2] == "yes")
    known = [dict(report.user_properties) for report in reports]
    lost, twice, again = (
        sum(int(found.get(name) or 0) for found in known) for name in ("lost", "twice", "again")
    )
    waits = sorted(float(found["recovery_s"]) for found in known if found.get("recovery_s"))
    write(
        f"{len(lines)} faults injected, {survived} survived; {lost} rows lost, {twice} twice; "
        f"{again:,} tokens generated twice"
        + (f"; recovery {waits[len(waits) // 2]:g} s, at most {waits[-1]:g} s" if waits else "")
    )

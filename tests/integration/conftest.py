"""What a run is made of: files, jobs, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchrun.cli import main
from batchrun.cluster.connection import Cluster
from batchrun.cluster.driver import run_checked
from batchrun.cluster.opening import CheckedJob, check
from batchrun.cluster.summary import Summary
from batchrun.cluster.view import NoView
from batchrun.job import parse_job
from batchrun.jobfile import JobSource

ROOT = Path(__file__).resolve().parents[2]


def sums(count: int, start: int = 1) -> list[str]:
    """So many questions of different lengths, all different."""
    texts = []
    for number in range(start, start + count):
        terms = "+".join(
            str(1 + (number * 7 + term * (13 + number // 90)) % 90)
            for term in range(2 + number % 4)
        )
        texts.append(f"What is {terms}?")
    return texts


def answer_of(prompt: str) -> str:
    """The right answer to a question of :func:`sums`."""
    return str(sum(int(term) for term in prompt[len("What is ") : -1].split("+")))


@dataclass(frozen=True)
class Work:
    """A folder with input files, job files and outputs."""

    folder: Path

    def write(self, name: str, prompts: Sequence[object], **columns: Sequence[object]) -> Path:
        """Write an input file below ``in/``."""
        path = self.folder / "in" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string()), **columns}), path)
        return path

    def raw(self, output: str = "out", /, **sections: Mapping[str, object]) -> dict[str, object]:
        """A job over ``in/`` as nested dictionaries; ``sections`` are merged into it."""
        raw: dict[str, dict[str, object]] = {
            "model": {"path": "tiny"},
            "input": {
                "path": str(self.folder / "in"),
                "prompt_column": "prompt",
                "columns": ["prompt"],
            },
            "generation": {"max_tokens": 64, "temperature": 0},
            "output": {"path": str(self.folder / output)},
            "metrics": {"port": None},
        }
        for name, values in sections.items():
            raw[name] = {**raw.get(name, {}), **values}
        return dict(raw)

    def job_file(self, output: str = "out", /, **sections: Mapping[str, object]) -> Path:
        """The same as a file (JSON is YAML)."""
        path = self.folder / f"{output}.yaml"
        path.write_text(json.dumps(self.raw(output, **sections), indent=1))
        return path

    def rows(self, output: str = "out") -> list[dict[str, object]]:
        """All rows of an output, as any reader of datasets sees them."""
        found: list[dict[str, object]] = ds.dataset(self.folder / output).to_table().to_pylist()
        return found

    def parts(self, output: str = "out") -> list[str]:
        """The names of the published parts."""
        return sorted(path.name for path in (self.folder / output).glob("part-*.parquet"))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """An empty :class:`Work`."""
    return Work(tmp_path)


class WarmRuns:
    """Runs in this session's cluster, each in the workers of the one before where they could be its
    own: most of a short run is the start of a worker. Workers that stay take up the cluster: end
    them with :meth:`close` before a run that is no warm one."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._made_for: object = None

    def __call__(
        self, raw: Mapping[str, object], *, keep_finished: bool = False, **options: Any
    ) -> Summary:
        """As :func:`batchrun.run`, with further ``options`` of
        :func:`~batchrun.cluster.driver.run_checked`."""
        source = JobSource.of_mapping(raw)
        return self.checked(
            check(parse_job(source), source, keep_finished=keep_finished), **options
        )

    def checked(self, checked: CheckedJob, **options: Any) -> Summary:
        """A run of a job that was checked."""
        job = checked.job
        made_for = (
            job.model,
            job.resources,
            job.generation.max_tokens,
            options.get("deterministic"),
        )
        if self._cluster is None or made_for != self._made_for:
            self.close()
            cluster = Cluster(job, None, NoView(), keeps_workers=True)
            self._cluster = self._stack.enter_context(cluster)
            self._made_for = made_for
        return run_checked(checked, self._cluster, started=time.monotonic(), **options)

    def close(self) -> None:
        """End the workers."""
        self._cluster = None
        self._stack.close()


@pytest.fixture(scope="module")
def warm(cluster: str) -> Iterator[WarmRuns]:
    """:class:`WarmRuns` of one file: in others, tests count and kill the workers of the session."""
    runs = WarmRuns()
    yield runs
    runs.close()


@dataclass
class Command:
    """A ``batchrun`` process."""

    process: subprocess.Popen[str]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait for ``condition`` while the process lives; fail when it ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None:
                pytest.fail(f"ended with {self.process.returncode}: {self.process.communicate()}")
            assert time.monotonic() < deadline, "took too long"
            time.sleep(0.05)

    def end(self, timeout_s: float = 60.0) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err


@pytest.fixture
def batchrun(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts ``batchrun`` with arguments; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> Command:
        environ = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        process = subprocess.Popen(
            [sys.executable, "-m", "batchrun", *map(str, arguments)],
            cwd=ROOT,
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return Command(process)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Calls ``batchrun`` in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def descendants(pid: int) -> dict[int, str]:
    """The processes below ``pid``: pid -> command line."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if status[0] != "Z":
            parents[int(entry.name)] = int(status[1])
    found: dict[int, str] = {}
    for child in parents:
        above = child
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and child != pid:
            found[child] = commands[child]
    return found


def worker_pids(pid: int) -> set[int]:
    """The worker actors among the descendants of ``pid``."""
    return {
        child for child, command in descendants(pid).items() if command.startswith("ray::Worker")
    }


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

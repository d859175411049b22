"""The printed crontab line at work: over a growing folder, run by a shell and by cron itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import batchrun

from .conftest import ROOT, Work, sums


def crontab_of(job: Path, folder: Path, *arguments: str) -> str:
    """The last line that ``batchrun schedule`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "batchrun", "schedule", str(job), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def tick(line: str, fields: int = 5) -> subprocess.CompletedProcess[str]:
    """Run a crontab line as cron does: ``sh``, a bare environment, the home folder."""
    command = line.split(maxsplit=fields)[fields].replace("\\%", "%")
    return subprocess.run(
        ["/bin/sh", "-c", command],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), "SHELL": "/bin/sh"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def success_of(work: Work) -> dict[str, object]:
    """The marker of success."""
    found: dict[str, object] = json.loads((work.folder / "out" / "_SUCCESS").read_text())
    return found


def test_each_tick_runs_what_is_new(work: Work, cluster: str) -> None:
    """A tick over a folder that has grown since the last run leaves the part that is there as it
    is, and the next one finds nothing to do. Silent throughout, with one log of the day."""
    work.write("a", sums(3))
    raw = {**work.raw(), "name": "nightly", "schedule": "@daily"}
    assert batchrun.run(raw).exit_code == 0
    job = work.folder / "nightly.yaml"
    job.write_text(json.dumps(raw))
    line = crontab_of(job, work.folder)
    [part] = work.parts()
    written = (work.folder / "out" / part).stat()
    work.write("b", sums(2, start=50))
    first = tick(line)
    [log] = (work.folder / "logs").iterdir()
    assert (first.returncode, first.stdout, first.stderr) == (0, "", ""), log.read_text()
    assert len(work.parts()) == 2 and part in work.parts()
    again = (work.folder / "out" / part).stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert [row["prompt"] for row in work.rows()] == [*sums(3), *sums(2, start=50)]
    assert success_of(work)["rows"] == 5
    assert tick(line).returncode == 0
    assert len(work.parts()) == 2
    assert "done: 5 rows" in log.read_text()


def test_a_tick_that_fails_is_mailed(work: Work) -> None:
    """A job whose input is gone prints its exit code, the log's place and the end of the log."""
    job = work.folder / "nightly.yaml"
    job.write_text(json.dumps({**work.raw(), "name": "nightly", "schedule": "@daily"}))
    done = tick(crontab_of(job, work.folder))
    assert done.returncode == 2
    said = done.stdout.splitlines()
    assert said[0].startswith(
        f"nightly: batchrun ended with exit code 2, see {work.folder}/logs/nightly-"
    )
    assert "input.path" in done.stdout


@pytest.mark.skipif(
    os.environ.get("BATCHRUN_SLOW_TESTS") != "1",
    reason="waits for two ticks of cron; scripts/ops_check.sh runs it",
)
def test_cron_itself_runs_what_is_new(work: Work) -> None:
    """Debian's cron reads the printed line and fires twice over a growing folder."""
    import time

    program = shutil.which("cron", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or os.geteuid() != 0:
        pytest.skip("needs Debian's cron, and root to start it")
    job = work.folder / "nightly.yaml"
    job.write_text(json.dumps({**work.raw(), "name": "nightly", "schedule": "* * * * *"}))
    line = crontab_of(job, work.folder)
    work.write("a", sums(3))
    kept = subprocess.run(["crontab", "-l"], capture_output=True, text=True)
    subprocess.run(["crontab", "-"], input=f"{line}\n", text=True, check=True)
    cron = subprocess.Popen([program, "-f"])

    def wait_for(rows: int) -> None:
        deadline = time.monotonic() + 170
        marker = work.folder / "out" / "_SUCCESS"
        while not (marker.exists() and success_of(work)["rows"] == rows):
            assert time.monotonic() < deadline, "cron did not run the line"
            time.sleep(0.5)

    try:
        wait_for(3)
        [part] = work.parts()
        written = (work.folder / "out" / part).stat().st_mtime_ns
        work.write("b", sums(2, start=50))
        wait_for(5)
    finally:
        cron.terminate()
        cron.wait(timeout=10)
        if kept.returncode == 0:
            subprocess.run(["crontab", "-"], input=kept.stdout, text=True, check=True)
        else:
            subprocess.run(["crontab", "-r"], check=True)
    assert len(work.parts()) == 2
    assert (work.folder / "out" / part).stat().st_mtime_ns == written

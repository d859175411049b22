"""What a worker leaves behind, for whoever comes after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchrun.cluster import remains as module
from batchrun.cluster.remains import Estate, Place, look

PROGRAM = """
import sys, time
from batchrun.cluster.remains import Estate
estate = Estate(4)
estate.flight.set([(3, 7), (3, 9)])
def stand_here():
    print(estate.place.folder, estate.place.pid, estate.place.process_started, flush=True)
    sys.stdin.read()
stand_here()
"""


@pytest.fixture
def worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[subprocess.Popen[str], Place]]:
    """A process with two rows in flight."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder, pid, started = process.stdout.readline().split()
    yield process, Place(folder, int(pid), started)
    process.kill()
    process.communicate()


def test_a_killed_worker_tells_its_rows(worker: tuple[subprocess.Popen[str], Place]) -> None:
    """After SIGKILL the rows in flight are known, once: then the remains are gone."""
    process, place = worker
    process.kill()
    process.wait()
    assert look(place, with_stacks=False).in_flight == ((3, 7), (3, 9))
    assert not Path(place.folder).exists()
    assert look(place, with_stacks=False).in_flight is None


def test_a_hung_worker_tells_where_it_stands(
    worker: tuple[subprocess.Popen[str], Place],
) -> None:
    """The stacks of its threads name the function; one that is stopped does not answer, and its
    state is told instead. The worker lives on, and its remains are there for later."""
    process, place = worker
    remains = look(place, with_stacks=True)
    assert "stand_here" in remains.stacks and remains.in_flight == ((3, 7), (3, 9))
    assert process.poll() is None
    Path(place.folder, "stacks").write_text("")
    process.send_signal(signal.SIGSTOP)
    assert "does not answer; its state is 'T (stopped)'" in look(place, with_stacks=True).stacks


def test_another_process_of_the_same_number_is_left_alone() -> None:
    """No signal goes to a process that is not the worker."""
    place = Place("/nowhere", os.getpid(), "1")
    assert look(place, with_stacks=True).stacks == ""


def test_what_the_dead_leave_fills_no_disk(
    worker: tuple[subprocess.Popen[str], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that starts removes what others left that died ten minutes ago and were not asked
    for. What is younger stays, and so does what belongs to the living, however long they live."""
    process, place = worker
    folder = Path(place.folder)
    (folder / "dead").touch()
    os.utime(folder / "dead", (0, 0))
    monkeypatch.setattr(module.faulthandler, "register", lambda *_, **__: None)
    Estate(1)
    assert folder.exists(), "it lives"
    process.kill()
    process.wait()
    Estate(1)
    assert folder.exists(), "somebody may ask for it yet"
    os.utime(folder / "dead", (0, 0))
    own = Estate(1)
    assert not folder.exists() and Path(own.place.folder).exists()

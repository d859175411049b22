"""The rows that a worker had in its engine are known after its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.data.flight import FlightFile, read_flight

# Writes two states in turns for ever; says so once it is in the middle of it.
CHILD = """
import sys
from pathlib import Path
from batchrun.data.flight import FlightFile
flight = FlightFile(Path(sys.argv[1]), 500)
first = [(1, row) for row in range(500)]
second = [(2, row) for row in range(300)]
for turn in range(1 << 60):
    flight.set(first)
    flight.set(second)
    if turn == 3:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("turn", range(3))
def test_what_was_in_flight_survives_sigkill(tmp_path: Path, turn: int) -> None:
    """Killed while it writes, a worker leaves one whole state: the last or the one before."""
    path = tmp_path / "flight" / f"worker-{turn}"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    first = tuple((1, row) for row in range(500))
    second = tuple((2, row) for row in range(300))
    assert read_flight(path) in (first, second)


def test_the_file_says_what_is_in_flight_now(tmp_path: Path) -> None:
    """Each state replaces the one before; closing says that nothing is in flight any more."""
    path = tmp_path / "worker"
    flight = FlightFile(path, 3)
    assert read_flight(path) == ()
    assert path.stat().st_blocks * 512 >= path.stat().st_size > 0, "no full disk is met later"
    for rows in ([(0, 1), (7, 1 << 40)], [(0, 1)], [], [(1, 1), (1, 2), (1, 3)]):
        flight.set(reversed(rows))
        assert read_flight(path) == tuple(rows)
    with pytest.raises(ValueError, match="room for 3"):
        flight.set([(0, number) for number in range(4)])
    assert read_flight(path) == ((1, 1), (1, 2), (1, 3))
    assert [item.name for item in tmp_path.iterdir()] == ["worker"]
    flight.close()
    flight.close()
    assert (path.exists(), read_flight(path)) == (False, None)


def test_a_worker_does_not_write_over_its_predecessor(tmp_path: Path) -> None:
    """Whoever has the old file open still sees what it said."""
    path = tmp_path / "worker"
    before = FlightFile(path, 3)
    before.set([(0, 1)])
    with path.open("rb") as kept:
        after = FlightFile(path, 3)
        assert read_flight(path) == ()
        assert kept.read().count(b"BRF1") == 2
    after.close()
    before.close()


def test_a_damaged_file_never_blames_a_row(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte changed, it tells a state that was, or nothing."""
    path = tmp_path / "worker"
    flight = FlightFile(path, 2)
    flight.set([(0, 1)])
    flight.set([(0, 1), (5, 6)])
    data = path.read_bytes()
    flight.close()
    states = {None, ((0, 1),), ((0, 1), (5, 6))}
    copy = tmp_path / "copy"
    for cut in range(len(data)):
        copy.write_bytes(data[:cut])
        assert read_flight(copy) in states
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        copy.write_bytes(bytes(damaged))
        assert read_flight(copy) in states

"""What a worker leaves on its machine for those who come after its death: which rows it had in its
engine, and where it stood. Written by the worker, read by a task that the driver sends there."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from batchrun.data.flight import FlightFile, read_flight

_PREFIX = "batchrun-worker-"
_KEPT_S = 600.0  # after a death: whoever wants to know has asked by then
_DUMP_S = 3.0
_POLL_S = 0.05
_MAX_STACK_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Place:
    """Where to look: the folder of a worker's remains, and its process."""

    folder: str
    pid: int
    process_started: str


@dataclass(frozen=True, slots=True)
class Remains:
    """What was found. ``in_flight`` are (shard number, ordinal), None when nobody can tell;
    ``stacks`` is where every thread stood, for people; empty when that was not asked or could not
    be told."""

    in_flight: tuple[tuple[int, int], ...] | None = None
    stacks: str = ""


class Estate:
    """The remains of this process, while it lives. A lock on them tells the living from the dead:
    they are kept for ten minutes after a death, or until somebody has looked, and then removed by
    the next worker that starts on this machine."""

    def __init__(self, max_rows: int) -> None:
        """Room for ``max_rows`` rows in flight. The signal SIGUSR1 dumps the stacks of all threads
        from now on, whatever they are doing."""
        base = Path(tempfile.gettempdir())
        _sweep(base)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self._lock = os.open(_lock(folder), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.flight = FlightFile(_flight(folder), max_rows)
        self._stacks = _stacks(folder).open("w")
        faulthandler.register(signal.SIGUSR1, self._stacks, all_threads=True)
        pid = os.getpid()
        self.place = Place(str(folder), pid, _process_started(pid))


def look(place: Place, *, with_stacks: bool) -> Remains:
    """Read the remains of a worker on this machine and remove them; with ``with_stacks`` it is
    alive and is asked first where it stands."""
    folder = Path(place.folder)
    stacks = _dump(place) if with_stacks else ""
    in_flight = read_flight(_flight(folder))
    if not with_stacks:
        _remove(folder)
    return Remains(in_flight, stacks)


def _dump(place: Place) -> str:
    """Have the process write where it stands; its state where it does not answer."""
    path = _stacks(Path(place.folder))
    if _process_started(place.pid) != place.process_started:
        return ""
    with contextlib.suppress(OSError):
        os.kill(place.pid, signal.SIGUSR1)
    text, until = "", time.monotonic() + _DUMP_S
    while time.monotonic() < until:
        time.sleep(_POLL_S)
        before, text = text, _tail(path)
        if text and text == before:
            return text
    state = _state(place.pid)
    return text or f"the process does not answer; its state is {state!r}"


def _tail(path: Path) -> str:
    """What was dumped: the thread that the interpreter runs stands last and says most."""
    try:
        return path.read_bytes()[-_MAX_STACK_BYTES:].decode("utf-8", "replace")
    except OSError:
        return ""


def _flight(folder: Path) -> Path:
    return folder / "flight"


def _stacks(folder: Path) -> Path:
    return folder / "stacks"


def _lock(folder: Path) -> Path:
    return folder / "lock"


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _sweep(base: Path) -> None:
    """Remove what the dead left and nobody has asked for. Nobody knows when a death was: who finds
    it first leaves a mark, and the time counts from there."""
    for folder in base.glob(f"{_PREFIX}*"):
        mark = folder / "dead"
        with contextlib.suppress(OSError):  # of another user, or swept by somebody else just now
            if _is_owned(folder):
                mark.unlink(missing_ok=True)
            elif not mark.exists():
                mark.touch()
            elif time.time() - mark.stat().st_mtime > _KEPT_S:
                _remove(folder)


def _is_owned(folder: Path) -> bool:
    """Whether the process that made the folder lives."""
    try:
        handle = os.open(_lock(folder), os.O_RDWR)
    except FileNotFoundError:
        return False  # it is just being made, or being removed
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _state(pid: int) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "gone"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("State")), "")


def _process_started(pid: int) -> str:
    """The start of a process, which tells it from a later one of the same number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]

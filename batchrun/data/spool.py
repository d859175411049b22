"""Local files for parts being written: private, and gone with the process that made them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "batchrun-spool-"
_LOCK = "lock"


class Spool:
    """A private folder for one part. A lock on it tells the living from the dead, so that what a
    killed process left is removed by the next one on this machine."""

    def __init__(self, parent: Path | None = None) -> None:
        base = Path(tempfile.gettempdir()) if parent is None else parent
        base.mkdir(parents=True, exist_ok=True)
        _sweep(base)
        self.path, self._lock = _make(base)

    def remove(self) -> None:
        """Delete the folder and all in it. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _make(base: Path) -> tuple[Path, int]:
    """A new folder and the handle of its lock; again when a sweep came between the two."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        handle = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if (path / _LOCK).exists():
            return path, handle
        os.close(handle)


def _sweep(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            continue  # another user's, or just being made
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its process lives
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)

"""Which rows a worker has in its engine, in a file that outlives its death.

The file is mapped into memory: what was written is there for whoever reads it next, also when the
process was killed at the next instruction. It is local and small, and nothing waits for a disk.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

# Two copies, written in turns, so that a death in the middle of one leaves the other.
_MAGIC = b"BRF1"
_HEAD = struct.Struct("<4sIQI")  # magic, rows, version, checksum of what follows and of these
_ROW = struct.Struct("<QQ")  # shard number, ordinal


class FlightFile:
    """Written by a worker before its engine gets to see rows, read when the worker has died."""

    def __init__(self, path: Path, max_rows: int) -> None:
        """Room for ``max_rows`` rows at ``path``, whose folder is made. Replaces what is there."""
        self.path = path
        self._max_rows = max_rows
        self._copy_bytes = _HEAD.size + max_rows * _ROW.size
        self._version = 0
        self._rows: frozenset[tuple[int, int]] = frozenset()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A new file each time: an earlier worker's last words are not written over.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        handle = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
        try:
            with open(handle, "wb", closefd=False) as file:
                # A disk that is full says so here; later it would end the process by a signal.
                file.write(bytes(2 * self._copy_bytes))
            self._map = mmap.mmap(handle, 2 * self._copy_bytes)
        finally:
            os.close(handle)
        self._write(())
        os.replace(temporary, path)

    def set(self, rows: Iterable[tuple[int, int]]) -> None:
        """These (shard number, ordinal) are in the engine now, and no others.

        Raises ValueError when they are more than there is room for.
        """
        now = frozenset(rows)
        if now == self._rows:
            return
        if len(now) > self._max_rows:
            raise ValueError(f"{len(now)} rows in flight, room for {self._max_rows}")
        self._write(sorted(now))
        self._rows = now

    def close(self) -> None:
        """Remove the file: nothing is in flight any more. May be called twice."""
        self._map.close()
        self.path.unlink(missing_ok=True)

    def _write(self, rows: Iterable[tuple[int, int]]) -> None:
        self._version += 1
        body = b"".join(_ROW.pack(*row) for row in rows)
        sizes = _HEAD.pack(_MAGIC, len(body) // _ROW.size, self._version, 0)
        checksum = zlib.crc32(body, zlib.crc32(sizes))
        head = _HEAD.pack(_MAGIC, len(body) // _ROW.size, self._version, checksum)
        place = self._version % 2 * self._copy_bytes
        self._map[place : place + len(head) + len(body)] = head + body


def read_flight(path: Path) -> tuple[tuple[int, int], ...] | None:
    """The (shard number, ordinal) of the rows in flight when the file was last written.

    None when nobody can tell: there is no file, or it is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    half = len(data) // 2
    copies = [copy for copy in (_parse(data[:half]), _parse(data[half:])) if copy is not None]
    return max(copies)[1] if copies else None


def _parse(data: bytes) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """The version and the rows of one copy; None for one that was cut off."""
    if len(data) < _HEAD.size:
        return None
    magic, num_rows, version, checksum = _HEAD.unpack_from(data)
    end = _HEAD.size + num_rows * _ROW.size
    if magic != _MAGIC or end > len(data):
        return None
    body = data[_HEAD.size : end]
    sizes = _HEAD.pack(_MAGIC, num_rows, version, 0)
    if zlib.crc32(body, zlib.crc32(sizes)) != checksum:
        return None
    return version, tuple(_ROW.iter_unpack(body))

"""What others do on this machine's CPUs meanwhile; a measurement means little without it."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE = (3, 4)
"""Columns of /proc/stat in which a CPU had nothing to do: idle, and waiting for a disk."""
_GUEST = slice(8, 10)
"""Counted in the columns before them already."""


def busy_seconds() -> float | None:
    """Seconds of CPU time spent since the start, all CPUs and everybody together; with what other
    virtual machines took from this one. None where the system does not tell."""
    try:
        ticks = [int(column) for column in _STAT.read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    idle = sum(ticks[column] for column in _IDLE)
    return (sum(ticks) - sum(ticks[_GUEST]) - idle) / os.sysconf("SC_CLK_TCK")


class CpuLoad:
    """How busy others keep the CPUs, from its making on. This process is not counted."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._own = time.process_time()
        self._busy = busy_seconds()

    def foreign_cores(self) -> float | None:
        """CPU cores that other processes kept busy on average; None where that is unknown."""
        busy = busy_seconds()
        if busy is None or self._busy is None:
            return None
        own = time.process_time() - self._own
        wall = time.perf_counter() - self._wall
        return max(0.0, (busy - self._busy - own) / wall) if wall else 0.0

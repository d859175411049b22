"""How full an engine is, and how near to what its device allows."""

from __future__ import annotations

from batchrun.data.traffic import traffic
from batchrun.engine.engine import Engine
from batchrun.metrics import (
    KV_PAGES_TOTAL,
    KV_PAGES_USED,
    ROOFLINE,
    ROWS_IN_FLIGHT,
    SLOTS_TOTAL,
    SLOTS_USED,
    Recorder,
)

_ROOFLINE_S = 5.0  # of steps: what a ratio is taken over


class Gauges:
    """Reads the gauges of a worker."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self._engine = engine
        self._recorder = recorder
        self._before = engine.stats()  # when the ratio was last taken

    def read(self, num_rows: int) -> None:
        """Record them; ``num_rows`` are in flight."""
        stats, before = self._engine.stats(), self._before
        self._recorder.set(ROWS_IN_FLIGHT, num_rows)
        self._recorder.set(SLOTS_USED, stats.slots_used)
        self._recorder.set(SLOTS_TOTAL, stats.slots_total)
        self._recorder.set(KV_PAGES_USED, stats.blocks_used)
        self._recorder.set(KV_PAGES_TOTAL, stats.blocks_total)
        if stats.least_seconds is not None:
            seconds = stats.step_seconds - before.step_seconds
            if seconds >= _ROOFLINE_S:
                least = stats.least_seconds - (before.least_seconds or 0.0)
                self._recorder.set(ROOFLINE, least / seconds)
                self._before = stats
        traffic().record(self._recorder)

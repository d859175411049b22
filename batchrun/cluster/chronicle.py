"""The history of a run as its driver sees it. Pure: the driver observes, and writes it.

Small whatever the run: it holds a bounded number of moments, and when it is full every second one
goes, so that its resolution halves each time the run has doubled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TypeVar

from batchrun.data.history import History, Moment, WorkerHistory, WorkerMoment

MAX_MOMENTS = 512
MAX_WORKERS = 64
"""Workers of which moments are kept; of further ones only the sums are known."""

_Point = TypeVar("_Point", Moment, WorkerMoment)


class Chronicle:
    """Collects a history while a run goes on. No I/O: the driver asks for it and writes it."""

    def __init__(self, epoch: int, version: str, host: str) -> None:
        self._start = History(epoch, time.time(), time.time(), version, host)
        self._moments: list[Moment] = []
        self._workers: dict[str, WorkerHistory] = {}
        self._points: dict[str, list[WorkerMoment]] = {}
        self._restarts: dict[str, int] = {}
        self._gap = 0.0

    def begin(self, worker: str, host: str, device: str) -> None:
        """A worker is ready."""
        self._workers[worker] = WorkerHistory(host=host, device=device)

    def lose(self, worker: str, cause: str) -> None:
        """A worker is gone."""
        self._restarts[cause] = self._restarts.get(cause, 0) + 1
        known = self._workers.get(worker, WorkerHistory())
        self._workers[worker] = WorkerHistory(known.host, known.device, lost=cause)

    def observe(
        self, moment: Moment, workers: Mapping[str, tuple[int, int, Mapping[str, float]]]
    ) -> None:
        """How the run is at a moment. ``workers`` have their tokens so far, their rows in flight
        and their seconds by state."""
        for name, (tokens, in_flight, seconds) in workers.items():
            known = self._workers.get(name, WorkerHistory())
            self._workers[name] = WorkerHistory(
                known.host, known.device, known.lost, tokens, dict(seconds)
            )
            if name in self._points or len(self._points) < MAX_WORKERS:
                points = self._points.setdefault(name, [])
                point = WorkerMoment(moment.at, tokens, 0 if known.lost else in_flight)
                _keep(points, point, self._gap)
        if _keep(self._moments, moment, self._gap):
            self._thin()

    def take(self, outcome: str = "", message: str = "", exit_code: int | None = None) -> History:
        """The history up to now."""
        return History(
            epoch=self._start.epoch,
            started_at=self._start.started_at,
            updated_at=time.time(),
            version=self._start.version,
            host=self._start.host,
            outcome=outcome,
            message=message,
            exit_code=exit_code,
            restarts=dict(self._restarts),
            moments=tuple(self._moments),
            workers={
                name: WorkerHistory(
                    worker.host,
                    worker.device,
                    worker.lost,
                    worker.tokens,
                    worker.seconds,
                    tuple(self._points.get(name, ())),
                )
                for name, worker in self._workers.items()
            },
        )

    def _thin(self) -> None:
        """Halve the resolution once there are too many moments."""
        if len(self._moments) <= MAX_MOMENTS:
            return
        del self._moments[1:-1:2]
        for points in self._points.values():
            del points[1:-1:2]
        first, last = self._moments[0].at, self._moments[-1].at
        self._gap = 0.75 * (last - first) / len(self._moments)


def _keep(points: list[_Point], point: _Point, gap: float) -> bool:
    """Append ``point``, or put it in the place of the last one while that is too close to the one
    before; whether it was appended."""
    if len(points) > 1 and points[-1].at - points[-2].at < gap:
        points[-1] = point
        return False
    points.append(point)
    return True

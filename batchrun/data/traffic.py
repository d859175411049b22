"""How many requests this process sends to object storage: a cap that gives way, and counts.

Whoever is told to slow down halves his rate at once and regains one request a second every ten
seconds, so that many processes that are throttled together find a rate that the service bears.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

from batchrun.metrics import STORAGE_REQUESTS, Recorder

_MAX_RATE = 500.0  # requests a second; S3 itself bears some thousands on a prefix
_MIN_RATE = 1.0
_GAIN = 0.1  # requests a second, each second
_CUT_EVERY_S = 1.0  # answers to requests that were under way already are the same news


class Op(StrEnum):
    """What a request asks for."""

    GET = "get"
    PUT = "put"
    HEAD = "head"
    LIST = "list"
    COPY = "copy"
    DELETE = "delete"
    OTHER = "other"


class Outcome(StrEnum):
    """How a request ended. ``ok`` is every clear answer, "absent" and "exists" too."""

    OK = "ok"
    THROTTLED = "throttled"
    DENIED = "denied"
    FAILED = "failed"


class Pace:
    """A token bucket whose rate falls by half and rises by steps. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = _MAX_RATE
        self._tokens = _MAX_RATE
        self._seen = clock()
        self._cut = self._seen - _CUT_EVERY_S

    @property
    def rate(self) -> float:
        """Requests a second that are allowed now."""
        with self._lock:
            self._catch_up()
            return self._rate

    def take(self) -> float:
        """Take a place for one request; the seconds to wait before it may be sent."""
        with self._lock:
            self._catch_up()
            self._tokens -= 1
            return max(0.0, -self._tokens / self._rate)

    def slow_down(self) -> None:
        """The service said that it is too much."""
        with self._lock:
            self._catch_up()
            if self._seen - self._cut < _CUT_EVERY_S:
                return
            self._cut = self._seen
            self._rate = max(_MIN_RATE, self._rate / 2)
            self._tokens = min(self._tokens, 0.0)  # nothing saved up may go out at once

    def _catch_up(self) -> None:
        now = self._clock()
        passed = max(0.0, now - self._seen)
        self._seen = now
        self._tokens = min(self._rate, self._tokens + passed * self._rate)
        self._rate = min(_MAX_RATE, self._rate + passed * _GAIN)


class Traffic:
    """The requests of a process: a pace for each service, and counts of all. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paces: dict[str, Pace] = {}
        self._counts: Counter[tuple[Op, Outcome]] = Counter()

    def pace(self, endpoint: str) -> Pace:
        """The pace of requests to this service."""
        with self._lock:
            return self._paces.setdefault(endpoint, Pace())

    def count(self, op: Op, outcome: Outcome) -> None:
        """One more request was answered so."""
        with self._lock:
            self._counts[op, outcome] += 1

    def record(self, recorder: Recorder) -> None:
        """Hand what was counted since the last time to the metrics."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        for (op, outcome), count in counts.items():
            recorder.add(STORAGE_REQUESTS, count, op=op.value, outcome=outcome.value)


@functools.cache
def traffic() -> Traffic:
    """The traffic of this process."""
    return Traffic()

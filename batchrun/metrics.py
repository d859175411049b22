"""Every series of the Prometheus endpoint, declared once; counted in workers, served by the driver.

A worker records into its own :class:`Recorder` and sends what came since the last time as a
:class:`MetricsDelta` of plain values. The driver merges the deltas into :class:`RunMetrics` and
records its own series there. Labels come from fixed sets: no label ever holds a row, a path or a
text of the user.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from batchrun.errors import ClusterError
from batchrun.logs import printable

_log = logging.getLogger(__name__)


class Kind(StrEnum):
    """How the values of a series come together."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Series:
    """One series: its name, what it means, and the values that its labels may take.

    ``labels`` are the series' own; ``job``, ``run`` and, for ``per_worker``, ``worker`` come on
    top. A counter and a series without labels is there from the start, at 0.
    """

    name: str
    kind: Kind
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    per_worker: bool = False
    buckets: tuple[float, ...] = ()


ROWS = Series(
    "batchrun_rows_total",
    Kind.COUNTER,
    "Input rows that are finished.",
    {"status": ("done", "failed")},
)
TOKENS = Series(
    "batchrun_tokens_total",
    Kind.COUNTER,
    "Tokens of finished rows; those of prompts are computed (prompt) or not (prefix_cached).",
    {"kind": ("prompt", "prefix_cached", "reasoning", "completion")},
    per_worker=True,
)
ROWS_IN_FLIGHT = Series(
    "batchrun_rows_in_flight", Kind.GAUGE, "Rows that a worker's engine holds.", per_worker=True
)
ROWS_LEFT = Series("batchrun_rows_left", Kind.GAUGE, "Rows of the plan that are not finished.")
WORKERS = Series(
    "batchrun_workers",
    Kind.GAUGE,
    "Workers by what they are doing.",
    {"state": ("starting", "ready", "draining")},
)
STEP_SECONDS = Series(
    "batchrun_engine_step_seconds",
    Kind.HISTOGRAM,
    "Time of one engine step.",
    per_worker=True,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
ROW_SECONDS = Series(
    "batchrun_row_seconds",
    Kind.HISTOGRAM,
    "Time from a row's admission to its last token.",
    per_worker=True,
    buckets=(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0),
)
SLOTS_USED = Series(
    "batchrun_state_slots_used", Kind.GAUGE, "SSM state slots in use.", per_worker=True
)
SLOTS_TOTAL = Series("batchrun_state_slots_total", Kind.GAUGE, "SSM state slots.", per_worker=True)
KV_PAGES_USED = Series("batchrun_kv_pages_used", Kind.GAUGE, "KV blocks in use.", per_worker=True)
KV_PAGES_TOTAL = Series("batchrun_kv_pages_total", Kind.GAUGE, "KV blocks.", per_worker=True)
BUDGET_HITS = Series(
    "batchrun_thinking_budget_hits_total",
    Kind.COUNTER,
    "Samples whose reasoning was ended by force.",
    per_worker=True,
)
RESTARTS = Series(
    "batchrun_worker_restarts_total",
    Kind.COUNTER,
    "Workers that were replaced.",
    {"cause": ("died", "hung", "node_lost", "load_failed", "preempted")},
)
TOKENS_DISCARDED = Series(
    "batchrun_tokens_discarded_total",
    Kind.COUNTER,
    "Generated tokens that were lost with a worker and generated again.",
)
CHECKPOINT_SECONDS = Series(
    "batchrun_checkpoint_seconds",
    Kind.HISTOGRAM,
    "Time of one write to the journal.",
    per_worker=True,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
STORAGE_REQUESTS = Series(
    "batchrun_storage_requests_total",
    Kind.COUNTER,
    "Requests to object storage; ok is every clear answer, also that nothing is there.",
    {
        "op": ("get", "put", "head", "list", "copy", "delete", "other"),
        "outcome": ("ok", "throttled", "denied", "failed"),
    },
    per_worker=True,
)
WORKER_SECONDS = Series(
    "batchrun_worker_state_seconds_total",
    Kind.COUNTER,
    "What the workers' time was spent on.",
    {"state": ("provision", "load", "compile", "generate", "starved", "drain")},
    per_worker=True,
)
ROOFLINE = Series(
    "batchrun_roofline_ratio",
    Kind.GAUGE,
    "How near the engine's steps are to the least time that the device's bandwidth and arithmetic "
    "allow, over the last seconds. Absent where that says nothing: on GPUs whose rates are not "
    "known, and for a model on a CPU that fits into its caches.",
    per_worker=True,
)
ETA = Series("batchrun_eta_seconds", Kind.GAUGE, "Estimated time to the end of the run.")
LAST_PROGRESS = Series(
    "batchrun_last_progress_timestamp_seconds",
    Kind.GAUGE,
    "Unix time at which a row last finished.",
)

ALL_SERIES = (
    ROWS,
    TOKENS,
    ROWS_IN_FLIGHT,
    ROWS_LEFT,
    WORKERS,
    STEP_SECONDS,
    ROW_SECONDS,
    SLOTS_USED,
    SLOTS_TOTAL,
    KV_PAGES_USED,
    KV_PAGES_TOTAL,
    BUDGET_HITS,
    RESTARTS,
    TOKENS_DISCARDED,
    CHECKPOINT_SECONDS,
    STORAGE_REQUESTS,
    WORKER_SECONDS,
    ROOFLINE,
    ETA,
    LAST_PROGRESS,
)
"""Every series, once."""

_BY_NAME = {series.name: series for series in ALL_SERIES}

# Values of the series' own labels, in the order of their declaration.
LabelValues = tuple[str, ...]
Key = tuple[str, LabelValues]
_Place = tuple[LabelValues, str]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by bucket: ``counts`` has one more than the series' buckets, for the rest."""

    counts: tuple[int, ...]
    sum: float

    def __add__(self, other: Histogram) -> Histogram:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(counts, self.sum + other.sum)


@dataclass(frozen=True, slots=True)
class MetricsDelta:
    """What was recorded since the last time: plain values, small enough for every message.

    Keys are the name of a series and the values of its labels. Counters and histograms add up,
    a gauge's last value counts.
    """

    counters: Mapping[Key, float] = field(default_factory=dict)
    gauges: Mapping[Key, float] = field(default_factory=dict)
    histograms: Mapping[Key, Histogram] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of the endpoint, with the name and the labels that it has there.

    The parts of a histogram (``_bucket``, ``_sum``, ``_count``) are of kind histogram.
    """

    name: str
    kind: Kind
    help: str
    labels: dict[str, str]
    value: float


class Recorder:
    """Counts in one thread. ``take`` gives what came since the last ``take``."""

    def __init__(self) -> None:
        self._counters: dict[Key, float] = {}
        self._gauges: dict[Key, float] = {}
        self._histograms: dict[Key, Histogram] = {}

    def add(self, series: Series, amount: float = 1, **labels: str) -> None:
        """Count ``amount`` (not negative) more."""
        key = _key(series, Kind.COUNTER, labels)
        if amount < 0:
            raise ValueError(f"{series.name}: a counter cannot go down by {amount}")
        self._counters[key] = self._counters.get(key, 0) + amount

    def set(self, series: Series, value: float, **labels: str) -> None:
        """The gauge is ``value`` now."""
        self._gauges[_key(series, Kind.GAUGE, labels)] = value

    def observe(self, series: Series, value: float, **labels: str) -> None:
        """One more observation."""
        key = _key(series, Kind.HISTOGRAM, labels)
        counts = [0] * (len(series.buckets) + 1)
        counts[bisect_left(series.buckets, value)] = 1
        one = Histogram(tuple(counts), value)
        earlier = self._histograms.get(key)
        self._histograms[key] = one if earlier is None else earlier + one

    def take(self) -> MetricsDelta:
        """Everything since the last time; the next delta begins empty."""
        delta = MetricsDelta(self._counters, self._gauges, self._histograms)
        self._counters, self._gauges, self._histograms = {}, {}, {}
        return delta


class RunMetrics(Collector):
    """All numbers of a run, and the endpoint that serves them. Safe to use from several threads."""

    def __init__(self, job: str, run: str) -> None:
        self._labels = (job, run)
        self._lock = threading.Lock()
        # By the name of the series, then by its labels' values and the worker.
        self._numbers: dict[str, dict[_Place, float]] = {}
        self._histograms: dict[str, dict[_Place, Histogram]] = {}
        self._server: WSGIServer | None = None
        for series in ALL_SERIES:
            self._numbers[series.name] = {}
            self._histograms[series.name] = {}
            starts_at_zero = series.kind is Kind.COUNTER or series.labels
            if starts_at_zero and not series.per_worker:
                for values in itertools.product(*series.labels.values()):
                    self._numbers[series.name][(values, "")] = 0.0

    def add(self, series: Series, amount: float = 1, *, worker: str = "", **labels: str) -> None:
        """Count ``amount`` more, from the driver; ``worker`` only for a series per worker."""
        recorder = Recorder()
        recorder.add(series, amount, **labels)
        self.merge(worker, recorder.take())

    def set(self, series: Series, value: float, *, worker: str = "", **labels: str) -> None:
        """The gauge is ``value`` now, says the driver."""
        recorder = Recorder()
        recorder.set(series, value, **labels)
        self.merge(worker, recorder.take())

    def merge(self, worker: str, delta: MetricsDelta) -> None:
        """Take in what ``worker`` recorded since its last delta."""
        with self._lock:
            for key, amount in delta.counters.items():
                numbers, place = self._numbers[key[0]], _place(key, worker)
                numbers[place] = numbers.get(place, 0) + amount
            for key, value in delta.gauges.items():
                self._numbers[key[0]][_place(key, worker)] = value
            for key, histogram in delta.histograms.items():
                histograms, place = self._histograms[key[0]], _place(key, worker)
                earlier = histograms.get(place)
                histograms[place] = histogram if earlier is None else earlier + histogram

    def forget_worker(self, worker: str) -> None:
        """A worker is gone: its gauges end, what it counted stays."""
        with self._lock:
            for series in ALL_SERIES:
                if series.per_worker and series.kind is Kind.GAUGE:
                    numbers = self._numbers[series.name]
                    for place in [place for place in numbers if place[1] == worker]:
                        del numbers[place]

    def value(self, series: Series, **labels: str) -> float:
        """The present value, summed over workers. For a histogram: how many observations."""
        values = _key(series, series.kind, labels)[1]
        with self._lock:
            if series.kind is Kind.HISTOGRAM:
                of_series = self._histograms[series.name].items()
                return sum(sum(h.counts) for place, h in of_series if place[0] == values)
            numbers = self._numbers[series.name].items()
            return sum(number for place, number in numbers if place[0] == values)

    def by_worker(
        self, *wanted: Series
    ) -> Iterator[tuple[str, dict[str, dict[LabelValues, float]]]]:
        """For each worker that counted one of these series: the numbers by series and labels."""
        found: dict[str, dict[str, dict[LabelValues, float]]] = {}
        with self._lock:
            for series in wanted:
                for (values, worker), number in self._numbers[series.name].items():
                    numbers = found.setdefault(worker, {item.name: {} for item in wanted})
                    numbers[series.name][values] = number
        return iter(found.items())

    def collect(self) -> Iterator[Metric]:
        """The families of all series, for ``prometheus_client``."""
        with self._lock:
            families = [self._family(series) for series in ALL_SERIES]
        return iter(families)

    def samples(self) -> Iterator[Sample]:
        """Every number that the endpoint would show now."""
        for family in self.collect():
            kind = Kind(family.type)
            for sample in family.samples:
                yield Sample(sample.name, kind, family.documentation, sample.labels, sample.value)

    def serve(self, host: str, port: int) -> int:
        """Serve ``/metrics`` from a thread; the port that is bound, which is another one with a
        warning when ``port`` is taken, and any free one for 0.

        Raises:
            ClusterError: ``host`` is no address of this machine.
        """
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ClusterError(
                    f"metrics.host: cannot listen on {printable(host)}: {error.strerror}",
                    "write an address of this machine such as 127.0.0.1, or metrics.port: null",
                ) from error
            self._server, _ = start_http_server(0, host, registry)
            _log.warning(
                "metrics.port %d cannot be used (%s); serving on port %d instead",
                port,
                error.strerror,
                self._server.server_port,
            )
        return self._server.server_port

    def close(self) -> None:
        """Stop serving. Does nothing when nothing is served."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _family(self, series: Series) -> Metric:
        names = ["job", "run", *series.labels, *(["worker"] if series.per_worker else [])]
        numbers = sorted(self._numbers[series.name].items())

        def labels(place: _Place) -> list[str]:
            return [*self._labels, *place[0], *([place[1]] if series.per_worker else [])]

        match series.kind:
            case Kind.COUNTER:
                counter = CounterMetricFamily(series.name, series.help, labels=names)
                for place, number in numbers:
                    counter.add_metric(labels(place), number)
                return counter
            case Kind.GAUGE:
                gauge = GaugeMetricFamily(series.name, series.help, labels=names)
                for place, number in numbers:
                    gauge.add_metric(labels(place), number)
                return gauge
            case Kind.HISTOGRAM:
                family = HistogramMetricFamily(series.name, series.help, labels=names)
                for place, histogram in sorted(self._histograms[series.name].items()):
                    bounds = [f"{bound:g}" for bound in series.buckets] + ["+Inf"]
                    totals = itertools.accumulate(histogram.counts)
                    buckets = list(zip(bounds, totals, strict=True))
                    family.add_metric(labels(place), buckets, histogram.sum)
                return family


def _key(series: Series, kind: Kind, labels: Mapping[str, str]) -> Key:
    if series.kind is not kind:
        raise TypeError(f"{series.name} is a {series.kind}, not a {kind}")
    if labels.keys() != series.labels.keys():
        raise TypeError(f"{series.name} has the labels {list(series.labels)}, not {list(labels)}")
    return series.name, tuple(labels[name] for name in series.labels)


def _place(key: Key, worker: str) -> _Place:
    return key[1], worker if _BY_NAME[key[0]].per_worker else ""

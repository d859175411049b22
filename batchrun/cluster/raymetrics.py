"""A run's series on Ray's own metrics, so that Prometheus and Grafana as Ray sets them up show the
run beside Ray's panels. Ray puts ``ray_`` before every name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import Metric
from ray.util import metrics as ray_metrics

from batchrun.metrics import RunMetrics

_Place = tuple[str, tuple[tuple[str, str], ...]]


class RayMetrics:
    """Mirrors :class:`~batchrun.metrics.RunMetrics` into Ray, from the driver's process.

    Counters are Ray counters. A histogram becomes three gauges with the names that Prometheus
    gives its parts (``_bucket`` with ``le``, ``_sum``, ``_count``), as Ray's own histograms take
    single observations only and guess their sums; ``rate`` and ``histogram_quantile`` work on
    them all the same. What is gone, a gauge of a lost worker, is set to 0: Ray cannot take a
    series back.
    """

    def __init__(self, metrics: RunMetrics) -> None:
        self._metrics = metrics
        self._made: dict[str, Any] = {}
        self._counted: dict[_Place, float] = {}
        self._gauged: set[_Place] = set()

    def update(self) -> None:
        """Bring Ray's numbers up to date."""
        seen: set[_Place] = set()
        for family in self._metrics.collect():
            for name, labels, value in _samples(family):
                place = (name, tuple(labels.items()))
                if family.type == "counter":
                    new = value - self._counted.get(place, 0.0)
                    self._counted[place] = value
                    counter = self._metric(ray_metrics.Counter, name, family, labels)
                    if new > 0:
                        counter.inc(new, tags=labels)
                else:
                    seen.add(place)
                    self._metric(ray_metrics.Gauge, name, family, labels).set(value, tags=labels)
        for name, pairs in self._gauged - seen:
            self._made[name].set(0.0, tags=dict(pairs))
        self._gauged = seen

    def _metric(self, kind: Any, name: str, family: Metric, labels: dict[str, str]) -> Any:
        if name not in self._made:
            self._made[name] = kind(name, description=family.documentation, tag_keys=tuple(labels))
        return self._made[name]


def _samples(family: Metric) -> Iterator[tuple[str, dict[str, str], float]]:
    """The numbers of a family: full names, labels, values."""
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            yield sample.name, sample.labels, sample.value

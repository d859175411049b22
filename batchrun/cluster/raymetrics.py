"""A run's series on Ray's own metrics, so that Prometheus and Grafana as Ray sets them up show the
run beside Ray's panels. Ray puts ``ray_`` before every name."""

from __future__ import annotations

from typing import Any

from ray.util import metrics as ray_metrics

from batchrun.metrics import Kind, RunMetrics, Sample

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
        for sample in self._metrics.samples():
            place = (sample.name, tuple(sample.labels.items()))
            if sample.kind is Kind.COUNTER:
                counter = self._metric(ray_metrics.Counter, sample)
                new = sample.value - self._counted.get(place, 0.0)
                self._counted[place] = sample.value
                if new > 0:
                    counter.inc(new, tags=sample.labels)
            else:
                seen.add(place)
                self._metric(ray_metrics.Gauge, sample).set(sample.value, tags=sample.labels)
        for name, labels in self._gauged - seen:
            self._made[name].set(0.0, tags=dict(labels))
        self._gauged = seen

    def _metric(self, kind: Any, sample: Sample) -> Any:
        if sample.name not in self._made:
            self._made[sample.name] = kind(
                sample.name, description=sample.help, tag_keys=tuple(sample.labels)
            )
        return self._made[sample.name]

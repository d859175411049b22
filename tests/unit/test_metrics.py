"""The Prometheus endpoint: what workers count arrives, adds up, and is what a scrape shows."""

from __future__ import annotations

import json
import logging
import pickle
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from batchrun import metrics
from batchrun.errors import ClusterError
from batchrun.metrics import ALL_SERIES, Kind, MetricsDelta, Recorder, RunMetrics


@pytest.fixture
def run() -> Iterator[RunMetrics]:
    """The metrics of a run, closed afterwards."""
    run = RunMetrics(job="demo", run="0a1b")
    yield run
    run.close()


def scrape(port: int, accept: str = "text/plain") -> str:
    """What the endpoint answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        body: bytes = answer.read()
    return body.decode()


def samples(text: str) -> dict[tuple[str, str], float]:
    """Value by name and by the labels other than job and run, which must be right."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("job"), labels.pop("run")) == ("demo", "0a1b")
            found[sample.name, ",".join(f"{k}={v}" for k, v in sorted(labels.items()))] = (
                sample.value
            )
    return found


def test_every_series_is_declared_once_with_a_fitting_name() -> None:
    """Names are unique, begin with batchrun_, and end by kind and unit as Prometheus wants it."""
    names = [series.name for series in ALL_SERIES]
    assert len(names) == len(set(names))
    for series in ALL_SERIES:
        assert series.name.startswith("batchrun_")
        assert series.help.endswith(".")
        assert (series.kind is Kind.HISTOGRAM) == bool(series.buckets), series.name
        assert list(series.buckets) == sorted(series.buckets)
        if series.kind is Kind.COUNTER:
            assert series.name.endswith("_total")
        for label in series.labels:
            assert label not in ("row", "path", "shard", "id")
    declared = [name for name in dir(metrics) if isinstance(getattr(metrics, name), metrics.Series)]
    assert len(declared) == len(ALL_SERIES)


def test_deltas_of_workers_add_up(run: RunMetrics) -> None:
    """Counters and histograms of all deltas add, the last value of a gauge counts."""
    for worker, tokens, seconds in (("w0", 5, 0.02), ("w1", 7, 3.0), ("w0", 1, 0.025)):
        recorder = Recorder()
        recorder.add(metrics.TOKENS, tokens, kind="reasoning")
        recorder.add(metrics.ROWS, status="done")
        recorder.observe(metrics.STEP_SECONDS, seconds)
        recorder.set(metrics.SLOTS_USED, tokens)
        run.merge(worker, recorder.take())
    assert run.value(metrics.TOKENS, kind="reasoning") == 13
    assert run.value(metrics.ROWS, status="done") == 3
    assert run.value(metrics.STEP_SECONDS) == 3
    found = samples(scrape(run.serve("127.0.0.1", 0)))
    assert found["batchrun_rows_total", "status=done"] == 3
    assert found["batchrun_rows_total", "status=failed"] == 0
    assert found["batchrun_tokens_total", "kind=reasoning,worker=w0"] == 6
    assert found["batchrun_tokens_total", "kind=reasoning,worker=w1"] == 7
    assert found["batchrun_state_slots_used", "worker=w0"] == 1
    # 0.025 is a bound and belongs to its bucket; buckets are cumulative.
    name = "batchrun_engine_step_seconds_bucket"
    assert found[name, "le=0.01,worker=w0"] == 0
    assert found[name, "le=0.025,worker=w0"] == 2
    assert found[name, "le=+Inf,worker=w0"] == 2
    assert found[name, "le=2.5,worker=w1"] == 0
    assert found["batchrun_engine_step_seconds_count", "worker=w1"] == 1
    assert found["batchrun_engine_step_seconds_sum", "worker=w0"] == pytest.approx(0.045)


def test_a_delta_is_taken_once_and_travels() -> None:
    """What was taken does not come again, and a delta is plain values that pickle as they are."""
    recorder = Recorder()
    recorder.add(metrics.BUDGET_HITS)
    recorder.observe(metrics.ROW_SECONDS, 1.5)
    delta = recorder.take()
    assert recorder.take() == MetricsDelta()
    assert pickle.loads(pickle.dumps(delta)) == delta


def test_the_driver_counts_too(run: RunMetrics) -> None:
    """Series of the driver carry no worker, or the worker that they are about."""
    run.set(metrics.ROWS_LEFT, 42)
    run.set(metrics.WORKERS, 2, state="ready")
    run.add(metrics.RESTARTS, cause="died")
    run.add(metrics.WORKER_SECONDS, 1.5, worker="w3", state="load")
    found = samples(scrape(run.serve("127.0.0.1", 0)))
    assert found["batchrun_rows_left", ""] == 42
    assert found["batchrun_workers", "state=ready"] == 2
    assert found["batchrun_worker_restarts_total", "cause=died"] == 1
    assert found["batchrun_worker_state_seconds_total", "state=load,worker=w3"] == 1.5


def test_gauges_end_with_their_worker(run: RunMetrics) -> None:
    """A worker that is gone uses no slots any more; what it counted stays counted."""
    recorder = Recorder()
    recorder.set(metrics.SLOTS_USED, 4)
    recorder.add(metrics.TOKENS, 9, kind="prompt")
    run.merge("w0", recorder.take())
    run.forget_worker("w0")
    found = samples(scrape(run.serve("127.0.0.1", 0)))
    assert not any(name == "batchrun_state_slots_used" for name, _ in found)
    assert found["batchrun_tokens_total", "kind=prompt,worker=w0"] == 9


def test_openmetrics_is_valid_too(run: RunMetrics) -> None:
    """A scraper that asks for OpenMetrics gets a document that its parser takes."""
    run.set(metrics.SLOTS_TOTAL, 4, worker="w0")
    text = scrape(run.serve("127.0.0.1", 0), "application/openmetrics-text; version=1.0.0")
    families = {family.name for family in parse_openmetrics(text)}
    assert len(families) == len(ALL_SERIES)
    assert "batchrun_state_slots_total" in families


def test_misuse_is_found_at_once() -> None:
    """A series of another kind, missing labels and falling counters are programming errors."""
    recorder = Recorder()
    with pytest.raises(TypeError, match="is a gauge, not a counter"):
        recorder.add(metrics.ROWS_LEFT)
    with pytest.raises(TypeError, match=r"has the labels \['status'\]"):
        recorder.add(metrics.ROWS)
    with pytest.raises(ValueError, match="cannot go down"):
        recorder.add(metrics.ROWS, -1, status="done")
    assert recorder.take() == MetricsDelta()


def test_a_taken_port_is_replaced(
    run: RunMetrics, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics never stop a run: with its port taken it serves on a free one, and says so."""
    port = run.serve("127.0.0.1", 0)
    other = RunMetrics(job="demo", run="0a1b")
    monkeypatch.setattr(logging.getLogger("batchrun"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="batchrun"):
        free = other.serve("127.0.0.1", port)
    try:
        assert free != port
        assert samples(scrape(free))["batchrun_rows_total", "status=done"] == 0
        assert f"metrics.port {port} cannot be used" in caplog.text
        assert f"port {free} instead" in caplog.text
    finally:
        other.close()


def test_an_address_of_another_machine_is_refused(run: RunMetrics) -> None:
    """A host that this machine does not have is said so, with the key to mend."""
    with pytest.raises(ClusterError) as caught:
        run.serve("203.0.113.5", 0)
    assert str(caught.value).startswith("metrics.host: cannot listen on 203.0.113.5: ")


def test_close_frees_the_port(run: RunMetrics) -> None:
    """After the run nothing answers, and the port can be used again."""
    port = run.serve("127.0.0.1", 0)
    run.close()
    run.close()
    again = RunMetrics(job="demo", run="0a1b")
    assert again.serve("127.0.0.1", port) == port
    again.close()
    with pytest.raises(OSError):
        scrape(port)


def test_a_delta_stays_small() -> None:
    """A worker's whole delta fits in a message of a few kilobytes."""
    recorder = Recorder()
    for series in ALL_SERIES:
        labels = {name: values[0] for name, values in series.labels.items()}
        match series.kind:
            case Kind.COUNTER:
                recorder.add(series, 1e9, **labels)
            case Kind.GAUGE:
                recorder.set(series, 1e9, **labels)
            case Kind.HISTOGRAM:
                for bound in series.buckets:
                    recorder.observe(series, bound, **labels)
    delta = recorder.take()
    size = len(pickle.dumps(delta))
    assert size < 4096, json.dumps(size)

"""Requests give way when the service asks for it, and each is counted once."""

from __future__ import annotations

import pytest

from batchrun.data.traffic import Op, Outcome, Pace, Traffic
from batchrun.metrics import Recorder


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_quiet_process_never_waits() -> None:
    """What a worker sends in a second is far below the cap."""
    clock = Clock()
    pace = Pace(clock)
    for _ in range(100):
        assert [pace.take() for _ in range(20)] == [0.0] * 20
        clock.now += 1


def test_a_burst_is_spread() -> None:
    """Beyond what is saved up, requests go out at the rate."""
    pace = Pace(Clock())
    waits = [pace.take() for _ in range(1500)]
    assert waits[:500] == [0.0] * 500
    assert waits[-1] == pytest.approx(2.0)


def test_the_rate_halves_once_a_second_and_comes_back_slowly() -> None:
    """Many refusals of one moment are one sign; a request a second is regained every ten."""
    clock = Clock()
    pace = Pace(clock)
    for _ in range(30):
        pace.slow_down()
    assert pace.rate == pytest.approx(250)
    assert pace.take() > 0, "what was saved up is gone"
    clock.now += 1
    pace.slow_down()
    assert pace.rate == pytest.approx(125, abs=0.2)
    clock.now += 100
    assert pace.rate == pytest.approx(135, abs=0.2)
    for _ in range(50):
        clock.now += 1
        pace.slow_down()
    assert 1.0 <= pace.rate < 1.5
    clock.now += 10_000
    assert pace.rate == 500


def test_services_have_a_pace_each_and_counts_are_handed_over_once() -> None:
    """One that is slow does not hold up another; the metrics get what is new."""
    traffic = Traffic()
    assert traffic.pace("http://a") is traffic.pace("http://a") is not traffic.pace("http://b")
    for outcome in (Outcome.OK, Outcome.OK, Outcome.THROTTLED):
        traffic.count(Op.PUT, outcome)
    recorder = Recorder()
    traffic.record(recorder)
    traffic.record(recorder)
    name = "batchrun_storage_requests_total"
    assert recorder.take().counters == {
        (name, ("put", "ok")): 2,
        (name, ("put", "throttled")): 1,
    }
    assert {op.value for op in Op} >= {"get", "put", "head", "list", "copy", "delete"}

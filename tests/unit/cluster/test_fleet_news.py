"""News of workers that were ended meanwhile."""

from __future__ import annotations

import pytest

from batchrun.cluster.fleet import Fleet, _Member
from batchrun.reports import WorkReport


def test_a_worker_that_is_ended_for_the_news_before_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two calls come back together; the news of the first ends the run and all workers."""
    monkeypatch.setattr("batchrun.cluster.fleet.ray.wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr("batchrun.cluster.fleet.ray.get", lambda _: WorkReport())
    fleet = Fleet.__new__(Fleet)
    fleet._clock = lambda: 0.0
    fleet._asked_draining_at = 0.0
    fleet._hang_timeout_s = 100.0
    fleet._members = {
        name: _Member(None, 0.0, call=f"call of {name}") for name in ("first", "second")
    }
    seen = []
    for news in fleet.wait(0.0):
        seen.append(news.worker)
        fleet._members.clear()
    assert seen == ["first"]

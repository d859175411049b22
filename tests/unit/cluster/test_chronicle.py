"""The history of a run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from batchrun.cluster.chronicle import MAX_MOMENTS, MAX_WORKERS, Chronicle
from batchrun.data.history import History, Moment, read_histories, write_history
from batchrun.data.store import Store


def observed(num_moments: int, num_workers: int = 1, gap_s: float = 3.0) -> History:
    """A submit whose workers make 10 tokens a second each."""
    chronicle = Chronicle(1, "0", "here")
    for number in range(num_workers):
        chronicle.begin(f"1-{number}", f"host-{number}", "")
    for step in range(num_moments):
        at = step * gap_s
        tokens = int(10 * at)
        workers = {f"1-{n}": (tokens, 4, {"generate": at}) for n in range(num_workers)}
        moment = Moment(at, rows=step, sampled_tokens=tokens * num_workers, workers=num_workers)
        chronicle.observe(moment, workers)
    return chronicle.take("success", "done", 0)


@pytest.mark.parametrize("num_moments", [1, 2, MAX_MOMENTS, MAX_MOMENTS + 1, 5000, 60_000])
def test_a_history_stays_small_and_covers_the_whole_run(num_moments: int) -> None:
    """However long a run is, a few hundred moments tell of it: the first, the last, and evenly
    what was between."""
    history = observed(num_moments)
    assert len(history.moments) <= MAX_MOMENTS
    times = [moment.at for moment in history.moments]
    assert sorted(set(times)) == times
    assert (0.0, 3.0 * (num_moments - 1)) == (times[0], times[-1])
    if num_moments > MAX_MOMENTS:
        assert len(times) > MAX_MOMENTS / 3
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert max(gaps) <= 4 * sorted(gaps)[len(gaps) // 2]
    (worker,) = history.workers.values()
    assert len(worker.moments) <= MAX_MOMENTS + 1
    assert worker.moments[-1].tokens == worker.tokens == 30 * (num_moments - 1)


def test_sums_are_kept_of_every_worker_and_moments_of_some() -> None:
    """With a thousand workers a history is no larger than it must be, and its sums are right."""
    history = observed(20, num_workers=1000)
    assert MAX_WORKERS == sum(bool(worker.moments) for worker in history.workers.values())
    assert {"generate": pytest.approx(1000 * 57.0)} == history.seconds
    assert {570} == {worker.tokens for worker in history.workers.values()}
    assert "host-999" == history.workers["1-999"].host


def test_a_lost_worker_keeps_its_sums() -> None:
    """What a worker's time went into is known when it is gone, and why it is gone."""
    chronicle = Chronicle(1, "0", "here")
    chronicle.begin("1-1", "a", "gpu")
    chronicle.observe(Moment(3), {"1-1": (30, 4, {"generate": 3.0})})
    chronicle.lose("1-1", "died")
    chronicle.observe(Moment(6), {"1-1": (30, 4, {"generate": 3.0})})
    history = chronicle.take()
    worker = history.workers["1-1"]
    assert ("a", "gpu", "died", 30, {"generate": 3.0}) == (
        worker.host,
        worker.device,
        worker.lost,
        worker.tokens,
        worker.seconds,
    )
    assert [4, 0] == [moment.in_flight for moment in worker.moments]
    assert {"died": 1} == history.restarts


def test_histories_are_read_as_they_were_written(tmp_path: Path) -> None:
    """All drivers of a run are there in their order; a damaged object costs only itself."""
    store = Store.open(str(tmp_path))
    first, second = observed(3), observed(5, num_workers=2)
    write_history(store, "run", first)
    write_history(store, "run", History(**{**_fields(second), "epoch": 12}))
    store.put("_batchrun/run/history/000003.json", b'{"epoch": 3, "mome')
    found = read_histories(store, "run")
    assert [1, 12] == [history.epoch for history in found]
    assert first == found[0]
    assert second.moments == found[1].moments and second.workers == found[1].workers
    assert () == read_histories(store, "another")


def _fields(history: History) -> dict[str, object]:
    return {name: getattr(history, name) for name in History.__dataclass_fields__}

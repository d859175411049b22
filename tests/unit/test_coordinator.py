"""The decisions of a run by example: workers, shards, the end."""

from __future__ import annotations

from batchrun.coordinator import (
    CancelLease,
    FailShard,
    FinishRun,
    LeaseDone,
    LeaseFailed,
    LeasesWanted,
    LossCause,
    OutcomeKind,
    RunStarted,
    StartLease,
    StartWorker,
    StopRequested,
    StopWorker,
    Tick,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
)
from tests.unit.coordinator_run import Run, ended, part, shard


def test_a_run_from_start_to_success() -> None:
    """A worker loads, gets shard after shard, and the last part ends the run."""
    run = Run(2)
    assert [StartWorker("3-1")] == run.last
    run.ready()
    assert run.held("3-1") == [0]
    run.done("3-1")
    assert run.held("3-1") == [1]
    run.done("3-1")
    assert ended(run) == (OutcomeKind.SUCCESS, 0)
    assert [StopWorker("3-1"), FinishRun(run.outcome)] == run.last  # type: ignore[arg-type]
    assert run.outcome is not None
    assert (run.outcome.counts.rows, run.outcome.message) == (20, "20 rows done")


def test_a_run_with_nothing_left_starts_no_worker() -> None:
    """A finished run, or an input without shards, is a success at once."""
    for run in (Run(2, done=2), Run(0)):
        assert ended(run) == (OutcomeKind.SUCCESS, 0)
        assert len(run.last) == 1


def test_finished_shards_are_not_run_again() -> None:
    """A resumed run does what is left."""
    run = Run(3, done=2)
    run.ready()
    assert run.held("3-1") == [2]


def test_no_more_workers_than_shards() -> None:
    """A GPU that would stand idle is not asked for."""
    assert len(Run(2, num_workers=8).workers) == 2
    assert len(Run(9, num_workers=8).workers) == 8


def test_rows_flow_across_shard_borders() -> None:
    """A worker with room gets its next lease before it has finished the one before."""
    run = Run(5)
    run.ready()
    run.handle(LeasesWanted("3-1", 2))
    assert run.held("3-1") == [0, 1, 2]
    run.handle(LeasesWanted("3-1", 0))
    run.done("3-1")
    assert run.held("3-1") == [1, 2]


def test_an_early_worker_does_not_take_everything() -> None:
    """A shard is kept for every worker that is still to come."""
    run = Run(4, num_workers=3)
    first, second, third = run.workers
    run.ready(first)
    run.handle(LeasesWanted(first, 9))
    assert run.held(first) == [0, 1]
    run.ready(second, third)
    assert (run.held(second), run.held(third)) == ([2], [3])


def test_an_idle_worker_takes_what_was_kept_for_one_that_never_comes() -> None:
    """Workers that cannot start do not hold the run up."""
    run = Run(2, num_workers=2)
    run.ready(run.workers[0])
    run.done(run.workers[0])
    run.done(run.workers[0])
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_what_a_lost_worker_held_goes_first_in_line_with_new_attempts() -> None:
    """In the old order, and the worker is replaced."""
    run = Run(6)
    run.ready()
    run.handle(LeasesWanted("3-1", 2))
    before = {lease.attempt for lease in run.leases["3-1"]}
    run.lost("3-1", cause=LossCause.NODE, node=False)
    assert [StartWorker("3-2")] == run.last
    run.ready("3-2")
    run.handle(LeasesWanted("3-2", 2))
    assert run.held("3-2") == [0, 1, 2]
    assert not before & {lease.attempt for lease in run.leases["3-2"]}


def test_attempts_are_unique_over_drivers() -> None:
    """The epoch stands in the attempt and in the lease."""
    run = Run(1)
    run.ready()
    assert [(lease.attempt, lease.epoch) for lease in run.leases["3-1"]] == [("000003-000001", 3)]


def test_nodes_that_die_blame_no_row() -> None:
    """However often machines are taken away, no shard is failed."""
    run = Run(1, max_retries=0)
    for number in range(1, 50):
        run.ready(f"3-{number}")
        assert run.held(f"3-{number}") == [0]
        run.lost(f"3-{number}", cause=LossCause.NODE, node=False)
    assert run.outcome is None


def test_a_worker_that_hangs_is_replaced() -> None:
    """The watchdog's loss counts as any other."""
    run = Run(1)
    run.ready()
    run.lost("3-1", cause=LossCause.HANG)
    run.ready("3-2")
    run.done("3-2")
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_an_unreadable_shard_is_failed_and_ends_in_failure() -> None:
    """Its neighbours are done; the run ends as failed whatever the tolerance."""
    run = Run(2, max_failed_rows=1000)
    run.ready()
    lease = run.leases["3-1"].pop(0)
    run.handle(LeaseFailed("3-1", lease.attempt, "damaged"))
    assert [
        FailShard(run.shards[0], "damaged"),
        StartLease("3-1", run.leases["3-1"][0]),
    ] == run.last
    run.done("3-1")
    assert ended(run) == (OutcomeKind.TOO_MANY_FAILURES, 10)
    assert run.outcome is not None and run.outcome.failed_shards == {0: "damaged"}


def test_failed_rows_within_tolerance_are_a_success() -> None:
    """A count, or a fraction of all rows; one more is too many."""
    for allowed, failed, kind in (
        (0, 0, OutcomeKind.SUCCESS),
        (0, 1, OutcomeKind.TOO_MANY_FAILURES),
        (2, 2, OutcomeKind.SUCCESS),
        (2, 3, OutcomeKind.TOO_MANY_FAILURES),
        (0.25, 5, OutcomeKind.SUCCESS),
        (0.25, 6, OutcomeKind.TOO_MANY_FAILURES),
    ):
        run = Run(2, max_failed_rows=allowed)
        run.ready()
        run.done("3-1", failed_rows=failed)
        run.done("3-1")
        assert (kind, failed) == ended(run)


def test_loads_that_fail_three_times_end_the_run_with_their_cause() -> None:
    """A model that cannot be loaded is not tried for ever."""
    run = Run(9, num_workers=1)
    run.lost("3-1", cause=LossCause.LOAD)
    run.lost("3-2", cause=LossCause.LOAD)
    assert run.outcome is None
    run.handle(WorkerLost("3-3", LossCause.LOAD, "no such file"))
    assert run.outcome is not None
    assert (run.outcome.kind, run.outcome.message) == (OutcomeKind.NO_WORKERS, "no such file")


def test_a_load_that_works_forgives_those_that_failed() -> None:
    """Only failures in a row count, and a machine that is taken away while loading does not."""
    run = Run(9)
    for _ in range(3):
        run.lost(run.workers[-1], cause=LossCause.LOAD)
        run.lost(run.workers[-1], cause=LossCause.NODE, node=False)
        run.lost(run.workers[-1], cause=LossCause.LOAD)
        run.ready(run.workers[-1])
        run.lost(run.workers[-1], cause=LossCause.NODE, node=False)
    assert run.outcome is None


def test_beside_workers_at_work_failing_loads_wait() -> None:
    """The run goes on with who is there, and tries again after a minute."""
    run = Run(9, num_workers=2)
    run.ready(run.workers[0])
    for _ in range(3):
        run.lost(run.workers[-1], cause=LossCause.LOAD)
    assert run.outcome is None and run.last == []
    assert run.handle(Tick(59)) == []
    assert [StartWorker("3-5")] == run.handle(Tick(61))


def test_a_draining_worker_gets_no_more_and_is_replaced() -> None:
    """What it holds it may still finish."""
    run = Run(3)
    run.ready()
    assert [StartWorker("3-2")] == run.handle(WorkerDraining("3-1"))
    run.done("3-1")
    assert run.held("3-1") == []
    run.ready("3-2")
    assert run.held("3-2") == [1]


def test_a_stop_ends_the_run_at_once() -> None:
    """Interrupted, with what is done; nothing happens after the end."""
    run = Run(3)
    run.ready()
    run.done("3-1")
    run.handle(StopRequested("SIGTERM"))
    assert run.outcome is not None
    assert (
        run.outcome.kind,
        run.outcome.message,
        run.outcome.counts.rows,
    ) == (OutcomeKind.INTERRUPTED, "SIGTERM", 10)
    assert run.handle(RunStarted(), Tick(1), WorkerReady("3-1"), StopRequested()) == []


def test_late_news_of_a_published_part_counts() -> None:
    """A worker given up too early had published: its shard is not run to the end again."""
    run = Run(2)
    run.ready()
    lease = run.leases["3-1"][0]
    run.lost("3-1", cause=LossCause.HANG)
    run.handle(LeaseDone("3-1", lease.attempt, part(run.shards[0])))
    run.ready("3-2")
    assert run.held("3-2") == [1]


def test_a_lease_whose_shard_is_done_is_cancelled() -> None:
    """Its worker was given what a zombie has published meanwhile: it goes on with the next."""
    run = Run(2)
    run.ready()
    late = run.leases["3-1"][0]
    run.lost("3-1", cause=LossCause.NODE, node=False)
    run.ready("3-2")
    second = run.leases["3-2"][0]
    run.handle(LeaseDone("3-1", late.attempt, part(run.shards[0])))
    assert run.last[0] == CancelLease("3-2", second.attempt)
    assert run.held("3-2") == [1]
    run.done("3-2")
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_a_shard_that_is_done_cannot_fail() -> None:
    """Its second attempt could not read it any more; the published part counts."""
    run = Run(2)
    run.ready()
    late = run.leases["3-1"][0]
    run.lost("3-1", cause=LossCause.NODE, node=False)
    run.ready("3-2")
    second = run.leases["3-2"].pop(0)
    run.handle(LeaseDone("3-1", late.attempt, part(run.shards[0])))
    run.handle(LeaseFailed("3-2", second.attempt, "gone"))
    assert run.held("3-2") == [1]
    run.done("3-2")
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_news_that_come_twice_or_from_strangers_change_nothing() -> None:
    """Facts may be repeated, late, or about what nobody knows."""
    run = Run(3)
    run.ready()
    lease = run.leases["3-1"][0]
    news = LeaseDone("3-1", lease.attempt, part(run.shards[0]))
    run.handle(news)
    for event in (
        news,
        LeaseFailed("3-1", lease.attempt, "late"),
        LeaseFailed("?", "?", "x"),
        LeaseDone("?", "?", part(shard(77))),
        WorkerReady("?"),
        WorkerDraining("?"),
        WorkerLost("?", LossCause.CRASH),
        LeasesWanted("?", 3),
    ):
        assert run.handle(event) == []
    assert ({0}, {}) == (set(run.state.done), run.state.failed)

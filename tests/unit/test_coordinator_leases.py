"""How a run is shared out: lease sizes, assembly, second tries, limits, the canary."""

from __future__ import annotations

import pytest

from batchrun.coordinator import (
    CancelLease,
    DrainRun,
    FailShard,
    FinishRun,
    LeaseDone,
    LeaseReturned,
    LeasesWanted,
    Limits,
    LossCause,
    OutcomeKind,
    StartLease,
    StartWorker,
    StopRequested,
    Tick,
    TokensSpent,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
)
from batchrun.records import Counts, Strike
from batchrun.rows import Rows
from tests.unit.coordinator_run import Run, ended, part, ranges


def test_one_worker_gets_whole_shards() -> None:
    """However big they are: there is nobody to share them with."""
    run = Run([10_000, 500])
    run.ready()
    run.handle(LeasesWanted("3-1", 1))
    assert [(lease.whole, len(lease.rows)) for lease in run.leases["3-1"]] == [
        (True, 10_000),
        (True, 500),
    ]


def test_many_shards_of_one_size_stay_whole() -> None:
    """While there are two and more for every worker, nothing is split."""
    run = Run([1000] * 11, num_workers=4)
    run.ready()
    assert [run.sizes(name) for name in run.workers] == [[1000]] * 4
    assert all(lease.whole for leases in run.leases.values() for lease in leases)


def test_a_big_shard_feeds_many_workers() -> None:
    """Each takes half of its fair share of what is left, in order, and no row twice."""
    run = Run([8000], num_workers=4)
    run.ready()
    assert [run.sizes(name) for name in run.workers] == [[1000], [875], [765], [670]]
    leases = [run.leases[name][0] for name in run.workers]
    assert not any(lease.whole for lease in leases)
    assert leases[0].rows == ranges((0, 1000)) and leases[1].rows == ranges((1000, 1875))


def test_a_huge_shard_among_many_small_ones_is_split() -> None:
    """What counts is its share of the rows, not how many shards there are."""
    run = Run([100_000] + [100] * 40, num_workers=4)
    run.ready(run.workers[0])
    assert run.sizes(run.workers[0]) == [104_000 // 8]


def test_leases_shrink_towards_the_end_but_keep_an_engine_full() -> None:
    """Never below what the worker can run at once; what would be left over goes with the last."""
    run = Run([1000], num_workers=2)
    run.ready(max_sequences=64)
    first, second = run.workers
    sizes = []
    while run.leases[first]:
        sizes.append(run.sizes(first)[0])
        run.done(first)
    assert sizes[0] == 250 and sizes[-1] < 96
    assert sizes == sorted(sizes, reverse=True) and min(sizes[:-1]) >= 64
    assert run.sizes(second) == [1000 - sum(sizes)]


def test_a_small_shard_is_not_split() -> None:
    """A piece that is not much smaller than the shard would only cost the journal."""
    run = Run([90, 90], num_workers=2)
    run.ready(max_sequences=64)
    assert [run.sizes(name) for name in run.workers] == [[90], [90]]
    run = Run([97], num_workers=2)
    run.ready(max_sequences=64)
    assert [run.sizes(name) for name in run.workers] == [[49], [48]]


@pytest.mark.parametrize("sizes", [[120], [10] * 12, [100, 20], [2000]])
def test_who_is_ready_first_leaves_work_for_the_others(sizes: list[int]) -> None:
    """However many rows an engine could run at once, a worker that comes a little later finds its
    fair share, or an engine-full of it; nothing waits for one that never comes."""
    run = Run(sizes, num_workers=2, min_workers=1)
    first, second = run.workers
    run.ready(first, max_sequences=128)
    for _ in range(3):
        run.handle(LeasesWanted(first, 3))
    left = run.state.backlog.num_rows
    assert sum(run.sizes(first)) + left == sum(sizes)
    assert 50 <= left and (left <= 70 or sum(run.sizes(first)) >= 128)
    run.handle(LeasesWanted(first, 0))
    run.ready(second, max_sequences=128)
    run.handle(LeasesWanted(second, 9))
    assert sum(run.sizes(second)) == left
    run = Run(sizes, num_workers=2, min_workers=1)
    run.ready(first, max_sequences=128)
    run.handle(Tick(16), LeasesWanted(first, 99))
    assert run.state.backlog.num_rows == 0
    while run.outcome is None:
        run.done(first)
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_a_split_shard_is_put_together_by_who_finished_last() -> None:
    """When all rows are in the journal the shard is leased whole, and its part ends the run."""
    run = Run([40], num_workers=2)
    run.ready()
    first, second = run.workers
    assert run.rows(first) == [(0, list(range(16)))]
    assert run.rows(second) == [(0, list(range(16, 40)))]
    run.done(first)
    assert run.leases[first] == []
    run.done(second)
    (assembly,) = run.leases[second]
    assert (assembly.whole, assembly.rows, assembly.lost) == (True, Rows.all(40), {})
    run.done(second)
    assert ended(run) == (OutcomeKind.SUCCESS, 0)
    assert run.outcome is not None and run.outcome.counts.rows == 40


def test_an_assembly_that_is_lost_is_given_to_another() -> None:
    """First in line; the rows stay in the journal."""
    run = Run([40, 1000], num_workers=2)
    run.ready()
    first = run.workers[0]
    while not any(lease.whole for lease in run.leases[first]):
        run.done(first)
    run.lost(first, cause=LossCause.NODE, node=False)
    run.ready(run.workers[-1])
    assert [(lease.shard.number, lease.whole) for lease in run.leases[run.workers[-1]]] == [
        (0, True)
    ]


def test_ranges_of_a_lost_node_go_first_in_line() -> None:
    """Retry first: the journal may have the most of them, and prefixes of the others."""
    run = Run([1000, 1000], num_workers=2)
    run.ready()
    first, second = run.workers
    lost = run.leases[first][0]
    run.lost(first, cause=LossCause.NODE, node=False)
    run.handle(LeasesWanted(second, 1))
    assert run.leases[second][-1].rows.ranges[0][0] == lost.rows.ranges[0][0] == 0


def test_a_whole_lease_that_brings_no_part_is_given_again() -> None:
    """Only a part ends a shard."""
    run = Run(1)
    run.ready()
    lease = run.leases["3-1"].pop(0)
    run.handle(LeaseDone("3-1", lease.attempt))
    assert run.held("3-1") == [0] and run.outcome is None


def test_late_news_of_a_range_do_not_count() -> None:
    """Its rows are in line again, and who gets them finds them in the journal."""
    run = Run([40], num_workers=2)
    run.ready()
    first, second = run.workers
    late = run.leases[first][0]
    run.lost(first, cause=LossCause.NODE, node=False)
    assert run.handle(LeaseDone(first, late.attempt, counts=Counts(rows=16))) == []
    run.done(second)
    assert run.rows(second) == [(0, list(range(16)))]


def test_a_late_part_ends_the_ranges_of_its_shard() -> None:
    """A zombie has published: whoever works on the shard stops, nobody else begins."""
    run = Run([40], num_workers=2)
    run.ready()
    attempts = [run.leases[name][0].attempt for name in run.workers]
    run.handle(LeaseDone("2-7", "000002-000001", part(run.shards[0])))
    cancels = [CancelLease(*pair) for pair in zip(run.workers, attempts, strict=True)]
    assert run.last[:2] == cancels
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


# -- drain -------------------------------------------------------------------------------------


def test_a_draining_worker_gives_back_what_it_cannot_finish() -> None:
    """It goes first in line for whoever has room, and nobody is blamed."""
    run = Run(4)
    run.ready()
    run.handle(LeasesWanted("3-1", 1))
    run.handle(WorkerDraining("3-1"))
    run.ready("3-2")
    assert run.held("3-2") == [2]
    run.give_back("3-1")
    run.handle(LeasesWanted("3-2", 1))
    assert run.held("3-2") == [2, 0]
    run.lost("3-1", (1, 3))
    run.handle(LeasesWanted("3-2", 2))
    assert run.held("3-2") == [2, 0, 1, 3]
    assert not any(lease.alone for lease in run.leases["3-2"])


def test_a_worker_that_drains_with_the_last_lease_is_replaced_at_once() -> None:
    """The next one loads while the lease is still being given back."""
    run = Run(1)
    run.ready()
    assert run.handle(WorkerDraining("3-1")) == [StartWorker("3-2")]


def test_a_lease_given_back_twice_is_in_line_once() -> None:
    """News may come twice."""
    run = Run(2)
    run.ready()
    attempt = run.leases["3-1"][0].attempt
    run.handle(WorkerDraining("3-1"))
    for _ in range(2):
        run.handle(LeaseReturned("3-1", attempt))
    assert list(run.state.backlog.queue) == [0, 1]
    assert run.state.backlog.num_rows == 20


# -- speculation -------------------------------------------------------------------------------


def test_of_a_shard_with_few_rows_to_run_only_those_count() -> None:
    """A retry of a few rows is leased whole, however big their shard; of many they are shared out,
    and no other row is ever leased before the part is put together."""
    run = Run([10_000, 50, 10_000], 2, done=2, todo={2: Rows.of([7, 8, 9000])})
    run.ready()
    (lease,) = run.leases[run.workers[0]]
    assert run.workers == ["3-1"], "three rows are no work for two"
    assert (lease.shard.number, lease.whole, lease.rows) == (2, True, Rows.all(10_000))
    todo = Rows.of_ranges([(0, 30), (500, 520), (900, 1000)])
    run = Run([1000], 2, todo={0: todo})
    run.ready()
    first, second = run.workers
    leased = Rows()
    while run.leases[first] and not run.leases[first][0].whole:
        leased |= run.leases[first][0].rows
        run.done(first)
    leased |= run.leases[second][0].rows
    assert leased == todo
    run.done(second)
    (assembly,) = [lease for name in run.workers for lease in run.leases[name]]
    assert assembly.whole and assembly.rows == Rows.all(1000)


def test_a_retry_survives_its_workers() -> None:
    """What a lost worker had of a shard with few rows to run is in line again, and nothing else:
    the row in flight is suspect, the other one waits."""
    run = Run([1000], 1, todo={0: Rows.of([7, 900])})
    run.ready()
    run.lost(run.workers[0], (0, 7))
    leased = []
    while not any(lease.whole for lease in run.leases[run.workers[-1]]):
        run.ready(run.workers[-1])
        (lease,) = run.leases[run.workers[-1]]
        leased.append((lease.alone, list(lease.rows)))
        run.done(run.workers[-1])
    assert sorted(leased) == [(False, [900]), (True, [7])]
    run.done(run.workers[-1])
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_idle_workers_try_the_oldest_lease_again_and_the_first_to_end_counts() -> None:
    """Once each, and not before its first journal."""
    run = Run(2, num_workers=2)
    run.ready()
    first, second = run.workers
    run.handle(Tick(100))
    slow = run.leases[first][0]
    run.done(second)
    (twin,) = run.leases[second]
    assert (twin.shard.number, twin.rows, twin.whole) == (0, slow.rows, True)
    assert twin.attempt != slow.attempt
    run.done(second)
    assert run.last[0] == CancelLease(first, slow.attempt)
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_a_young_lease_is_not_tried_again() -> None:
    """Until it has had time for a journal; then time alone is enough."""
    run = Run(2, num_workers=2, speculate_after_s=30)
    run.handle(Tick(0))
    run.ready()
    second = run.workers[1]
    run.done(second)
    assert run.leases[second] == []
    assert run.handle(Tick(29)) == []
    assert [type(command) for command in run.handle(Tick(30))] == [StartLease]


def test_the_age_of_a_lease_counts_from_the_start_of_the_run() -> None:
    """Not from the first tick: workers that are loaded already are ready before that."""
    run = Run(2, num_workers=2, speculate_after_s=30, now=5000)
    run.ready()
    run.done(run.workers[1])
    assert run.handle(Tick(5029)) == []
    assert [type(command) for command in run.handle(Tick(5030))] == [StartLease]


def test_a_lease_is_tried_again_only_once() -> None:
    """A third worker stays idle, and whichever is lost, the other goes on."""
    for keep in (0, 1):
        run = Run(3, num_workers=3)
        run.ready()
        run.handle(Tick(100))
        _, second, third = run.workers
        run.done(second)
        run.done(third)
        doubled = [name for name in run.workers if 0 in run.held(name)]
        assert len(doubled) == 2 and sum(map(len, run.leases.values())) == 2
        run.lost(doubled[1 - keep], (0, 1))
        assert not run.state.backlog.num_groups
        run.done(doubled[keep])
        assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_a_range_can_be_tried_again_too() -> None:
    """The twin that is late is cancelled, and the shard is put together once."""
    run = Run([40], num_workers=2)
    run.ready()
    run.handle(Tick(100))
    first, second = run.workers
    run.done(first)
    assert run.rows(first) == run.rows(second) == [(0, list(range(16, 40)))]
    slow = run.leases[second][0].attempt
    run.done(first)
    assert run.last[0] == CancelLease(second, slow)
    assert [lease.whole for lease in run.leases[first]] == [True]
    assert run.leases[second] == []


# -- elastic workers ---------------------------------------------------------------------------


def test_all_workers_are_asked_for_at_once_and_used_as_they_come() -> None:
    """``max`` is asked for. While they gather, work is shared out among all of them; those that are
    not there a little after the first get none kept, but for ``min``: the cluster may have no room
    for them."""
    run = Run([8000], num_workers=8, min_workers=2)
    assert len(run.workers) == 8
    run.ready("3-1")
    assert run.sizes("3-1") == [500]
    run.handle(Tick(16))
    run.done("3-1")
    assert run.sizes("3-1") == [7500 // 4]
    run.ready("3-2", "3-3", "3-4")
    assert run.sizes("3-4")[0] < run.sizes("3-2")[0] == (7500 - 1875) // 4


def test_one_big_shard_asks_for_many_workers() -> None:
    """As many as there are full leases in it, no more than asked for."""
    assert len(Run([40], num_workers=8).workers) == 2
    assert len(Run([4000], num_workers=8).workers) == 8


# -- canary ------------------------------------------------------------------------------------


def test_the_canary_is_the_first_rows_on_one_worker() -> None:
    """Nothing else is leased, and no other worker started, until it has passed."""
    run = Run([10, 10, 10], num_workers=3, canary_rows=15)
    assert run.workers == ["3-1"]
    run.ready()
    assert run.rows("3-1") == [(0, list(range(10)))]
    assert run.handle(LeasesWanted("3-1", 3)) == []
    run.done("3-1")
    assert run.rows("3-1") == [(1, list(range(5)))]
    run.done("3-1")
    assert run.last[:1] == [StartWorker("3-2")]
    assert run.rows("3-1") == [(1, list(range(5, 10)))]
    for _ in range(9):
        for name in run.workers:
            run.ready(name)
            while run.leases[name]:
                run.done(name)
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


@pytest.mark.parametrize(
    ("options", "failed", "empty", "message"),
    [
        ({}, 1, 0, "1 of the 15 canary rows failed"),
        ({"max_failed_rows": 2}, 2, 0, None),
        ({"max_failed_rows": 0.2}, 3, 0, None),
        ({"max_failed_rows": 0.2}, 4, 0, "4 of the 15 canary rows failed"),
        ({}, 0, 7, None),
        ({}, 0, 8, "8 of the 15 completions of the canary are empty"),
        ({"num_samples": 2}, 0, 15, None),
    ],
)
def test_a_canary_that_fails_ends_the_run(
    options: dict[str, float], failed: int, empty: int, message: str | None
) -> None:
    """Too many failed rows (a fraction is one of the canary), or mostly empty completions."""
    run = Run([10, 10], num_workers=2, canary_rows=15, **options)
    run.ready()
    run.done("3-1", failed_rows=failed, empty=empty)
    assert run.outcome is None
    run.done("3-1")
    if message is None:
        assert run.outcome is None
    else:
        assert run.outcome is not None
        assert (run.outcome.kind, run.outcome.message) == (OutcomeKind.CANARY_FAILED, message)
        assert not any(isinstance(command, StartLease) for command in run.last)


def test_a_canary_that_failed_fails_again() -> None:
    """What an earlier submit has published of it counts; a run past the border has passed."""
    shards = [10, 10]
    run = Run(shards, canary_rows=10, done=1)
    run.ready()
    assert run.held("3-1") == [1]
    failed = Run(shards)
    published = part(failed.shards[0], failed_rows=1)
    state = type(failed.state)(
        failed.shards, {0: published}, epoch=4, max_workers=1, canary_rows=10
    )
    (finish,) = state.handle(Tick(0))
    assert isinstance(finish, FinishRun) and finish.outcome.kind is OutcomeKind.CANARY_FAILED


def test_a_canary_survives_its_worker() -> None:
    """Rows under suspicion run before anything else, and a lost row is a failed one."""
    run = Run([10, 10], num_workers=2, canary_rows=12, max_retries=0)
    run.ready()
    run.lost("3-1", (0, 3))
    for _ in range(9):
        name = run.workers[-1]
        run.ready(name)
        if run.outcome is not None:
            break
        assert {number for number, _ in run.rows(name)} <= {0, 1}
        if run.leases[name][0].alone:
            run.lost(name, (0, 3))
        else:
            run.done(name)
    assert ended(run) == (OutcomeKind.CANARY_FAILED, 1)


def test_a_canary_whose_rows_were_given_up_is_over() -> None:
    """Where earlier drivers have lost them to deaths nobody has to run them: the rest goes on."""
    struck = [Strike(f"1-{row}", {0: Rows.of([row])}, alone=True) for row in (0, 1)]
    run = Run([10], canary_rows=2, strikes=struck, max_retries=0, max_failed_rows=2)
    run.ready()
    assert run.rows("3-1") == [(0, list(range(2, 10)))]


def test_an_unreadable_shard_fails_the_canary() -> None:
    """All its rows count as failed."""
    run = Run([10, 10], canary_rows=10)
    run.ready()
    for _ in range(4):
        name = run.workers[-1]
        run.ready(name)
        run.lost(name)
    assert run.last[0] == FailShard(run.shards[0], "worker_lost: 3 workers died with it (boom)")
    assert ended(run) == (OutcomeKind.CANARY_FAILED, 10)


# -- limits ------------------------------------------------------------------------------------


def test_hours_of_a_submit_are_limited() -> None:
    """From the first tick on, whatever the clock shows then."""
    run = Run(9, limits=Limits(max_hours=2))
    run.ready()
    assert run.handle(Tick(50_000), Tick(50_000 + 7199)) == []
    (drain,) = run.handle(Tick(50_000 + 7200))
    assert isinstance(drain, DrainRun)
    assert drain.message.startswith("limits.max_hours (2) is reached with 2.00 hours")


def test_tokens_of_a_submit_are_limited() -> None:
    """Those of lost workers too, and none twice."""
    run = Run(9, num_workers=2, limits=Limits(max_tokens=100))
    run.ready()
    first, second = run.workers
    for tokens in (10, 30, 20):
        assert run.handle(TokensSpent(first, tokens)) == []
    run.lost(first, cause=LossCause.NODE, node=False)
    run.handle(TokensSpent(first, 90), TokensSpent(second, 69))
    assert not any(isinstance(command, DrainRun) for command in run.last)
    (drain,) = run.handle(TokensSpent(second, 70))
    assert isinstance(drain, DrainRun) and "max_tokens (100)" in drain.message


def test_money_of_a_submit_is_limited() -> None:
    """Hours of loaded workers, and the time that they took to load, at their price."""
    run = Run(9, num_workers=2, limits=Limits(max_cost=3, price_per_worker_hour=0.5))
    run.handle(Tick(0))
    run.handle(WorkerReady("3-1", paid_s=3600))
    run.handle(Tick(3600))
    run.handle(WorkerReady("3-2"))
    assert run.state._meter.cost == pytest.approx(1.0)
    run.handle(Tick(2 * 3600))
    assert not any(isinstance(command, DrainRun) for command in run.handle(Tick(10_799)))
    (drain,) = run.handle(Tick(10_800))
    assert isinstance(drain, DrainRun) and "a cost of 3.00" in drain.message


def test_after_a_limit_nothing_begins_and_the_stop_says_which() -> None:
    """What is complete meanwhile counts."""
    run = Run(3, limits=Limits(max_tokens=1))
    run.ready()
    run.handle(TokensSpent("3-1", 1))
    limit = run.last[0]
    assert isinstance(limit, DrainRun)
    run.done("3-1")
    assert run.last == []
    assert run.handle(WorkerLost("3-1", LossCause.NODE, "", False), Tick(99)) == []
    run.handle(StopRequested("SIGTERM"))
    assert run.outcome is not None
    assert (run.outcome.kind, run.outcome.message, run.outcome.counts.rows) == (
        OutcomeKind.LIMIT_REACHED,
        limit.message,
        10,
    )


def test_a_run_that_is_complete_when_its_limit_is_reached_is_a_success() -> None:
    """The last part came in time."""
    run = Run(1, limits=Limits(max_tokens=1))
    run.ready()
    run.handle(TokensSpent("3-1", 1))
    run.done("3-1")
    assert ended(run) == (OutcomeKind.SUCCESS, 0)

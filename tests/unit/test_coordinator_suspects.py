"""What happens to rows that were in flight when their worker died."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from batchrun.coordinator import (
    FailShard,
    LeasesWanted,
    LossCause,
    OutcomeKind,
    StartWorker,
    Tick,
    WorkerDraining,
    WorkerLost,
)
from batchrun.records import Strike
from batchrun.rows import Rows
from tests.unit.coordinator_run import Run, ended, ranges

FLYING = tuple((0, ordinal) for ordinal in range(20, 84))


def newest(run: Run) -> str:
    """The worker that was started last."""
    return run.workers[-1]


def drive(run: Run, poison: set[tuple[int, int]], max_sequences: int = 64) -> int:
    """Run to the end with rows that kill whoever has them in flight; the number of deaths.

    A worker has its first 64 rows that are not in the journal in flight at once.
    """
    journal: set[tuple[int, int]] = set()
    deaths = 0
    for _ in range(10_000):
        if run.outcome is not None:
            return deaths
        name = next((name for name in reversed(run.workers) if run.leases[name]), None)
        if name is None:
            run.ready(*(name for name in run.workers if name in run.state.crew.members))
            run.handle(Tick(run.state._now + 61))
            continue
        lease = run.leases[name][0]
        number = lease.shard.number
        left = [
            (number, ordinal)
            for ordinal in lease.rows
            if (number, ordinal) not in journal and ordinal not in lease.lost
        ]
        flying = left[:max_sequences]
        if poison & set(flying):
            run.lost(name, *flying)
            deaths += 1
            continue
        journal |= set(flying)
        if len(left) <= max_sequences:
            run.done(name)
    raise AssertionError("the run never ends")


def test_rows_in_flight_at_a_death_run_apart_in_groups_of_an_eighth() -> None:
    """The others go on as if nothing had happened; who isolates does nothing else."""
    run = Run([1000, 1000])
    run.ready()
    run.lost("3-1", *FLYING)
    assert run.last == [StartWorker("3-2")]
    run.ready("3-2")
    for start in range(20, 84, 8):
        (lease,) = run.leases["3-2"]
        assert (lease.alone, lease.whole, lease.rows) == (True, False, ranges((start, start + 8)))
        assert run.handle(LeasesWanted("3-2", 2)) == []
        run.done("3-2")
    assert [lease.rows for lease in run.leases["3-2"]] == [
        ranges((0, 20), (84, 1000)),
        Rows.all(1000),
    ]
    assert not any(lease.alone for lease in run.leases["3-2"])
    run.done("3-2")
    assert [(lease.shard.number, lease.whole) for lease in run.leases["3-2"]] == [
        (1, True),
        (0, True),
    ]


def test_a_group_that_dies_is_split_again_and_its_innocents_go_back() -> None:
    """Rows that had no slot are not suspects any more: they wait with the others."""
    run = Run([1000])
    run.ready()
    run.lost("3-1", *FLYING)
    run.ready("3-2")
    run.lost("3-2", *FLYING[:3])
    run.ready("3-3")
    assert run.rows("3-3") == [(0, [20])]
    assert run.state.backlog.open[0].waiting == ranges((0, 20), (23, 28), (84, 1000))


def test_a_row_that_kills_its_workers_alone_is_lost() -> None:
    """After max_retries more; it goes along with the whole lease, and the run is done."""
    run = Run([100], max_retries=2)
    run.ready()
    run.lost("3-1", (0, 7), (0, 8))
    for _ in range(3):
        run.ready(newest(run))
        assert run.rows(newest(run)) == [(0, [7])]
        run.lost(newest(run), (0, 7))
    run.ready(newest(run))
    assert run.rows(newest(run)) == [(0, [8])]
    run.done(newest(run))
    run.done(newest(run))
    (assembly,) = run.leases[newest(run)]
    assert assembly.whole and assembly.lost == {
        7: "3 workers died while running this row alone (boom)"
    }
    run.done(newest(run))
    assert ended(run) == (OutcomeKind.TOO_MANY_FAILURES, 1)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_only_the_poison_is_lost(num_workers: int) -> None:
    """Two deaths to find a row among 64, and those that it may have alone."""
    poison = {(0, 33), (1, 999)}
    run = Run([1000, 1000, 50], num_workers=num_workers, max_retries=2, max_failed_rows=2)
    deaths = drive(run, poison)
    assert ended(run) == (OutcomeKind.SUCCESS, 2)
    assert deaths <= len(poison) * (2 + 3)


def test_a_row_that_killed_with_others_alone_is_not_counted() -> None:
    """A death in company proves nothing: a machine out of memory for 64 is fine for 8."""
    run = Run([64], max_retries=0)
    run.ready()
    for _ in range(1):
        run.lost(newest(run), *((0, ordinal) for ordinal in range(64)))
        run.ready(newest(run))
    while run.outcome is None:
        run.done(newest(run))
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_one_worker_isolates_while_the_others_work() -> None:
    """The fleet keeps its engines; when nothing else is left, all take part."""
    run = Run([1000] * 4, num_workers=3)
    run.ready()
    run.lost("3-1", *FLYING)
    run.ready("3-4")
    assert run.leases["3-4"][0].alone
    run.done("3-2")
    run.done("3-3")
    alone = [name for name in run.workers if any(lease.alone for lease in run.leases[name])]
    assert alone == ["3-4"]
    for _ in range(100):
        name = next((n for n in ("3-2", "3-3") if run.leases[n] and not run.leases[n][0].alone), "")
        if not name:
            break
        run.done(name)
    alone = [name for name in run.workers if any(lease.alone for lease in run.leases[name])]
    assert alone == ["3-2", "3-3", "3-4"]


def test_a_worker_at_work_runs_dry_to_isolate_when_no_other_comes() -> None:
    """Suspects do not wait for the end of the run."""
    run = Run([1000] * 20, num_workers=2)
    run.ready()
    run.lost("3-1", (0, 3))
    run.handle(LeasesWanted("3-2", 2))
    assert run.held("3-2") == [1]
    run.done("3-2")
    assert run.rows("3-2") == [(0, [3])] and run.leases["3-2"][0].alone
    run.done("3-2")
    run.handle(LeasesWanted("3-2", 2))
    assert len(run.leases["3-2"]) == 3


def test_the_next_try_of_a_row_is_on_another_device() -> None:
    """A bad GPU does not condemn a row, where there is another one."""
    run = Run([1000] * 20, num_workers=2, max_retries=1)
    run.ready("3-1", device="bad")
    run.ready("3-2", device="good")
    run.lost("3-1", (0, 3))
    run.ready("3-3", device="bad")
    assert run.rows("3-3") == [(0, [3])]
    run.lost("3-3", (0, 3))
    run.ready("3-4", device="bad")
    assert (0, [3]) not in run.rows("3-4")
    run.handle(LeasesWanted("3-2", 1))
    run.done("3-2")
    assert run.rows("3-2") == [(0, [3])]


def on_two_devices(run: Run, kills: Callable[[str, int], bool]) -> Counter[str]:
    """Run to the end on two GPUs: a worker dies when one of the rows that it has in flight, the
    next four of its lease, ``kills`` it there, or else ends the lease; the deaths on each."""
    deaths: Counter[str] = Counter()
    device: dict[str, str] = {}
    journal: set[tuple[int, int]] = set()
    while run.outcome is None:
        for name in run.workers:
            taken = {device[other] for other in run.state.crew.members if other in device}
            free = sorted({"a", "b"} - taken)
            if name not in device and free:
                device[name] = free[0]
                run.ready(name, device=free[0])
        for name in list(device):
            if run.outcome is not None or not run.leases[name]:
                continue
            lease = run.leases[name][0]
            number = lease.shard.number
            left = [
                row for row in lease.rows if (number, row) not in journal and row not in lease.lost
            ]
            for flying in (left[at : at + 4] for at in range(0, len(left), 4)):
                if any(kills(device[name], row) for row in flying):
                    deaths[device[name]] += 1
                    run.lost(name, *((number, row) for row in flying))
                    break
                journal |= {(number, row) for row in flying}
            else:
                run.done(name)
    return deaths


def test_a_device_that_kills_whatever_it_runs_is_set_aside() -> None:
    """After three deaths with nothing done in between; no row is given up for it."""
    run = Run([64] * 8, num_workers=2, max_retries=1)
    deaths = on_two_devices(run, lambda device, row: device == "a")
    assert ended(run) == (OutcomeKind.SUCCESS, 0)
    assert run.aside == ["a"]
    assert 3 <= deaths["a"] <= 3 + 1 and deaths["b"] == 0


def test_a_run_that_has_nothing_but_a_bad_device_knows_it() -> None:
    """Until a worker starts on another one it waits, and can say for what."""
    run = Run([64] * 8, num_workers=2, max_retries=1)
    good, bad = run.workers
    run.ready(good, device="b")
    for _ in range(3):
        run.ready(bad, device="a")
        (number, rows), *_ = run.rows(bad)
        run.lost(bad, *((number, row) for row in rows[:4]))
        run.done(good)
        run.handle(LeasesWanted(good, 1))
        bad = newest(run)
    run.ready(bad, device="a")
    assert run.aside == ["a"] and not run.held(bad)
    assert run.state.stranded_on == frozenset()
    run.lost(good, node=False)
    assert run.state.stranded_on == {"a"}
    run.ready(newest(run), device="c")
    assert run.state.stranded_on == frozenset()


@pytest.mark.parametrize(("every", "num_aside"), [(8, 1), (32, 0)])
def test_a_device_that_was_not_to_blame_is_given_back(every: int, num_aside: int) -> None:
    """Rows that kill, some in a row on one GPU, look like a bad one, until they kill on the other
    too; fewer of them do not."""
    run = Run([64] * 4, num_workers=2, max_retries=1, max_failed_rows=100)
    deaths = on_two_devices(run, lambda device, row: row % every == 7)
    assert ended(run) == (OutcomeKind.SUCCESS, 4 * 64 // every)
    assert min(deaths["a"], deaths["b"]) > 3
    assert (len(run.aside), run.state._aside) == (num_aside, frozenset())


def test_on_one_device_deaths_count_as_they_come() -> None:
    """A run that has nothing else does not wait for it."""
    run = Run([10], max_retries=1, max_failed_rows=1)
    for _ in range(3):
        run.ready(newest(run), device="only")
        run.lost(newest(run), (0, 3))
    run.ready(newest(run), device="only")
    while run.outcome is None:
        run.done(newest(run))
    assert ended(run) == (OutcomeKind.SUCCESS, 1)


def test_without_a_word_about_rows_in_flight_all_are_suspects() -> None:
    """They are split by eight until the row is found, and the others are done."""
    run = Run([64], max_retries=1, max_failed_rows=1)
    deaths = 0
    for _ in range(200):
        name = newest(run)
        run.ready(name)
        if run.outcome is not None:
            break
        lease = run.leases[name][0]
        if 33 in lease.rows and 33 not in lease.lost:
            run.lost(name, known=False)
            deaths += 1
        else:
            run.done(name)
    assert ended(run) == (OutcomeKind.SUCCESS, 1)
    assert deaths == 1 + 1 + 2


def test_a_shard_whose_reading_kills_is_given_up() -> None:
    """Nothing was in flight: it runs alone, as a whole, and its rows are not taken apart."""
    run = Run(2, max_retries=2)
    for times in range(4):
        run.ready(newest(run))
        (lease,) = run.leases[newest(run)]
        assert (lease.shard.number, lease.whole, lease.alone) == (0, True, times > 0)
        run.lost(newest(run))
    assert [FailShard(run.shards[0], "worker_lost: 3 workers died with it (boom)")] == run.last[:1]
    run.ready(newest(run))
    run.done(newest(run))
    assert ended(run) == (OutcomeKind.TOO_MANY_FAILURES, 10)


def test_neighbours_of_a_shard_whose_reading_kills_are_not_given_up() -> None:
    """Only deaths with nothing else at hand count."""
    run = Run(4, max_retries=0)
    run.ready()
    run.handle(LeasesWanted("3-1", 2))
    run.lost("3-1")
    for _ in range(20):
        worker = newest(run)
        if run.outcome is not None:
            break
        run.ready(worker)
        run.handle(LeasesWanted(worker, 3))
        if 1 in run.held(worker):
            assert run.held(worker) == [1]
            run.lost(worker)
        else:
            run.done(worker)
    assert run.outcome is not None
    assert {1} == set(run.outcome.failed_shards)


def test_an_assembly_that_kills_is_given_up() -> None:
    """Also when nobody knows what was in flight: all its rows are in the journal."""
    for known in (True, False):
        run = Run([40], num_workers=2, max_retries=1)
        for _ in range(30):
            if run.outcome is not None:
                break
            run.ready(*(name for name in run.workers if name in run.state.crew.members))
            name = next(name for name in run.workers if run.leases[name])
            if run.leases[name][0].whole:
                run.lost(name, known=known)
            else:
                run.done(name)
        assert ended(run) == (OutcomeKind.TOO_MANY_FAILURES, 40)


def test_deaths_that_are_nobodys_fault_leave_no_suspects() -> None:
    """Of a node, of a worker that drains, of one that held only what was cancelled."""
    run = Run(1)
    run.ready()
    lost = WorkerLost("3-1", LossCause.NODE, "gone", False, ((0, 1),))
    assert run.state.strike(lost) is None
    crash = WorkerLost("3-1", LossCause.CRASH, "gone", True, ((0, 1),))
    assert run.state.strike(crash) is not None
    elsewhere = WorkerLost("3-1", LossCause.CRASH, "gone", True, ((7, 1),))
    assert run.state.strike(elsewhere) is None
    run.handle(WorkerDraining("3-1"))
    assert run.state.strike(crash) is None
    run.handle(crash)
    assert run.state.backlog.num_groups == 0
    assert run.state.strike(crash) is None


def test_a_strike_says_what_a_later_driver_has_to_know() -> None:
    """The rows, whether they were alone, and on what."""
    run = Run([100, 100])
    run.ready("3-1", device="host/gpu-1")
    run.handle(LeasesWanted("3-1", 1))
    event = WorkerLost("3-1", LossCause.HANG, "no step", True, ((1, 4), (0, 3), (9, 9)))
    assert run.state.strike(event) == Strike(
        worker="3-1",
        rows={0: ranges((3, 4)), 1: ranges((4, 5))},
        cause="hang",
        message="no step",
        device="host/gpu-1",
    )
    blind = run.state.strike(WorkerLost("3-1", LossCause.CRASH, "boom"))
    assert blind is not None and blind.blind and blind.rows == {0: Rows.all(100), 1: Rows.all(100)}


def test_a_whole_lease_of_a_retry_covers_its_shard() -> None:
    """Also where the shard itself is under suspicion: only some rows run, all of them are made."""
    struck = Strike("1-1", {0: Rows.of([10])}, idle=True, alone=True, message="boom")
    run = Run([30], todo={0: Rows.of([10])}, strikes=[struck])
    run.ready()
    (lease,) = run.leases["3-1"]
    assert lease.whole and lease.alone and lease.rows == Rows.all(30)


def test_strikes_of_earlier_drivers_give_the_state_that_they_left() -> None:
    """Each row is in the smallest group that died, and deaths alone are counted on."""
    strikes = [
        Strike("1-1", {0: ranges((20, 84))}, message="boom"),
        Strike("1-2", {0: ranges((20, 28))}, alone=True, message="boom"),
        Strike("1-3", {0: ranges((23, 24))}, alone=True, message="boom", device="a"),
        Strike("2-1", {0: ranges((23, 24))}, alone=True, message="boom", device="a"),
        Strike("1-9", {1: ranges((0, 5)), 77: ranges((0, 1))}, message="boom"),
    ]
    run = Run([1000, 10], strikes=strikes, done=0, max_retries=2)
    found = run.state.backlog.open[0]
    groups = [(list(group.rows), group.avoid) for group in found.groups]
    assert groups[0] == (list(range(28, 36)), frozenset())
    assert ([23], frozenset({"a"})) in groups and ([20], frozenset()) in groups
    assert found.waiting == ranges((0, 20), (84, 1000))
    assert found.deaths == {23: 2}
    run = Run(
        [1000, 10],
        strikes=[*strikes, Strike("3-9", {0: ranges((23, 24))}, alone=True, message="boom")],
        max_retries=2,
    )
    assert list(run.state.backlog.open[0].lost) == [23]


def test_a_driver_after_every_death_does_not_begin_to_count_again() -> None:
    """The same deaths as with one driver: the strikes are the memory."""
    poison = (0, 33)
    strikes: list[Strike] = []
    journal: set[int] = set()
    for epoch in range(50):
        run = Run([100], strikes=strikes, max_retries=2, max_failed_rows=1)
        run.ready()
        name = newest(run)
        while run.outcome is None:
            lease = run.leases[name][0]
            left = [row for row in lease.rows if row not in journal and row not in lease.lost]
            flying = tuple((0, row) for row in left[:64])
            if poison in flying:
                strike = run.state.strike(WorkerLost(name, LossCause.CRASH, "boom", True, flying))
                assert strike is not None
                strikes.append(
                    Strike(f"{epoch}-1", strike.rows, alone=strike.alone, message="boom")
                )
                break
            journal.update(row for _, row in flying)
            if len(left) <= 64:
                run.done(name)
        if run.outcome is not None:
            break
    assert ended(run) == (OutcomeKind.SUCCESS, 1)
    assert len(strikes) == 2 + 3


def test_a_shard_that_earlier_drivers_found_deadly_is_given_up() -> None:
    """It is not read once more."""
    deadly = Strike("1-1", {0: Rows.all(10)}, alone=True, idle=True, message="boom")
    run = Run(2, strikes=[deadly, Strike("1-2", deadly.rows, alone=True, idle=True)], max_retries=1)
    assert isinstance(run.last[0], FailShard) and run.last[0].shard.number == 0
    run.ready()
    run.done("3-1")
    assert ended(run) == (OutcomeKind.TOO_MANY_FAILURES, 10)

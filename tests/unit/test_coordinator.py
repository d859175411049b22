"""The decisions of a run: by example, and by a machine that tries everything."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchrun.coordinator import (
    Command,
    Event,
    FailShard,
    FinishRun,
    LeaseDone,
    LeaseFailed,
    LeasesWanted,
    LossCause,
    Outcome,
    OutcomeKind,
    RunStarted,
    RunState,
    StartLease,
    StartWorker,
    StopRequested,
    StopWorker,
    Tick,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
)
from batchrun.records import Counts, Lease, Part, Shard


def shard(number: int, rows: int = 10) -> Shard:
    """A shard of a few rows."""
    return Shard(number, f"{number}.parquet", f"/in/{number}.parquet", 1, "f", (0,), 0, rows)


def part(of: Shard, attempt: str = "", failed_rows: int = 0) -> Part:
    """The published part of a shard."""
    counts = Counts(rows=of.num_rows, failed_rows=failed_rows)
    return Part(of.number, f"part-{of.number}", attempt, 1, "", of.num_rows, counts)


class Run:
    """A run under test: what was commanded so far, and short ways to say what happens."""

    def __init__(self, num_shards: int, num_workers: int = 1, **options: float) -> None:
        self.shards = [shard(number) for number in range(num_shards)]
        done = options.pop("done", 0)
        self.state = RunState(
            self.shards,
            {number: part(self.shards[number]) for number in range(int(done))},
            epoch=3,
            max_workers=num_workers,
            **options,  # type: ignore[arg-type]
        )
        self.leases: dict[str, list[Lease]] = {}
        self.outcome: Outcome | None = None
        self.last: list[Command] = []
        self.handle(RunStarted())

    def handle(self, *events: Event) -> list[Command]:
        """The commands that these facts lead to."""
        self.last = [command for event in events for command in self.state.handle(event)]
        for command in self.last:
            match command:
                case StartWorker(name):
                    assert name not in self.leases
                    self.leases[name] = []
                case StartLease(name, lease):
                    self.leases[name].append(lease)
                case FinishRun(outcome):
                    self.outcome = outcome
        return self.last

    @property
    def workers(self) -> list[str]:
        """All workers ever started."""
        return list(self.leases)

    def ready(self, *names: str) -> None:
        """These workers, or all, have loaded."""
        for name in names or self.workers:
            self.handle(WorkerReady(name))

    def done(self, worker: str, failed_rows: int = 0) -> None:
        """The worker publishes its oldest lease."""
        lease = self.leases[worker].pop(0)
        of = self.shards[lease.shard.number]
        self.handle(LeaseDone(worker, lease.attempt, part(of, lease.attempt, failed_rows)))

    def lost(self, worker: str, cause: LossCause = LossCause.CRASH, node: bool = True) -> None:
        """The worker is gone."""
        self.leases[worker] = []
        self.handle(WorkerLost(worker, cause, "boom", node))

    def held(self, worker: str) -> list[int]:
        """Numbers of the shards that the worker was given and has not finished."""
        return [lease.shard.number for lease in self.leases[worker]]


def ended(run: Run) -> tuple[OutcomeKind, int]:
    """How the run ended, and how many rows count as failed."""
    assert run.outcome is not None
    return run.outcome.kind, run.outcome.failed_rows


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
    run.lost("3-1", LossCause.NODE, node=False)
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


def test_a_shard_that_kills_its_workers_is_failed() -> None:
    """After max_retries more tries alone it is given up, and the run goes on."""
    run = Run(2, max_retries=2)
    for worker in ("3-1", "3-2"):
        run.ready(worker)
        assert run.held(worker) == [0]
        run.lost(worker)
    run.ready("3-3")
    run.lost("3-3")
    assert [FailShard(run.shards[0], "worker_lost: 3 workers died with it (boom)")] == run.last[:1]
    run.ready("3-4")
    assert run.held("3-4") == [1]
    run.done("3-4")
    assert ended(run) == (OutcomeKind.TOO_MANY_FAILURES, 10)
    assert run.outcome is not None
    assert run.outcome.message == "1 of 2 shards could not be run"


def test_innocent_neighbours_of_a_deadly_shard_are_not_failed() -> None:
    """A shard under suspicion runs alone, so that only its own deaths count."""
    run = Run(4, max_retries=0)
    run.ready()
    run.handle(LeasesWanted("3-1", 2))
    run.lost("3-1")
    deadly = 1
    for _ in range(20):
        worker = run.workers[-1]
        if run.outcome is not None:
            break
        run.ready(worker)
        run.handle(LeasesWanted(worker, 3))
        if any(number < 3 for number in run.held(worker)):
            assert len(run.held(worker)) == 1
        if deadly in run.held(worker):
            run.lost(worker)
        else:
            run.done(worker)
    assert run.outcome is not None
    assert {deadly} == set(run.outcome.failed_shards)


def test_nodes_that_die_blame_no_row() -> None:
    """However often machines are taken away, no shard is failed."""
    run = Run(1, max_retries=0)
    for number in range(1, 50):
        run.ready(f"3-{number}")
        assert run.held(f"3-{number}") == [0]
        run.lost(f"3-{number}", LossCause.NODE, node=False)
    assert run.outcome is None


def test_a_worker_that_hangs_is_replaced() -> None:
    """The watchdog's loss counts as any other."""
    run = Run(1)
    run.ready()
    run.lost("3-1", LossCause.HANG)
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
    run.lost("3-1", LossCause.LOAD)
    run.lost("3-2", LossCause.LOAD)
    assert run.outcome is None
    run.handle(WorkerLost("3-3", LossCause.LOAD, "no such file"))
    assert run.outcome is not None
    assert (run.outcome.kind, run.outcome.message) == (OutcomeKind.NO_WORKERS, "no such file")


def test_a_load_that_works_forgives_those_that_failed() -> None:
    """Only failures in a row count, and a machine that is taken away while loading does not."""
    run = Run(9)
    for _ in range(3):
        run.lost(run.workers[-1], LossCause.LOAD)
        run.lost(run.workers[-1], LossCause.NODE, node=False)
        run.lost(run.workers[-1], LossCause.LOAD)
        run.ready(run.workers[-1])
        run.lost(run.workers[-1], LossCause.NODE, node=False)
    assert run.outcome is None


def test_beside_workers_at_work_failing_loads_wait() -> None:
    """The run goes on with who is there, and tries again after a minute."""
    run = Run(9, num_workers=2)
    run.ready(run.workers[0])
    for _ in range(3):
        run.lost(run.workers[-1], LossCause.LOAD)
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
    run.lost("3-1", LossCause.HANG)
    run.handle(LeaseDone("3-1", lease.attempt, part(run.shards[0])))
    run.ready("3-2")
    assert run.held("3-2") == [1]


def test_a_worker_lost_with_a_shard_that_is_done_changes_nothing() -> None:
    """Its lease was a second one; the shard is neither run again nor failed."""
    run = Run(2, max_retries=0)
    run.ready()
    late = run.leases["3-1"][0]
    run.lost("3-1", LossCause.NODE, node=False)
    run.ready("3-2")
    run.handle(LeaseDone("3-1", late.attempt, part(run.shards[0])))
    run.lost("3-2")
    run.ready("3-3")
    assert run.held("3-3") == [1]
    run.done("3-3")
    assert ended(run) == (OutcomeKind.SUCCESS, 0)


def test_a_shard_that_is_done_cannot_fail() -> None:
    """Its second attempt could not read it any more; the published part counts."""
    run = Run(2)
    run.ready()
    late = run.leases["3-1"][0]
    run.lost("3-1", LossCause.NODE, node=False)
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


def test_a_hundred_thousand_shards_are_quick() -> None:
    """Decisions do not grow with the plan."""
    import time

    run = Run(100_000, num_workers=100)
    run.ready()
    started = time.monotonic()
    for _ in range(5):
        for worker in run.workers:
            run.handle(LeasesWanted(worker, 2))
            run.done(worker)
    assert time.monotonic() - started < 3


class Machine(RuleBasedStateMachine):
    """Any facts in any order, a liar among the workers, and rules that must hold throughout."""

    @initialize(
        sizes=st.lists(st.integers(0, 5), max_size=8),
        num_done=st.integers(0, 3),
        num_workers=st.integers(1, 4),
        max_retries=st.integers(0, 2),
    )
    def begin(
        self, sizes: Sequence[int], num_done: int, num_workers: int, max_retries: int
    ) -> None:
        """A run of any size, begun or resumed."""
        self.shards = [shard(number, rows) for number, rows in enumerate(sizes)]
        done = {item.number: part(item) for item in self.shards[:num_done]}
        self.state = RunState(
            self.shards, done, epoch=1, num_workers=num_workers, max_retries=max_retries
        )
        self.num_workers = num_workers
        self.started: set[str] = set()
        self.living: set[str] = set()
        self.loaded: set[str] = set()
        self.draining: set[str] = set()
        self.attempts: dict[str, tuple[str, int]] = {}
        self.open: dict[str, str] = {}  # attempts that their living worker still runs
        self.published: dict[int, Part] = dict(done)
        self.deaths: dict[int, int] = {}
        self.unreadable: set[int] = set()
        self.outcomes: list[Outcome] = []
        self.handle(RunStarted())

    def handle(self, event: Event) -> None:
        """Feed a fact, obey the commands, and check each of them."""
        for command in self.state.handle(event):
            assert not self.outcomes, "a command after the end"
            match command:
                case StartWorker(name):
                    assert name not in self.started
                    self.started.add(name)
                    self.living.add(name)
                    assert len(self.living - self.draining) <= self.num_workers
                case StartLease(name, lease):
                    assert name in self.loaded & self.living and name not in self.draining
                    assert lease.attempt not in self.attempts
                    assert lease.shard.number not in self.state.done
                    self.attempts[lease.attempt] = (name, lease.shard.number)
                    self.open[lease.attempt] = name
                case StopWorker(name):
                    self.living.discard(name)
                case FailShard(of, _):
                    deaths = self.deaths.get(of.number, 0)
                    assert of.number in self.unreadable or deaths > self.state._max_retries
                case FinishRun(outcome):
                    self.outcomes.append(outcome)

    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """A worker has loaded; the news may come twice, or from one that is gone."""
        if self.started:
            name = data.draw(st.sampled_from(sorted(self.started)))
            self.loaded.add(name)
            self.handle(WorkerReady(name))

    @rule()
    def load_all(self) -> None:
        """Everybody who lives has loaded."""
        for name in sorted(self.living):
            self.loaded.add(name)
            self.handle(WorkerReady(name))

    @rule(data=st.data(), count=st.integers(0, 3))
    def want(self, data: st.DataObject, count: int) -> None:
        """A worker has room."""
        if self.started:
            self.handle(LeasesWanted(data.draw(st.sampled_from(sorted(self.started))), count))

    def draw_attempt(self, data: st.DataObject, late: bool) -> str | None:
        """An attempt that runs, or one that was ended or given up."""
        choices = sorted(name for name in self.attempts if (name in self.open) is not late)
        return data.draw(st.sampled_from(choices)) if choices else None

    @rule(data=st.data(), late=st.booleans())
    def publish(self, data: st.DataObject, late: bool) -> None:
        """A worker publishes, also one that was given up: the first part stands."""
        attempt = self.draw_attempt(data, late)
        if attempt is not None:
            name, number = self.attempts[attempt]
            made = self.published.setdefault(number, part(self.shards[number], attempt))
            self.open.pop(attempt, None)
            self.handle(LeaseDone(name, attempt, made))

    @rule(data=st.data(), late=st.booleans())
    def fail(self, data: st.DataObject, late: bool) -> None:
        """A worker cannot read a shard; late news of one that was given up do not count."""
        attempt = self.draw_attempt(data, late)
        if attempt is not None:
            name, number = self.attempts[attempt]
            if not late:
                self.unreadable.add(number)
            self.open.pop(attempt, None)
            self.handle(LeaseFailed(name, attempt, "damaged"))

    @rule(data=st.data(), cause=st.sampled_from(LossCause), node=st.booleans())
    def lose(self, data: st.DataObject, cause: LossCause, node: bool) -> None:
        """A worker is gone; the news may come twice."""
        if self.started:
            name = data.draw(st.sampled_from(sorted(self.started)))
            held = [attempt for attempt, owner in self.open.items() if owner == name]
            if node and len(held) == 1:
                number = self.attempts[held[0]][1]
                self.deaths[number] = self.deaths.get(number, 0) + 1
            for attempt in held:
                del self.open[attempt]
            self.living.discard(name)
            self.handle(WorkerLost(name, cause, "gone", node))

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        """A worker's node will be taken away."""
        if self.living:
            name = data.draw(st.sampled_from(sorted(self.living)))
            self.draining.add(name)
            self.handle(WorkerDraining(name))

    @rule(seconds=st.integers(0, 100))
    def pass_time(self, seconds: int) -> None:
        """Time passes."""
        self.handle(Tick(self.state._now + seconds))

    @precondition(lambda self: not self.outcomes)
    @rule(really=st.sampled_from([False] * 9 + [True]))
    def stop(self, really: bool) -> None:
        """Now and then somebody stops the run."""
        if really:
            self.handle(StopRequested())

    @invariant()
    def every_shard_is_in_exactly_one_place(self) -> None:
        """Pending, leased, done or failed."""
        if not hasattr(self, "state"):
            return
        state = self.state
        leased = [number for worker in state.workers.values() for number in worker.leases.values()]
        places = [*state.pending, *state.done, *state.failed]
        extra = [number for number in leased if number not in state.done]
        extra = [number for number in extra if number not in state.failed]
        assert sorted(places + extra) == sorted(item.number for item in self.shards)

    @invariant()
    def what_is_done_was_published(self) -> None:
        """No shard counts as done without a part, and no part is forgotten."""
        if hasattr(self, "state"):
            for number, made in self.state.done.items():
                assert self.published[number] is made

    @invariant()
    def nobody_idles_while_work_waits(self) -> None:
        """A loaded worker without a lease means that no shard is pending."""
        if hasattr(self, "state") and not self.state.finished:
            for worker in self.state.workers.values():
                if worker.ready and not worker.draining and not worker.leases:
                    assert not self.state.pending

    @invariant()
    def the_end_is_right(self) -> None:
        """One outcome, and it says what happened."""
        if not hasattr(self, "state") or not self.outcomes:
            return
        (outcome,) = self.outcomes
        everything = {item.number for item in self.shards}
        covered = set(self.state.done) | set(self.state.failed)
        if outcome.kind is OutcomeKind.SUCCESS:
            assert everything == set(self.state.done)
        elif outcome.kind is OutcomeKind.TOO_MANY_FAILURES:
            assert everything == covered and outcome.failed_shards

    def teardown(self) -> None:
        """From anywhere, a run whose faults stop comes to its end."""
        if not hasattr(self, "state"):
            return
        for _ in range(200):
            if self.outcomes:
                break
            self.handle(Tick(self.state._now + 61))
            for name in sorted(self.living - self.draining):
                self.loaded.add(name)
                self.handle(WorkerReady(name))
            for attempt, name in sorted(self.open.items()):
                number = self.attempts[attempt][1]
                made = self.published.setdefault(number, part(self.shards[number], attempt))
                self.open.pop(attempt, None)
                self.handle(LeaseDone(name, attempt, made))
        assert self.outcomes, "the run never ends"
        self.the_end_is_right()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)

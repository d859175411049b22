"""The decisions of a run, tried by a machine: any facts in any order, late, twice, from zombies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchrun.coordinator import (
    CancelLease,
    Event,
    FailShard,
    FinishRun,
    LeaseDone,
    LeaseFailed,
    LeaseReturned,
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
from batchrun.records import Counts, Lease, Part, Strike
from batchrun.rows import Rows
from tests.unit.coordinator_run import part, shard


class Machine(RuleBasedStateMachine):
    """Keeps books of its own about rows and deaths, and compares them after every fact."""

    @initialize(
        sizes=st.lists(st.sampled_from([0, 1, 3, 20, 90]), max_size=6),
        num_done=st.integers(0, 2),
        num_workers=st.integers(1, 4),
        max_retries=st.integers(0, 2),
        canary_rows=st.sampled_from([0, 0, 2, 25]),
        strikes=st.lists(
            st.tuples(st.integers(0, 7), st.sets(st.integers(0, 25), max_size=9), st.booleans()),
            max_size=4,
        ),
        elastic=st.booleans(),
        todo=st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 19), min_size=1)),
    )
    def begin(
        self,
        sizes: Sequence[int],
        num_done: int,
        num_workers: int,
        max_retries: int,
        canary_rows: int,
        strikes: Sequence[tuple[int, set[int], bool]],
        elastic: bool,
        todo: dict[int, set[int]],
    ) -> None:
        """A run of any size, begun or resumed; without a canary also a retry of some rows."""
        self.shards = [shard(number, rows) for number, rows in enumerate(sizes)]
        self.published = {item.number: part(item, "earlier") for item in self.shards[:num_done]}
        self.max_retries = max_retries
        self.num_workers = num_workers
        self.canary_rows = canary_rows
        self.deaths: Counter[tuple[int, int]] = Counter()  # alone
        self.shard_deaths: Counter[int] = Counter()  # of a worker that isolated it, rows unknown
        written: list[Strike] = []
        for index, (number, ordinals, alone) in enumerate(strikes):
            rows = Rows.of(ordinals)
            written.append(Strike(f"2-{index}", {number: rows}, alone=alone, message="earlier"))
            if alone and len(ordinals) == 1:
                self.deaths[number, *ordinals] += 1
        self.journaled: dict[int, set[int]] = {item.number: set() for item in self.shards}
        self.todo: dict[int, Rows] = {}
        for item in self.shards:
            rows = Rows.of(todo.get(item.number, ())) & Rows.all(item.num_rows)
            if rows and not canary_rows:
                self.todo[item.number] = rows
                self.journaled[item.number] = set(Rows.all(item.num_rows) - rows)  # of its part
        self.started: set[str] = set()
        self.loaded: set[str] = set()
        self.living: set[str] = set()
        self.draining: set[str] = set()
        self.attempts: dict[str, tuple[str, Lease]] = {}
        self.open: dict[str, str] = {}  # attempt -> worker
        self.unreadable: set[int] = set()
        self.outcomes: list[Outcome] = []
        self.state = RunState(
            self.shards,
            self.published,
            epoch=3,
            max_workers=num_workers,
            min_workers=1 if elastic else None,
            max_retries=max_retries,
            todo=self.todo,
            canary_rows=canary_rows,
            max_failed_rows=1_000_000,
            strikes=written,
        )
        self.handle(RunStarted())

    def handle(self, event: Event) -> None:
        """Hand a fact in and check what it leads to."""
        before = self.state.finished
        commands = self.state.handle(event)
        assert not (before and commands)
        for command in commands:
            match command:
                case StartWorker(name):
                    assert name not in self.started
                    self.started.add(name)
                    self.living.add(name)
                    assert len(self.living - self.draining) <= self.num_workers
                case StartLease(name, lease):
                    self.take(name, lease)
                case CancelLease(name, attempt):
                    assert self.open.pop(attempt) == name
                case StopWorker(name):
                    self.living.discard(name)
                case FailShard(of, _):
                    deaths = self.shard_deaths[of.number]
                    assert of.number in self.unreadable or deaths > self.max_retries
                case FinishRun(outcome):
                    self.outcomes.append(outcome)
                    assert command is commands[-1]

    def take(self, name: str, lease: Lease) -> None:
        """A lease is given to somebody who may have it, for rows that are not safe yet."""
        number = lease.shard.number
        assert name in self.loaded & self.living and name not in self.draining
        assert lease.attempt not in self.attempts
        assert number not in self.state.done and number not in self.state.failed
        assert lease.rows.ranges == () or lease.rows.ranges[-1][1] <= lease.shard.num_rows
        held = [attempt for attempt, owner in self.open.items() if owner == name]
        assert not any(self.attempts[attempt][1].alone for attempt in held)
        if lease.alone:
            assert not held
            if any(self.attempts[attempt][1].alone for attempt in self.open):
                assert not self.state.backlog.queue
        if lease.whole:
            assert lease.rows == Rows.all(lease.shard.num_rows)
        else:
            assert not lease.lost
        for ordinal in lease.lost:
            assert self.deaths[number, ordinal] > self.max_retries
        self.attempts[lease.attempt] = (name, lease)
        self.open[lease.attempt] = name

    # -- facts -----------------------------------------------------------------------------

    @rule(data=st.data(), size=st.sampled_from([1, 16, 40]), device=st.sampled_from("ab"))
    def load(self, data: st.DataObject, size: int, device: str) -> None:
        """A worker has loaded; the news may come twice, or from one that is gone."""
        if self.started:
            name = data.draw(st.sampled_from(sorted(self.started)))
            self.loaded.add(name)
            self.handle(WorkerReady(name, size, device))

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
        """An attempt that runs, or one that was ended, cancelled or given up."""
        choices = sorted(name for name in self.attempts if (name in self.open) is not late)
        return data.draw(st.sampled_from(choices)) if choices else None

    @rule(data=st.data(), late=st.booleans(), times=st.integers(1, 2))
    def finish(self, data: st.DataObject, late: bool, times: int) -> None:
        """A worker has finished a lease, also one that was given up; the news may come twice."""
        attempt = self.draw_attempt(data, late)
        if attempt is not None:
            for _ in range(times):
                self.end(attempt)

    def end(self, attempt: str) -> None:
        name, lease = self.attempts[attempt]
        self.open.pop(attempt, None)
        self.handle(LeaseDone(name, attempt, self.made(lease), Counts(rows=len(lease.rows))))

    def made(self, lease: Lease) -> Part | None:
        """What a lease brings into the world: the first part, or rows in the journal."""
        number = lease.shard.number
        if lease.whole:
            return self.published.setdefault(number, part(lease.shard, lease.attempt))
        self.journaled[number].update(lease.rows)
        return None

    @rule(data=st.data())
    def publish_without_a_part(self, data: st.DataObject) -> None:
        """A confused worker says that a lease is done without saying what came of it."""
        attempt = self.draw_attempt(data, late=False)
        if attempt is not None and self.attempts[attempt][1].whole:
            name = self.open.pop(attempt)
            self.handle(LeaseDone(name, attempt))

    @rule(data=st.data(), late=st.booleans())
    def give_back(self, data: st.DataObject, late: bool) -> None:
        """A worker gives a lease back."""
        attempt = self.draw_attempt(data, late)
        if attempt is not None:
            name, _ = self.attempts[attempt]
            self.open.pop(attempt, None)
            self.handle(LeaseReturned(name, attempt))

    @rule(data=st.data(), late=st.booleans())
    def fail(self, data: st.DataObject, late: bool) -> None:
        """A worker cannot read a shard; late news of one that was given up do not count."""
        attempt = self.draw_attempt(data, late)
        if attempt is not None:
            name, lease = self.attempts[attempt]
            if not late:
                self.unreadable.add(lease.shard.number)
            self.open.pop(attempt, None)
            self.handle(LeaseFailed(name, attempt, "damaged"))

    @rule(
        data=st.data(),
        cause=st.sampled_from(LossCause),
        node=st.sampled_from([True, True, False]),
        known=st.sampled_from([True, True, True, False]),
    )
    def lose(self, data: st.DataObject, cause: LossCause, node: bool, known: bool) -> None:
        """A worker is gone, with some of its rows in flight; the news may come twice."""
        if not self.started or self.outcomes:
            return
        name = data.draw(st.sampled_from(sorted(self.started)))
        held = [attempt for attempt, owner in self.open.items() if owner == name]
        rows = {
            (lease.shard.number, ordinal)
            for lease in (self.attempts[attempt][1] for attempt in held)
            for ordinal in list(lease.rows)[:12]
        }
        flying = data.draw(st.sets(st.sampled_from(sorted(rows)), max_size=4)) if rows else set()
        if node and name in self.living and name not in self.draining and held:
            lease = self.attempts[held[0]][1]
            exact = flying if known else {(lease.shard.number, row) for row in lease.rows}
            if lease.alone and len(exact) == 1:
                self.deaths[exact.copy().pop()] += 1
            if lease.alone and (not known or not flying):
                self.shard_deaths[lease.shard.number] += 1
        for attempt in held:
            del self.open[attempt]
        in_flight = tuple(sorted(flying)) if known else None
        event = WorkerLost(name, cause, "gone", node, in_flight)
        strike = self.state.strike(event)
        blamed = node and name in self.living and name not in self.draining and held
        assert (strike is not None) == bool(blamed)
        if strike is not None and flying and known:
            named = {(number, row) for number, found in strike.rows.items() for row in found}
            assert named == flying
        self.living.discard(name)
        self.handle(event)

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
    @rule(really=st.sampled_from([False] * 19 + [True]))
    def stop(self, really: bool) -> None:
        """Now and then somebody stops the run."""
        if really:
            self.handle(StopRequested())

    # -- what must hold --------------------------------------------------------------------

    @invariant()
    def every_row_is_in_exactly_one_place(self) -> None:
        """Done, leased, waiting, held, suspect or lost; and done only if it is in the journal."""
        if not hasattr(self, "state") or self.state.finished:
            return
        state, backlog = self.state, self.state.backlog
        for item in self.shards:
            number, everything = item.number, set(range(item.num_rows))
            mine = [a for a in state.attempts if state.attempts[a].grant.shard == number]
            if number in state.done or number in state.failed:
                assert not mine and number not in backlog.open and number not in backlog.queue
                continue
            for attempt in mine:
                twin = state.attempts[attempt].twin
                others = [a for a in mine if a not in (attempt, twin)]
                rows = set(state.attempts[attempt].grant.rows)
                assert twin is None or state.attempts[twin].twin == attempt
                assert twin is None or set(state.attempts[twin].grant.rows) == rows
                assert not others or not state.attempts[attempt].grant.whole
                assert not any(rows & set(state.attempts[a].grant.rows) for a in others)
            leased = {row for a in mine for row in state.attempts[a].grant.rows}
            opened = backlog.open.get(number)
            if opened is None:
                places = (number in backlog.queue) + bool(mine) + (number in state._behind)
                assert places == 1 and (not mine or leased == everything)
                continue
            suspects = [row for group in opened.groups for row in group.rows]
            assert len(suspects) == len(set(suspects))
            # Whoever runs a shard as a whole has the rows that are given up with it.
            as_whole = any(state.attempts[a].grant.whole for a in mine)
            as_whole |= any(group.whole for group in opened.groups)
            assert opened.num_leases == len(mine)
            assert (number in backlog.queue) == bool(opened.waiting) or opened.complete
            parts = [set(opened.waiting), set(opened.held), set(suspects)]
            parts += [set() if as_whole else set(opened.lost), leased]
            known = set().union(*parts)
            assert sum(len(rows) for rows in parts) == len(known)
            assert opened.complete or as_whole or everything - known <= self.journaled[number]
            if opened.complete and not (mine or opened.groups or opened.waiting):
                assert number in backlog.queue
            for ordinal in opened.lost:
                assert self.deaths[number, ordinal] > self.max_retries

    @invariant()
    def sums_are_what_they_sum_up(self) -> None:
        """What is kept so that no event needs a walk agrees with the walk."""
        if not hasattr(self, "state") or self.state.finished:
            return
        backlog, crew = self.state.backlog, self.state.crew
        waiting = [
            len(self.todo.get(number, Rows.all(self.shards[number].num_rows)))
            if number not in backlog.open
            else len(backlog.open[number].waiting)
            for number in backlog.queue
        ]
        assert backlog.num_rows == sum(waiting)
        groups = {number: len(item.groups) for number, item in backlog.open.items()}
        assert backlog.num_groups == sum(groups.values())
        assert set(backlog.suspects) == {number for number, count in groups.items() if count}
        members = crew.members
        assert set(members) == self.living
        ready = [name for name, member in members.items() if member.is_open]
        assert crew.num_ready == len(ready)
        assert crew.num_starting == sum(not m.ready and not m.draining for m in members.values())
        assert crew.num_loaded == sum(member.ready for member in members.values())
        assert sum(crew.devices.values()) == len(ready) and min(crew.devices.values(), default=1)
        assert set(crew.idle) == {name for name in ready if not members[name].leases}
        held = {name: set(member.leases) for name, member in members.items()}
        assert {a: name for name, leases in held.items() for a in leases} == {
            attempt: found.worker for attempt, found in self.state.attempts.items()
        }
        assert set(self.open) == set(self.state.attempts)
        drained = sum(len(member.leases) for member in members.values() if member.draining)
        assert crew.num_drained_leases == drained

    @invariant()
    def the_canary_goes_first_and_alone(self) -> None:
        """Until it has passed, one worker runs rows of it, or suspects of an earlier submit."""
        if hasattr(self, "state") and self.state._canary is not None and not self.state.finished:
            attempts = self.state.attempts
            assert len({found.worker for found in attempts.values()}) <= 1
            first = {(item.number, row) for item in self.shards for row in range(item.num_rows)}
            canary = set(sorted(first)[: self.canary_rows])
            for found in attempts.values():
                rows = {(found.grant.shard, row) for row in found.grant.rows}
                opened = self.state.backlog.open.get(found.grant.shard)
                suspects = found.grant.group is not None or (opened and opened.complete)
                assert suspects or rows <= canary

    @invariant()
    def what_is_done_was_published(self) -> None:
        """No shard counts as done without a part, and no part is forgotten."""
        if hasattr(self, "state"):
            for number, made in self.state.done.items():
                assert self.published[number] is made

    @invariant()
    def nobody_idles_while_work_waits(self) -> None:
        """A loaded worker without a lease means that no row is in line."""
        if hasattr(self, "state") and not self.state.finished and self.state._canary is None:
            assert not (self.state.crew.idle and self.state.backlog.queue)

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
        for _ in range(400):
            if self.outcomes:
                break
            self.handle(Tick(self.state._now + 61))
            for name in sorted(self.living - self.draining):
                self.loaded.add(name)
                self.handle(WorkerReady(name))
            for attempt in sorted(self.open):
                if attempt in self.open:
                    self.end(attempt)
        assert self.outcomes, "the run never ends"
        self.the_end_is_right()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)

"""All decisions of a run in one pure state machine: facts in, commands out.

No ray, no I/O, no clock: time stands in :class:`~batchrun.events.Tick`. Facts may come late, twice
or from workers that were given up; a published part counts whoever brings the news, because
publishing is create-only.

A lease is a set of rows of one shard. A shard is leased whole, or it is split: its ranges and its
suspects are leased apart, and when all of them are done it is leased whole once more, to publish
from the journal what is there. What is handed out next is :mod:`batchrun.backlog`'s to say, who is
there and has room :mod:`batchrun.crew`'s, who has what :mod:`batchrun.attempts`'; who gets what,
and what follows from news, is said here.

- **Retry first**: what was given back stands first in line, as the journal may have most of it.
- **Deaths**: rows that had a slot when a worker died leave the line and run apart from all others,
  in groups that shrink by eight with each death, until a single one has died alone too often.
- **Devices**: one whose workers die of ever other rows, while others work, is set aside.
- **The end**: when nothing waits, idle workers get the oldest leases once more.

Work is constant for each event, but for what an event changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from batchrun.attempts import Attempt, Attempts
from batchrun.backlog import Backlog, Grant
from batchrun.canary import Canary
from batchrun.crew import MIN_LEASE_ROWS, Crew
from batchrun.devices import MAX_DEATHS, Devices
from batchrun.events import (
    CancelLease,
    Command,
    DrainRun,
    Event,
    FailShard,
    FinishRun,
    LeaseDone,
    LeaseFailed,
    LeaseReturned,
    LeasesWanted,
    Limits,
    LossCause,
    Outcome,
    OutcomeKind,
    RunStarted,
    SetAside,
    StartLease,
    StartWorker,
    StopRequested,
    StopWorker,
    Tick,
    TokensSpent,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
)
from batchrun.meter import Meter
from batchrun.records import Counts, Lease, Part, Shard, Strike, attempt_name
from batchrun.rows import Rows

__all__ = [
    "CancelLease",
    "Command",
    "DrainRun",
    "Event",
    "FailShard",
    "FinishRun",
    "LeaseDone",
    "LeaseFailed",
    "LeaseReturned",
    "LeasesWanted",
    "Limits",
    "LossCause",
    "Outcome",
    "OutcomeKind",
    "RunStarted",
    "RunState",
    "SetAside",
    "StartLease",
    "StartWorker",
    "StopRequested",
    "StopWorker",
    "Tick",
    "TokensSpent",
    "WorkerDraining",
    "WorkerLost",
    "WorkerReady",
]

# After so many loads failed in a row with no worker at work, more tries are no help.
MAX_LOAD_FAILURES = 3
# Beside workers at work, a failing load is tried again after this long.
_LOAD_RETRY_S = 60.0
# After the first worker is ready, all that are asked for are counted on for so long.
_GATHERING_S = 15.0


class RunState:
    """The run. ``done`` are parts published before; ``epoch`` is the run lock's.

    ``max_workers`` are asked for at once; ``min_workers`` (all of them when it is None) are
    counted on when work is shared out, the others for a short while after the first is ready.
    ``max_failed_rows`` is a count, or a fraction of all rows when it is below 1; ``max_retries`` is
    how often more than once a row may outlive a worker that ran it alone. ``todo`` are shards of
    which only some rows have to run, as the others are
    known. ``strikes`` are deaths that earlier drivers wrote down. ``canary_rows`` run
    first, on one worker; ``num_samples`` is how many samples a row has. A lease is given to a
    second, idle worker when it is older than ``speculate_after_s``: before its first journal
    there is nothing that the second could begin with.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        done: Mapping[int, Part],
        *,
        epoch: int,
        max_workers: int,
        min_workers: int | None = None,
        max_failed_rows: float = 0,
        max_retries: int = 2,
        todo: Mapping[int, Rows] | None = None,
        strikes: Iterable[Strike] = (),
        canary_rows: int = 0,
        num_samples: int = 1,
        limits: Limits | None = None,
        speculate_after_s: float = 30.0,
    ) -> None:
        self.shards = {shard.number: shard for shard in shards}
        self.done: dict[int, Part] = {
            number: part for number, part in done.items() if number in self.shards
        }
        self.failed: dict[int, str] = {}
        self.crew = Crew()
        self._devices = Devices()
        self._aside: frozenset[str] = frozenset()
        self.finished = False
        self.backlog = Backlog(
            self.shards, (number for number in self.shards if number not in self.done), todo
        )
        self._epoch = epoch
        self._max_workers = max_workers
        self._min_workers = max_workers if min_workers is None else min_workers
        self._max_failed_rows = max_failed_rows
        self._max_retries = max_retries
        self._num_samples = num_samples
        self._speculate_after_s = speculate_after_s
        self._meter = Meter(limits or Limits())
        self._limit: str | None = None  # the one that is reached
        self._now = 0.0
        self._num_started = 0
        self._num_attempts = 0
        self.attempts = Attempts()
        self._penalty: str | None = None  # a worker that runs dry to isolate suspects
        self._load_failures = 0
        self._no_start_before = 0.0
        self._gathering_until = float("inf")
        self._hopeless = self.backlog.accuse(list(strikes), max_retries)
        self._canary: Canary | None = None
        self._behind: list[int] = []  # shards that wait for the canary
        if canary_rows:
            self._hold_for_canary(canary_rows)

    @property
    def num_ready(self) -> int:
        """Workers that have loaded their model and are not ending."""
        return self.crew.num_ready

    @property
    def stranded_on(self) -> frozenset[str]:
        """The devices that are set aside, while there is no worker but on them; mostly none."""
        if self.crew.num_ready or not self.crew.sitting_on(self._aside):
            return frozenset()
        return self._aside

    def strike(self, event: WorkerLost) -> Strike | None:
        """What is to be written down before ``event`` is handed in.

        None when the death is nobody's fault (the node died, the worker drained or held nothing),
        or when the worker is gone already: one death is one strike.
        """
        member = self.crew.members.get(event.worker)
        if member is None or member.draining or not member.leases or not event.node_lived:
            return None
        held: dict[int, Rows] = {}
        for attempt in member.leases:
            grant = self.attempts[attempt].grant
            held[grant.shard] = held.get(grant.shard, Rows()) | grant.rows
        rows = held
        if event.in_flight:
            flying: dict[int, list[int]] = {}
            for number, ordinal in event.in_flight:
                flying.setdefault(number, []).append(ordinal)
            rows = {
                number: Rows.of(ordinals) & held[number]
                for number, ordinals in flying.items()
                if number in held
            }
            rows = {number: found for number, found in rows.items() if found}
            if not rows:
                return None  # only rows of leases that were cancelled
        return Strike(
            worker=event.worker,
            rows=rows,
            alone=member.alone,
            blind=event.in_flight is None,
            idle=event.in_flight == (),
            cause=event.cause.value,
            message=event.message,
            device=member.device,
        )

    def handle(self, event: Event) -> list[Command]:
        """Take in a fact; the commands to carry out, in order. After the end there are none."""
        if self.finished:
            return []
        commands: list[Command] = []
        match event:
            case RunStarted(now):
                self._now = now
                for number, message in self._hopeless.items():
                    commands += self._fail(number, message)
            case Tick(now):
                self._meter.tick(now, self.crew.num_loaded)
                self._now = max(self._now, now)
            case WorkerReady(name, max_sequences, device, paid_s):
                aside = device in self._aside
                if self.crew.load(name, max_sequences, device, aside=aside):
                    self._load_failures = 0
                    self._gathering_until = min(self._gathering_until, self._now + _GATHERING_S)
                    self._meter.pay(paid_s)
            case WorkerDraining(name):
                self.crew.drain(name)
                self._dismiss(name)
            case WorkerLost():
                commands += self._on_lost(event)
            case LeasesWanted(name, count):
                self.crew.want(name, count)
            case TokensSpent(name, tokens):
                if name in self.crew.members:
                    self._meter.spend(name, tokens)
            case LeaseDone(name, attempt, part, counts):
                if part is not None:
                    commands += self._on_published(attempt, part)
                else:
                    commands += self._on_journaled(name, attempt, counts)
            case LeaseReturned(_, attempt):
                self._on_returned(attempt)
            case LeaseFailed(_, attempt, message):
                commands += self._on_failed(attempt, message)
            case StopRequested(message):
                if self._limit is not None:
                    return commands + self._finish(OutcomeKind.LIMIT_REACHED, self._limit)
                return commands + self._finish(OutcomeKind.INTERRUPTED, message)
        return commands + self._go_on(event)

    def _go_on(self, event: Event) -> list[Command]:
        """What follows from where the run stands now."""
        if len(self.done) + len(self.failed) == len(self.shards):
            return self._finish_complete()
        if self._canary is not None and not self._canary.left:
            problem = self._canary.problem(self._max_failed_rows, self._num_samples)
            if problem is not None:
                return self._finish(OutcomeKind.CANARY_FAILED, problem)
            self._canary = None
            self.backlog.release(
                number
                for number in self._behind
                if number not in self.done and number not in self.failed
            )
            self._behind = []
        if self._load_failures >= MAX_LOAD_FAILURES and not self.num_ready:
            message = event.message if isinstance(event, WorkerLost) else ""
            return self._finish(OutcomeKind.NO_WORKERS, message)
        if self._limit is None:
            self._limit = self._meter.reached()
            if self._limit is not None:
                return [DrainRun(self._limit)]
            return self._start_workers() + self._start_leases()
        return []

    # -- facts about leases ----------------------------------------------------------------

    def _release(self, attempt: str) -> Attempt | None:
        """Forget an attempt; None when it is not known, or not any more."""
        found = self.attempts.remove(attempt)
        if found is not None:
            self.crew.take(found.worker, attempt)
            self.backlog.end_lease(found.grant.shard)
        return found

    def _cancel(self, attempt: str) -> list[Command]:
        found = self._release(attempt)
        return [] if found is None else [CancelLease(found.worker, attempt)]

    def _end_shard(self, number: int) -> list[Command]:
        """Whatever was still to be done for a shard need not be done."""
        self.backlog.drop(number)
        return [
            command
            for attempt in self.attempts.of_shard(number)
            for command in self._cancel(attempt)
        ]

    def _on_published(self, attempt: str, part: Part) -> list[Command]:
        """Count the part, whoever brings the news: of a late worker too."""
        number = part.shard
        found = self.attempts.get(attempt)
        commands: list[Command] = []
        if found is not None and found.grant.shard == number:
            commands += self._on_work(found)
            self._release(attempt)
        if number not in self.shards or number in self.done:
            return commands
        self.done[number] = part
        self.failed.pop(number, None)
        if self._canary is not None:
            self._canary.settle(number, part.counts)
        return commands + self._end_shard(number)

    def _on_work(self, found: Attempt) -> list[Command]:
        """A lease has come to its end, which speaks for the device where rows were run for it."""
        item = self.backlog.open.get(found.grant.shard)
        member = self.crew.members.get(found.worker)
        if member is None or (item is not None and item.complete):
            return []
        self._devices.work(member.device)
        return self._look_at_devices()

    def _look_at_devices(self) -> list[Command]:
        """Set devices aside, and give those back that were not to blame, for workers to come."""
        before, self._aside = self._aside, self._devices.aside
        message = f"{MAX_DEATHS} workers in a row died on it, with other rows each time"
        commands: list[Command] = [SetAside(name, message) for name in sorted(self._aside - before)]
        for worker in self.crew.sitting_on(before - self._aside):
            self.crew.remove(worker)
            self._meter.lose(worker)
            commands.append(StopWorker(worker))
        return commands

    def _on_journaled(self, name: str, attempt: str, counts: Counts) -> list[Command]:
        """Rows are safe in the journal. Late news of a lease that was given up do not count: its
        rows are in line again, and who gets them finds them in the journal."""
        found = self.attempts.get(attempt)
        if found is None:
            return []
        if found.grant.whole:
            self._on_returned(attempt)  # a whole lease without its part is not done
            return []
        commands = self._on_work(found)
        self._release(attempt)
        number = found.grant.shard
        twin = self.attempts.part(found)
        commands += [] if twin is None else self._cancel(twin)
        if found.grant.group is not None:
            self.backlog.acquit(found.grant)
        if self._canary is not None:
            self._canary.add(number, counts)
        return commands + self._settle(number, found.worker)

    def _settle(self, number: int, worker: str | None = None) -> list[Command]:
        """A shard of which only the part is missing goes to who finished its last rows."""
        if self._canary is not None and number == self._canary.border:
            self._settle_border(self._canary, number)
        if not self.backlog.settle(number):
            return []
        member = self.crew.members.get(worker or "")
        if (
            worker is None
            or member is None
            or not member.is_open
            or member.alone
            or worker == self._penalty
            or self._limit is not None
        ):
            return []
        return [self._start_lease(worker, self.backlog.take_assembly(number))]

    def _settle_border(self, canary: Canary, number: int) -> None:
        item = self.backlog.open[number]
        if not (item.waiting or item.groups or item.num_leases):
            num_lost = len(item.lost)
            canary.settle(number, Counts(rows=num_lost, failed_rows=num_lost))

    def _on_returned(self, attempt: str) -> None:
        found = self._release(attempt)
        if found is not None and self.attempts.part(found) is None:
            self.backlog.give_back(found.grant)

    def _on_failed(self, attempt: str, message: str) -> list[Command]:
        found = self._release(attempt)
        if found is None:
            return []  # of a lease that was given to another worker meanwhile
        return self._fail(found.grant.shard, message)

    def _fail(self, number: int, message: str) -> list[Command]:
        shard = self.shards[number]
        self.failed[number] = message
        if self._canary is not None:
            rows = shard.num_rows
            self._canary.settle(number, Counts(rows=rows, failed_rows=rows))
        return [FailShard(shard, message), *self._end_shard(number)]

    # -- facts about workers ---------------------------------------------------------------

    def _on_lost(self, event: WorkerLost) -> list[Command]:
        strike = self.strike(event)
        member = self.crew.members.get(event.worker)
        if member is None:
            return []
        self._dismiss(event.worker)
        self._meter.lose(event.worker)
        if not member.ready and event.node_lived:
            self._load_failures += 1
            if self._load_failures >= MAX_LOAD_FAILURES:
                self._no_start_before = self._now + _LOAD_RETRY_S
        if strike is not None and not strike.idle:
            self._devices.die(strike.device, strike.rows, alone=strike.alone)
        commands = self._look_at_devices()
        self.crew.remove(event.worker)
        held = [found for attempt in member.leases if (found := self._release(attempt))]
        # The first in line is the last that is put there: so they keep their order.
        for found in reversed(held):
            number = found.grant.shard
            if self.attempts.part(found) is not None or number in self.failed:
                continue  # somebody else has the rows, or the shard was given up just now
            if strike is None or number not in strike.rows:
                self.backlog.give_back(found.grant)
                continue
            message = self.backlog.blame(found.grant, strike, self._max_retries)
            commands += self._settle(number) if message is None else self._fail(number, message)
        return commands

    def _dismiss(self, worker: str) -> None:
        if self._penalty == worker:
            self._penalty = None

    # -- commands --------------------------------------------------------------------------

    def _num_units(self) -> int:
        """How many workers could find something to do in what is in line."""
        in_line = max(len(self.backlog.queue), self.backlog.num_rows // MIN_LEASE_ROWS)
        return in_line + self.backlog.num_groups

    def _start_workers(self) -> list[Command]:
        """Workers up to the number asked for, but never more than find something to do.

        One that drains will give its leases back. The canary needs a single worker: the others
        come when it has passed.
        """
        if self._now < self._no_start_before:
            return []
        crew = self.crew
        most = 1 if self._canary is not None else self._max_workers
        wanted = self._num_units() + crew.num_drained_leases - crew.num_idle
        commands: list[Command] = []
        for _ in range(min(most - crew.num_living, wanted)):
            self._num_started += 1
            name = f"{self._epoch}-{self._num_started}"
            crew.add(name)
            commands.append(StartWorker(name))
        return commands

    def _start_leases(self) -> list[Command]:
        """Suspects to one idle worker, a lease to each of the others, then more to those that
        have room, but for what is kept for workers still to come: a piece each, and as many rows
        as :meth:`_num_kept_rows` says. What nobody waits for is given a second time."""
        crew, backlog = self.crew, self.backlog
        if self._canary is not None:
            return self._start_canary(self._canary)
        commands = self._isolate()
        while crew.idle and backlog.queue:
            sharing = len(crew.idle) + self._num_expected()
            share = -(-backlog.num_rows // sharing)
            commands.append(self._start_next(next(iter(crew.idle)), share))
        while crew.hungry and backlog.queue:
            name = next((name for name in crew.hungry if name != self._penalty), None)
            if name is None:
                break
            expected = self._num_expected()
            spare = backlog.num_rows - self._num_kept_rows(crew.members[name].min_rows)
            if expected and (spare <= 0 or self._num_units() - backlog.num_groups <= expected):
                break
            commands.append(self._start_next(name, spare))
        if not backlog.queue:
            commands += self._speculate()
        return commands

    def _start_canary(self, canary: Canary) -> list[Command]:
        """All of it to one worker, one lease after the other, suspects too."""
        commands: list[Command] = []
        while not self.attempts and self.crew.idle:
            name = next(iter(self.crew.idle))
            grant = self.backlog.take_group(self._accepts(name))
            if grant is not None:
                commands.append(self._start_lease(name, grant))
            elif self.backlog.queue:
                commands.append(self._start_lease(name, self.backlog.take(1, MIN_LEASE_ROWS)))
            else:
                break
        return commands

    def _num_expected(self) -> int:
        """Workers that are counted on and still to come: at first all that are asked for, as they
        start together; later those without which the run would not have begun, as for the others
        the cluster may have no room."""
        if self._now < self._gathering_until:
            return self.crew.num_starting
        return max(0, min(self.crew.num_starting, self._min_workers - self.crew.num_ready))

    def _num_kept_rows(self, min_rows: int) -> int:
        """Rows that are kept for workers still to come, so that who is early does not take it all:
        for each its fair share of what is not done, as far as it fills an engine."""
        expected = self._num_expected()
        fair = (self.backlog.num_rows + self.attempts.num_rows) // max(
            1, expected + self.crew.num_ready
        )
        return expected * min(min_rows, fair)

    def _start_next(self, name: str, most: int) -> StartLease:
        """Give the next rows to a worker; no more than ``most`` only to fill its engine."""
        crew = self.crew
        counted_on = max(1, crew.num_ready + self._num_expected(), self._min_workers)
        min_rows = max(MIN_LEASE_ROWS, min(crew.members[name].min_rows, most))
        return self._start_lease(name, self.backlog.take(counted_on, min_rows))

    def _isolate(self) -> list[Command]:
        """Suspects run on one worker at a time while others have something better to do.

        Where no idle worker can take them, one that is at work gets no further leases until it
        is idle.
        """
        crew, backlog = self.crew, self.backlog
        commands: list[Command] = []
        if not backlog.num_groups:
            self._penalty = None
            return commands
        for name in list(crew.idle):
            if crew.isolating and backlog.queue:
                break
            grant = backlog.take_group(self._accepts(name))
            if grant is not None:
                commands.append(self._start_lease(name, grant))
                self._penalty = None
            if not backlog.num_groups:
                break
        if backlog.num_groups and not crew.isolating and self._penalty is None:
            self._penalty = self._choose_penalty()
        return commands

    def _accepts(self, name: str) -> Callable[[frozenset[str]], bool]:
        """Whether a worker may run a row that died on some devices: not while there is another."""
        device, devices = self.crew.members[name].device, self.crew.devices
        return lambda avoid: device not in avoid or not (devices.keys() - avoid)

    def _choose_penalty(self) -> str | None:
        """The worker that has the least to finish, among those that could take suspects."""
        members = self.crew.members
        able = [
            (len(members[name].leases), name)
            for name, member in members.items()
            if member.is_open and member.leases and self.backlog.has_group(self._accepts(name))
        ]
        return min(able)[1] if able else None

    def _speculate(self) -> list[Command]:
        """Give idle workers the oldest leases once more: the first to end counts."""
        commands: list[Command] = []
        while self.crew.idle and (attempt := self.attempts.oldest_single()) is not None:
            found = self.attempts[attempt]
            if self._now - found.since < self._speculate_after_s:
                break
            command = self._start_lease(next(iter(self.crew.idle)), found.grant, twin=attempt)
            commands.append(command)
        return commands

    def _start_lease(self, name: str, grant: Grant, twin: str | None = None) -> StartLease:
        self._num_attempts += 1
        attempt = attempt_name(self._epoch, self._num_attempts)
        alone = grant.group is not None
        self.attempts.add(attempt, Attempt(name, grant, self._now, twin))
        self.crew.give(name, attempt, alone=alone)
        lost = self.backlog.lease(grant)
        shard = self.shards[grant.shard]
        lease = Lease(shard, self._epoch, attempt, grant.rows, grant.whole, alone, lost)
        return StartLease(name, lease)

    def _hold_for_canary(self, num_rows: int) -> None:
        canary = self._canary = Canary(self.shards.values(), self.done, num_rows)
        self._behind = [
            number
            for number in self.shards
            if number not in self.done
            and number not in self._hopeless
            and (number not in canary.left or number == canary.border)
        ]
        for number in self._behind:
            keep = Rows.all(canary.border_rows) if number == canary.border else Rows()
            self.backlog.hold(number, keep)
        if canary.border in self.backlog.open:
            # Earlier drivers may have given all of its first rows up.
            self._settle_border(canary, canary.border)

    # -- the end ---------------------------------------------------------------------------

    def _finish_complete(self) -> list[Command]:
        counts = self._counts()
        failed_rows = counts.failed_rows + self._rows(self.failed)
        total = self._rows(self.shards)
        allowed = self._max_failed_rows
        if 0 < allowed < 1:
            allowed *= total
        if self.failed:
            kind = OutcomeKind.TOO_MANY_FAILURES
            message = f"{len(self.failed)} of {len(self.shards)} shards could not be run"
        elif failed_rows > allowed:
            kind = OutcomeKind.TOO_MANY_FAILURES
            message = f"{failed_rows} of {total} rows failed"
        else:
            kind = OutcomeKind.SUCCESS
            message = f"{total} rows done" + (f", {failed_rows} failed" if failed_rows else "")
        return self._finish(kind, message)

    def _finish(self, kind: OutcomeKind, message: str) -> list[Command]:
        self.finished = True
        counts = self._counts()
        outcome = Outcome(
            kind=kind,
            message=message,
            counts=counts,
            failed_rows=counts.failed_rows + self._rows(self.failed),
            failed_shards=dict(self.failed),
        )
        return [*(StopWorker(name) for name in self.crew.members), FinishRun(outcome)]

    def _counts(self) -> Counts:
        return sum((part.counts for part in self.done.values()), Counts())

    def _rows(self, numbers: Iterable[int]) -> int:
        return sum(self.shards[number].num_rows for number in numbers)

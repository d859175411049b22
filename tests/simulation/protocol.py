"""One seed, one schedule: the real coordinator among simulated drivers, workers and storage.

Time, threads and storage are replaced, so that whatever can happen between two steps does happen
to some seed: a process dies at any of them, a request is applied after its sender died, an answer
is lost and the request silently sent again, a worker that was given up goes on (zombie), two
drivers are at work at once, a driver dies between a death and its strike, a worker dies between
journal and publication, an input file is added or replaced, a journal object disappears, a node is
drained, rows kill whoever runs them.

A rule can be taken away (:data:`RULES`); then some schedule must show the damage.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from batchrun.coordinator import (
    CancelLease,
    Event,
    FinishRun,
    LeaseDone,
    LeaseFailed,
    LeaseReturned,
    LeasesWanted,
    LossCause,
    OutcomeKind,
    RunStarted,
    RunState,
    StartLease,
    StartWorker,
    Tick,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
)
from batchrun.records import Counts, Lease, Part, Shard, Strike
from batchrun.rows import Rows

RULES = {
    "uncond": "a part is put only where none is",
    "cleanup": "an ambiguous answer is settled by reading back, never by tidying up",
    "unproven": "a lease is done when its part is seen, not when it was sent",
    "nodedupe": "of two journal entries for a row the first counts",
    "blindchain": "tokens are appended only where the chain has come to",
    "mixchain": "a chain of tokens belongs to one attempt",
    "nojournal": "a lease begins with what the journal has",
    "nopin": "input is read only as it was planned",
    "planrace": "a plan is put only where none is",
    "renumber": "an appended plan goes on counting shards",
    "memstrike": "strikes outlive the driver",
    "noisolation": "rows that were in flight at a death run apart",
    "company": "only a death alone counts for a row",
    "keeplost": "a row that is given up is not run again",
    "blamenode": "the death of a node is nobody's fault",
    "forget": "what a lost worker had goes back in line",
}
"""What holds the run together, by the name under which it can be taken away."""

SLOTS, FLUSH_EVERY, MAX_RETRIES, HORIZON, MAX_STEPS = 6, 2, 1, 1200, 6_000

Process = Generator[None, None, Any]


class Violation(Exception):
    """The protocol broke a promise."""


def length_of(shard: int, row: int) -> int:
    """How many tokens a row has in the end."""
    return 1 + (row * 7 + shard) % 6


def following(tokens: tuple[int, ...], tie: int) -> int:
    """The next token: it depends on all before it, and on how a worker rounds."""
    before = tokens[-1] if tokens else 0
    return (before * 31 + 7 * tie + 1) % 1_000_003


def part_key(shard: Shard) -> str:
    """The name of a shard's part."""
    return f"part/{shard.number}-{shard.path}-{shard.fingerprint}"


def is_text(tokens: tuple[int, ...]) -> bool:
    """Whether each token can follow those before it."""
    return all(
        token in (following(tokens[:at], 0), following(tokens[:at], 1))
        for at, token in enumerate(tokens)
    )


@dataclass(slots=True)
class Open:
    """A lease in a worker: rows to do, rows that run with their tokens, what is not saved yet.

    ``retry`` is the one that the worker belongs to, if any.
    """

    lease: Lease
    todo: list[int]
    finished: list[tuple[int, Any]]
    prefixes: dict[int, tuple[int, ...]]
    running: dict[int, tuple[int, ...]] = field(default_factory=dict)
    read: dict[int, str] = field(default_factory=dict)  # the version of the input, by row
    unsaved: list[tuple[int, Any]] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)
    seq: int = 0
    retry: Any = None

    @property
    def is_over(self) -> bool:
        return not self.todo and not self.running


@dataclass(slots=True)
class Worker:
    """A worker process as its driver and its machine know it."""

    inbox: list[Any] = field(default_factory=list)
    pid: int = 0
    flight: tuple[tuple[int, int], ...] = ()
    ended: bool = False
    retry: Any = None


class Simulation:
    """Everything there is, and the faults that befall it."""

    def __init__(self, seed: int, without: str = "") -> None:
        self.random = random.Random(seed)
        self.without = without
        self.step = 0
        self.objects: dict[str, tuple[Any, str]] = {}
        self.requests: list[dict[str, Any]] = []
        self.processes: dict[int, Process] = {}
        self.num_processes = 0
        self.num_drivers = 0
        self.driver_pids: dict[int, int] = {}  # by epoch, which is also the mail box
        self.mail: defaultdict[int, list[Event]] = defaultdict(list)
        self.faults = True
        choice = self.random.choice
        self.inputs = [(f"f{i}", choice([3, 30, 45])) for i in range(choice([1, 2]))]
        self.version = {name: 0 for name, _ in self.inputs}
        self.swapped: set[str] = set()
        self.poison = {
            (name, ordinal): self.random.randrange(5)
            for name in ("f0", "f1", "f9")
            for ordinal in range(45)
            if self.random.random() < 0.03
        }
        self.storm = self.random.random() < 0.5  # drivers die together with workers
        self.spurious = MAX_RETRIES
        self.spot = self.random.random() < 0.3  # nodes go away all the time
        self.seen: Counter[str] = Counter()
        self.tokens = self.tokens_again = 0
        self.generated: Counter[tuple[str, int, int]] = Counter()

    def chance(self, probability: float) -> bool:
        """Whether a fault happens now."""
        return self.faults and self.random.random() < probability

    def spawn(self, process: Process) -> int:
        """A new process."""
        self.num_processes += 1
        self.processes[self.num_processes] = process
        return self.num_processes

    # -- storage ---------------------------------------------------------------------------

    def put(
        self, key: str, body: Any, token: str, *, create: bool = True
    ) -> Generator[None, None, str]:
        """As an SDK does it: silently sent again. Gives ``made``, ``there`` or ``unknown``."""
        for _ in range(3):
            request = {"key": key, "body": body, "token": token, "create": create, "answer": None}
            self.requests.append(request)
            for _ in range(6):
                yield
                if request["answer"] is not None:
                    break
            if request["answer"] is None or self.chance(0.15):
                self.seen["answers lost"] += 1
                continue
            return str(request["answer"])
        return "unknown"

    def apply(self, request: dict[str, Any]) -> str:
        """A request arrives at the store."""
        key = request["key"]
        if request.get("delete"):
            self.objects.pop(key, None)
            return "gone"
        if request["create"] and key in self.objects:
            return "there"
        if key in self.objects and self.objects[key][0] != request["body"]:
            if key.startswith(("part/", "plan/", "manifest/")):
                raise Violation(f"I1: {key} is overwritten")
        self.objects[key] = (request["body"], request["token"])
        return "made"

    def listed(self, prefix: str) -> list[str]:
        """Keys in order."""
        return sorted(key for key in self.objects if key.startswith(prefix))

    # -- workers ---------------------------------------------------------------------------

    def read_journal(
        self, shard: Shard
    ) -> tuple[dict[int, Any], list[tuple[int, Any]], dict[int, tuple[int, ...]]]:
        """Finished rows (the first of each, and all), and tokens of rows that ran."""
        first: dict[int, Any] = {}
        everything: list[tuple[int, Any]] = []
        chains: dict[Any, tuple[int, ...]] = {}
        for key in self.listed(f"journal/{shard.number}/"):
            (fingerprint, finished, running), attempt = self.objects[key]
            if fingerprint != shard.fingerprint:
                continue
            for ordinal, value in finished:
                first.setdefault(ordinal, value)
                everything.append((ordinal, value))
            for ordinal, at, tokens in running:
                chain = (ordinal, "" if self.without == "mixchain" else attempt)
                known = chains.get(chain, ())
                if at == len(known) or self.without == "blindchain":
                    chains[chain] = known + tokens
        longest: dict[int, tuple[int, ...]] = {}
        for (ordinal, _), tokens in chains.items():
            if len(tokens) > len(longest.get(ordinal, ())):
                longest[ordinal] = tokens
        return first, everything, longest

    def known(
        self, shard: Shard, retry: Any
    ) -> tuple[dict[int, Any], list[tuple[int, Any]], dict[int, tuple[int, ...]]]:
        """What is there of a shard when a lease of it begins, as :meth:`read_journal` has it."""
        return self.read_journal(shard)

    def open_lease(self, lease: Lease, retry: Any) -> Open:
        """What a lease begins with."""
        first, everything, prefixes = self.known(lease.shard, retry)
        if self.without == "nojournal":
            first, everything, prefixes = {}, [], {}
        lost = {} if self.without == "keeplost" else lease.lost
        kept = everything if self.without == "nodedupe" else list(first.items())
        finished = [(row, value) for row, value in kept if row in lease.rows and row not in lost]
        finished += [(row, ("lost", lease.shard.fingerprint, ())) for row in lost]
        done = {row for row, _ in finished}
        todo = [row for row in lease.rows if row not in done]
        return Open(lease, todo, finished if lease.whole else [], prefixes, retry=retry)

    def worker(self, name: str, me: Worker, box: int) -> Process:
        """Loads, works leases off, writes journals, publishes; ends when nobody asks any more."""
        for _ in range(self.random.randrange(12)):
            yield

        def tell(news: Event) -> None:
            self.mail[box].append(news)

        tell(WorkerReady(name, 8, self.random.choice("ab")))
        leases: list[Open] = []
        idle = steps = 0
        while idle < 80:
            yield
            idle = 0 if leases or self.lives(box) else idle + 1
            draining = False
            while me.inbox:
                match me.inbox.pop(0):
                    case Lease() as lease:
                        leases.append(self.open_lease(lease, me.retry))
                        self.check_journal(leases[-1])
                    case CancelLease(_, attempt):
                        leases = [item for item in leases if item.lease.attempt != attempt]
                    case "drain":
                        draining = True
                    case "stop":
                        return
            if draining:
                tell(WorkerDraining(name))
                for item in leases:
                    yield from self.flush(item)
                    tell(LeaseReturned(name, item.lease.attempt))
                me.ended = True
                return
            room = SLOTS - sum(len(item.running) for item in leases)
            for item in list(leases):
                if not self.readable(item.lease.shard):
                    leases.remove(item)
                    attempt = item.lease.attempt
                    tell(LeaseFailed(name, attempt, "the input has changed"))
                    continue
                while item.todo and room > 0:
                    row = item.todo.pop(0)
                    item.running[row] = item.prefixes.get(row, ())
                    item.read[row] = f"v{self.version[item.lease.shard.path]}"
                    room -= 1
            # Written before the step: it is what the machine finds when the process is gone.
            me.flight = tuple((i.lease.shard.number, row) for i in leases for row in i.running)
            yield
            for item in leases:
                if self.advance(item):
                    return  # killed by one of its rows
            steps += 1
            for item in list(leases):
                if not item.is_over:
                    if steps % FLUSH_EVERY == 0:
                        yield from self.flush(item)
                    continue
                done = yield from self.end_lease(name, item)
                if done is not None:
                    leases.remove(item)
                    tell(done)
            if all(not item.todo for item in leases):
                tell(LeasesWanted(name, max(0, 2 - len(leases))))

    def readable(self, shard: Shard) -> bool:
        """Whether the input is what was planned, as a conditional read would tell."""
        return self.without == "nopin" or f"v{self.version[shard.path]}" == shard.fingerprint

    def advance(self, item: Open) -> bool:
        """A token for each row that runs; True when one of them kills the process."""
        shard = item.lease.shard
        for row, tokens in list(item.running.items()):
            if self.poison.get((shard.path, row), 99) <= len(tokens):
                return True
            length = length_of(shard.number, row)
            if len(tokens) < length:
                tokens = (*tokens, following(tokens, tie=int(item.lease.attempt[-1]) % 2))
            self.tokens += 1
            self.generated[shard.path, row, len(tokens)] += 1
            item.running[row] = tokens
            if len(tokens) >= length:
                del item.running[row]
                value = self.value(item, row, tokens)
                item.unsaved.append((row, value))
                item.finished.append((row, value))
        return False

    def value(self, item: Open, row: int, tokens: tuple[int, ...]) -> Any:
        """What a row gave: how it ended, of which input, its text."""
        return "ok", item.read[row], tokens

    def check_journal(self, item: Open) -> None:
        """I6: no row that the journal has at the beginning of a lease is run in it."""
        first, _, prefixes = self.known(item.lease.shard, item.retry)
        if first.keys() & set(item.todo) - set(item.lease.lost):
            raise Violation("I6: a journaled row is generated again")
        for row in item.todo:
            if item.prefixes.get(row, ()) != prefixes.get(row, ()):
                raise Violation("I6: journaled tokens are sampled again")

    def flush(self, item: Open) -> Process:
        """What is not known to be saved, in one object; the same again where that is not known."""
        running = tuple(
            (row, item.saved.get(row, 0), tokens[item.saved.get(row, 0) :])
            for row, tokens in item.running.items()
            if len(tokens) > item.saved.get(row, 0)
        )
        finished = tuple(item.unsaved)
        if not (running or finished):
            return True
        lease = item.lease
        item.seq += 1
        key = f"journal/{lease.shard.number}/{lease.attempt}-{item.seq:04}"
        body = (lease.shard.fingerprint, finished, running)
        if (yield from self.put(key, body, lease.attempt)) != "made":
            return False
        item.unsaved = item.unsaved[len(finished) :]
        for row, at, tokens in running:
            item.saved[row] = at + len(tokens)
        return True

    def end_lease(self, name: str, item: Open) -> Generator[None, None, Event | None]:
        """Publish, or make the journal safe; None when it has to be tried again."""
        lease = item.lease
        if not lease.whole:
            safe = yield from self.flush(item)
            rows = Counts(rows=len(lease.rows))
            return LeaseDone(name, lease.attempt, None, rows) if safe else None
        part = yield from self.publish(item)
        return None if part is None else LeaseDone(name, lease.attempt, part)

    def publish(self, item: Open) -> Generator[None, None, Part | None]:
        """Put a shard's part in its place; None when it has to be tried again."""
        lease, shard = item.lease, item.lease.shard
        key = part_key(shard)
        body = tuple(sorted(item.finished, key=lambda pair: pair[0]))
        if self.without == "unproven":
            self.requests.append(
                {"key": key, "body": body, "token": lease.attempt, "create": True, "answer": None}
            )
            return Part(shard.number, key, "", 1, "", shard.num_rows)
        answer = yield from self.put(key, body, lease.attempt, create=self.without != "uncond")
        part = Part(shard.number, key, lease.attempt, 1, "", shard.num_rows)
        if answer == "made":
            return part
        if self.without == "cleanup":
            self.requests.append({"key": key, "delete": True})
            return None
        if self.chance(0.05) or key not in self.objects:
            return None
        owner = self.objects[key][1]
        self.seen["own parts found" if owner == lease.attempt else "races lost"] += 1
        return replace(part, attempt=owner)

    # -- drivers ---------------------------------------------------------------------------

    def read_plan(self) -> list[Shard]:
        """All shards that were ever planned."""
        return [shard for key in self.listed("plan/") for shard in self.objects[key][0]]

    def plan(self) -> Process:
        """Append what is new, until the plan has all inputs; the first to put wins."""
        while True:
            known = self.read_plan()
            paths = {shard.path for shard in known}
            new = [pair for pair in self.inputs if pair[0] not in paths]
            if not new:
                return known
            first = 0 if self.without == "renumber" else len(known)
            shards = tuple(
                Shard(first + i, path, "", 1, f"v{self.version[path]}", (0,), 0, rows)
                for i, (path, rows) in enumerate(new)
            )
            key = f"plan/{len(self.listed('plan/')) + 1:04}"
            yield from self.put(key, shards, "", create=self.without != "planrace")

    def driver(self, epoch: int, box: int) -> Process:
        """A submit: plan, what is done, then the coordinator's commands until it ends."""
        shards: list[Shard] = yield from self.plan()
        if len({shard.number for shard in shards}) < len(shards):
            raise Violation("I2: two shards have one number")
        done = {}
        for shard in shards:
            key = part_key(shard)
            if key in self.objects:
                attempt = self.objects[key][1]
                done[shard.number] = Part(shard.number, key, attempt, 1, "", shard.num_rows)
        failed = yield from self.drive(shards, done, epoch, box)
        if failed is not None:
            yield from self.commit(shards, failed)

    def drive(
        self,
        shards: Sequence[Shard],
        done: Mapping[int, Part],
        epoch: int,
        box: int,
        retry: Any = None,
        todo: Mapping[int, Rows] | None = None,
    ) -> Generator[None, None, Mapping[int, str] | None]:
        """The coordinator's commands until the run ends: the shards that failed, if it came to its
        end."""
        strikes = [self.objects[key][0] for key in self.listed("strike/")]
        state = RunState(
            shards,
            done,
            epoch=epoch,
            max_workers=2,
            max_failed_rows=10**6,
            max_retries=MAX_RETRIES,
            todo=todo,
            strikes=[] if self.without == "memstrike" else strikes,
            canary_rows=self.random.choice([0, 0, 5]) if retry is None else 0,
            speculate_after_s=60,
        )
        if self.without == "forget":
            state.backlog.give_back = lambda grant: None  # type: ignore[method-assign]
        workers: dict[str, Worker] = {}
        events: list[Event] = [RunStarted()]
        while True:
            yield
            events += self.mail.pop(box, [])
            events.append(Tick(float(self.step)))
            while events:
                event = events.pop(0)
                yield from self.take_in(event, state, epoch, retry)
                for command in state.handle(event):
                    match command:
                        case StartWorker(name):
                            member = workers[name] = Worker(retry=retry)
                            member.pid = self.spawn(self.worker(name, member, box))
                        case StartLease(name, lease) if name in workers:
                            workers[name].inbox.append(lease)
                        case CancelLease(name, _) if name in workers:
                            workers[name].inbox.append(command)
                        case FinishRun(outcome):
                            for member in workers.values():
                                member.inbox.append("stop")
                            finished = OutcomeKind.SUCCESS, OutcomeKind.TOO_MANY_FAILURES
                            return state.failed if outcome.kind in finished else None
            for name, member in list(workers.items()):
                gone = yield from self.look_after(state, name, member)
                if gone is not None:
                    del workers[name]
                    events.append(gone)

    def take_in(self, event: Event, state: RunState, epoch: int, retry: Any) -> Process:
        """What a driver does about a fact before the coordinator hears of it."""
        return None
        yield

    def look_after(
        self, state: RunState, name: str, member: Worker
    ) -> Generator[None, None, WorkerLost | None]:
        """Whether a worker is gone, or seems to be; the strike is written before it is said."""
        alive = member.pid in self.processes
        if alive and self.chance(0.006):
            self.seen["zombies"] += 1
            return WorkerLost(name, LossCause.NODE, "no answer", node_lived=False)
        if alive and self.chance(0.003):
            self.seen["drains"] += 1
            member.inbox.append("drain")
        if alive:
            return None
        if member.ended:
            return WorkerLost(name, LossCause.NODE, "drained", node_lived=False)
        node_lived = member.pid not in self.dead_nodes or self.without == "blamenode"
        known = self.without == "company" or not self.chance(0.1)
        in_flight = member.flight if known else None
        lost = WorkerLost(name, LossCause.CRASH, "died", node_lived, in_flight)
        if self.without == "noisolation":
            return replace(lost, node_lived=False)
        if self.storm and node_lived and self.chance(0.1):
            raise DriverDies
        strike = state.strike(lost)
        if strike is None:
            return lost
        if self.without == "company":
            strike = _blame_first(state, strike)
        for _ in range(9):
            if (yield from self.put(f"strike/{name}", strike, "")) in ("made", "there"):
                break
        if self.storm and self.chance(0.7):
            raise DriverDies
        return lost

    def commit(self, shards: list[Shard], failed: Mapping[int, str]) -> Process:
        """The manifest, from what storage has."""
        entries = []
        for shard in shards:
            if shard.number in failed:
                if shard.path not in self.swapped:
                    raise Violation(f"I7: an innocent shard is given up ({failed[shard.number]})")
                continue
            key = part_key(shard)
            if key not in self.objects:
                raise Violation("I3: a finished shard has no part")
            entries.append((key, self.objects[key][1]))
        name = f"manifest/{len(shards):04}" + ("" if not failed else f"-failed-{self.step}")
        yield from self.put(name, tuple(entries), "")
        return None

    def sweep(self) -> Process:
        """Deletes journals of published shards; and, as a fault, any journal object."""
        while True:
            for key in self.listed("journal/"):
                number = key.split("/")[1]
                published = bool(self.listed(f"part/{number}-"))
                if published or self.chance(0.002):
                    self.seen["journals deleted"] += not published
                    self.requests.append({"key": key, "delete": True})
                yield
            for _ in range(20):
                yield

    # -- the world -------------------------------------------------------------------------

    def run(self) -> Simulation:
        """Until all is done after the faults have stopped. Raises Violation."""
        self.dead_nodes: set[int] = set()
        self.sweeper = self.spawn(self.sweep())
        self.submit()
        if self.random.random() < 0.4:
            self.seen["second drivers"] += 1
            self.submit()
        while self.step < MAX_STEPS:
            self.step += 1
            self.faults = self.step < HORIZON
            if self.requests and self.random.random() < 0.5:
                late = self.random.randrange(len(self.requests)) if self.chance(0.5) else 0
                request = self.requests.pop(late)
                if self.chance(0.05):
                    self.seen["requests lost"] += 1
                else:
                    request["answer"] = self.apply(request)
            pid = self.random.choice(list(self.processes))
            self.run_step(pid)
            self.disturb()
            if self.step % 40 == 0 and not self.lives(*self.driver_pids):
                if self.is_finished():
                    break
                self.submit()
        if not self.is_finished():
            raise Violation("I5: the run never ends")
        self.check()
        return self

    def submit(self) -> None:
        """Somebody submits; an earlier driver may still be there."""
        self.num_drivers += 1
        pid = self.spawn(self.driver(self.num_drivers, self.num_drivers))
        self.driver_pids[self.num_drivers] = pid

    def lives(self, *epochs: int) -> bool:
        """Whether one of these drivers is still there."""
        return any(self.driver_pids[epoch] in self.processes for epoch in epochs)

    def run_step(self, pid: int) -> None:
        """One step of a process, or its death."""
        if self.chance(0.003 if not self.spot else 0.012):
            del self.processes[pid]
            if self.spurious and self.random.random() < 0.5:
                self.spurious -= (
                    1  # a few times a process dies for no reason, beside its living machine
                )
            else:
                self.dead_nodes.add(pid)
            self.seen["killed"] += 1
            if pid == self.sweeper:
                self.sweeper = self.spawn(self.sweep())
            return
        try:
            next(self.processes[pid])
        except StopIteration:
            del self.processes[pid]
        except DriverDies:
            self.seen["drivers died with a worker"] += 1
            del self.processes[pid]

    def disturb(self) -> None:
        """What happens to the world by itself."""
        if self.chance(0.002):
            self.seen["second drivers"] += 1
            self.submit()
        if self.chance(0.05 if self.step < 40 else 0.001) and len(self.inputs) < 3:
            self.seen["inputs added"] += 1
            self.inputs.append(("f9", self.random.choice([3, 30])))
            self.version["f9"] = 0
        if self.chance(0.0003):
            self.replace_input()

    def replace_input(self) -> None:
        """Somebody puts another file in the place of one."""
        path, _ = self.random.choice(self.inputs)
        self.seen["inputs replaced"] += 1
        self.version[path] += 1
        self.swapped.add(path)

    def is_finished(self) -> bool:
        """Whether a manifest covers all that was planned, or can cover it no more."""
        plan = self.read_plan()
        if {shard.path for shard in plan} != {path for path, _ in self.inputs}:
            return False
        return bool(self.listed(f"manifest/{len(plan):04}"))

    def check(self) -> None:
        """What is published, against what was asked for."""
        for shard in self.read_plan():
            key = part_key(shard)
            if key not in self.objects:
                if shard.path not in self.swapped:
                    raise Violation("I3: a part is missing")
                continue
            rows, _ = self.objects[key]
            if [row for row, _ in rows] != list(range(shard.num_rows)):
                raise Violation("I2: rows are lost or there twice")
            for row, (status, version, tokens) in rows:
                length = length_of(shard.number, row)
                deadly = self.poison.get((shard.path, row), 99) < length
                if (status == "lost") != deadly:
                    raise Violation(f"I7: {'a deadly' if deadly else 'an innocent'} row is wrong")
                if version != shard.fingerprint:
                    raise Violation("I4: a row is of another input")
                if not deadly and not (len(tokens) == length and is_text(tokens)):
                    raise Violation("I4: a text is wrong")
        for key in self.listed("manifest/"):
            for part, token in self.objects[key][0]:
                if self.objects.get(part, ("", ""))[1] != token:
                    raise Violation("I3: the manifest names another part")
        # Two deaths find a row among those in flight, two more where nobody knows which those
        # were; each driver at work at the same time, and each worker killed meanwhile, adds some.
        most = 4 + MAX_RETRIES + 1
        most += most * self.seen["second drivers"] + self.seen["zombies"] + self.seen["killed"]
        strikes = [self.objects[key][0] for key in self.listed("strike/")]
        paths = {shard.number: shard.path for shard in self.read_plan()}
        died = Counter(
            (number, row)
            for strike in strikes
            for number, rows in strike.rows.items()
            for row in rows
            if (paths[number], row) in self.poison
        )
        if max(died.values(), default=0) > most:
            raise Violation("I7: a row kills on and on")
        self.tokens_again = sum(count - 1 for count in self.generated.values())


class DriverDies(Exception):
    """A driver ends here, whatever it was about to do."""


def _blame_first(state: RunState, strike: Strike) -> Strike:
    """A strike that takes the first row for the culprit; the coordinator is told so too."""
    number = min(strike.rows)
    guilty = replace(strike, rows={number: strike.rows[number].split(1)[0]}, alone=True)
    state.strike = lambda event: guilty  # type: ignore[method-assign]
    return guilty


def first_violation(
    seeds: range, without: str = "", simulation: type[Simulation] = Simulation
) -> tuple[int, str] | None:
    """The first of these seeds that breaks a promise, and which."""
    for seed in seeds:
        try:
            simulation(seed, without).run()
        except Violation as found:
            return seed, str(found)
    return None

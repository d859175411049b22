"""Retries among the same faults: rows of a finished run are tried again, parts take the place of
parts, and whoever stops in the middle, comes late or goes on for dead changes nothing else.

The store, the workers, the journal and the coordinator are those of
:mod:`tests.simulation.protocol`. What is added is what ``batchrun.data.retry`` does, step by step,
and the run lock, which everything that replaces an object leans on. Somebody submits or retries
whenever nobody is at work; new input is appended in between; a driver may stand still until another
has taken its lock, and go on then.

One bound is taken for granted: a request that replaces something, with all that it is sent again,
has arrived before its sender's successor sends its own, as the lock expires later than any request.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchrun.coordinator import Event, LeaseDone, RunState
from batchrun.records import Lease, Part, Shard
from batchrun.rows import Rows
from tests.simulation.protocol import (
    DriverDies,
    Open,
    Process,
    Simulation,
    Violation,
    Worker,
    following,
    is_text,
    length_of,
    part_key,
)

RETRY_RULES = {
    "unlocked": "only who holds the lock replaces a part",
    "norecover": "whoever opens the run finishes what a retry left half done",
    "latestage": "what an older retry than the last staged is swept, not applied",
    "sweepall": "a success leaves the journal of a retry that was cut off",
    "oldjournal": "a retry begins without the journal of what was published",
    "replan": "a retry that was cut off goes on as it was planned",
    "keepsuccess": "_SUCCESS goes before a part is replaced",
    "recorded": "a part is replaced when its record is there and what was staged is gone",
    "eager": "the record follows its part, never the other way round",
}
"""What holds retries together, by the name under which it can be taken away."""

KINDS = (("slow",), ("lost",), ("lost", "slow"))

Body = tuple[tuple[int, Any], ...]


@dataclass(frozen=True)
class Retry:
    """A retry under way: which rows of which shards, and the parts that they stand in."""

    number: int
    kinds: tuple[str, ...]
    rows: Mapping[int, Rows]
    replaces: Mapping[int, Body]


class RetrySimulation(Simulation):
    """A finished run with failed rows, and what people and faults do to it."""

    def __init__(self, seed: int, without: str = "") -> None:
        super().__init__(seed, without)
        share = self.random.choice([0.1, 0.8])
        self.slow = {
            (name, ordinal)
            for name in ("f0", "f1", "f9")
            for ordinal in range(45)
            if (name, ordinal) not in self.poison and self.random.random() < share
        }
        self.holder = 0  # the epoch that the lock is held under
        self.paused: dict[int, tuple[int, Process]] = {}  # drivers that stand still, until when
        self.chain = 0  # counts retries; one that is resumed goes on under its number
        self.chains: dict[int, int] = {}  # by epoch
        self.safe: dict[tuple[int, int, int], str] = {}  # (chain, shard, row): its journal object
        self.unfinished: tuple[str, ...] | None = None  # the kinds of a retry that was cut off
        self.driver_pids[0] = 0  # who ran the run is gone
        self.tolerant = self.random.random() < 0.5  # rows that failed leave it a success
        self.publish_first()

    def publish_first(self) -> None:
        """The run as it was finished, or all of it but its last file."""
        shards = tuple(
            Shard(number, path, "", 1, "v0", (0,), 0, rows)
            for number, (path, rows) in enumerate(self.inputs)
        )
        self.objects["plan/0001"] = (shards, "")
        published = shards[:-1] if len(shards) > 1 and self.random.random() < 0.3 else shards
        entries = []
        for shard in published:
            body = tuple((row, self.first_value(shard, row)) for row in range(shard.num_rows))
            self.objects[part_key(shard)] = (body, "000000-000001")
            self.objects[f"record/{shard.number}"] = (body, "")
            entries.append((part_key(shard), body))
        if len(published) == len(shards):
            self.objects["manifest/0001"] = (tuple(entries), "")
            if self.tolerant:
                self.objects["_SUCCESS"] = ("manifest/0001", "")
        if not self.tolerant:
            for shard in published:
                body = self.objects[part_key(shard)][0]
                key = f"journal/{shard.number}/000000-000001-0001"
                self.objects[key] = (("v0", body, ()), "000000-000001")
        shard = published[0]
        for number, whole in enumerate(self.random.choice([[], [True], [False], [True, False]])):
            rows = Rows.all(shard.num_rows)
            lease = Lease(shard, 0, f"000000-00000{number}", rows, whole)
            self.spawn(self.worker(f"0-{number}", Worker(inbox=[lease]), box=0))

    def first_value(self, shard: Shard, row: int) -> Any:
        """What a row gave when the run was run."""
        length = length_of(shard.number, row)
        if self.poison.get((shard.path, row), 99) < length:
            return "lost", "v0", ()
        if (shard.path, row) in self.slow:
            return "slow", "v0", ()
        tokens: tuple[int, ...] = ()
        while len(tokens) < length:
            tokens = (*tokens, following(tokens, tie=1))
        return "ok", "v0", tokens

    # -- storage ---------------------------------------------------------------------------

    def send(self, epoch: int, **request: Any) -> Generator[None, None, str]:
        """A request of a driver's that changes what is there, until it is answered."""
        for _ in range(9):
            if self.holder != epoch and self.without != "unlocked":
                break
            pending = {**request, "create": False, "answer": None, "epoch": epoch}
            self.requests.append(pending)
            for _ in range(6):
                yield
                if pending["answer"] is not None:
                    break
            if pending["answer"] is None or self.chance(0.15):
                self.seen["answers lost"] += 1
                continue
            return str(pending["answer"])
        raise DriverDies  # storage does not answer

    def apply(self, request: dict[str, Any]) -> str:
        """A request arrives at the store."""
        key = request["key"]
        if "copy" in request:
            source = self.objects.get(request["copy"])
            if source is None:
                return "gone"
            self.check_replacement(key, request["copy"], source[0])
            self.objects[key] = source
            return "made"
        if key.startswith("journal/"):
            self.note_safe(key, request)
        if key == "_SUCCESS" and not request.get("delete"):
            for part, body in self.objects[request["body"]][0]:
                if self.objects[part][0] != body:
                    raise Violation("I3: _SUCCESS names a part that is not there any more")
        return super().apply(request)

    def check_replacement(self, key: str, staged: str, body: Body) -> None:
        """I1: a part is replaced by one that was made from it, and by the planned rows alone."""
        current = self.objects[key][0]
        if body == current:
            return
        if "_SUCCESS" in self.objects:
            raise Violation("I3: a part is replaced under _SUCCESS")
        number, _, attempt = staged.removeprefix("retry/").partition("-")
        kinds, rows = self.objects[f"retry/plan-{attempt.removesuffix('.staged')}"][0]
        for (row, was), (other, now) in zip(current, body, strict=True):
            if row != other:
                raise Violation("I2: rows are lost or there twice")
            if was != now and not (row in rows.get(int(number), ()) and was[0] in kinds):
                raise Violation("I1: a row is replaced that nobody wanted to try again")
        self.seen["parts replaced"] += 1

    # -- workers ---------------------------------------------------------------------------

    def known(
        self, shard: Shard, retry: Retry | None
    ) -> tuple[dict[int, Any], list[tuple[int, Any]], dict[int, tuple[int, ...]]]:
        """What a lease begins with: in a retry the rows that stay come before the journal."""
        first, everything, prefixes = self.read_journal(shard)
        if retry is None:
            return first, everything, prefixes
        kept = {
            row: value
            for row, value in self.objects[part_key(shard)][0]
            if row not in retry.rows[shard.number] or value[0] not in retry.kinds
        }
        return {**first, **kept}, [*kept.items(), *everything], prefixes

    def open_lease(self, lease: Lease, retry: Any) -> Open:
        """What a lease begins with; I6 over all leases of a retry, whichever driver gave them."""
        item = super().open_lease(lease, retry)
        is_current = retry is not None and self.chains[lease.epoch] == self.chain
        if is_current and lease.shard.number in self.left():
            for row in set(item.todo) - set(lease.lost):
                if (self.chain, lease.shard.number, row) in self.safe:
                    raise Violation("I6: a row that the retry journaled is generated again")
        return item

    def note_safe(self, key: str, request: dict[str, Any]) -> None:
        """The rows in a journal object need never be generated again in its retry, unless a fault
        takes it away."""
        if request.get("delete"):
            if request.get("fault"):
                self.safe = {row: at for row, at in self.safe.items() if at != key}
            return
        number, attempt = int(key.split("/")[1]), key.split("/")[2]
        chain = self.chains.get(int(attempt[:6]))
        if chain is not None:
            for row, _ in request["body"][1]:
                self.safe[chain, number, row] = key

    def value(self, item: Open, row: int, tokens: tuple[int, ...]) -> Any:
        """A slow row takes too long once more, now and then."""
        path = item.lease.shard.path
        is_slow = (path, row) in self.slow and (item.retry is None or self.chance(0.2))
        return ("slow", item.read[row], ()) if is_slow else ("ok", item.read[row], tokens)

    def publish(self, item: Open) -> Generator[None, None, Part | None]:
        """A part and its record; of a retry beside the part that it is to replace."""
        lease, shard, retry = item.lease, item.lease.shard, item.retry
        if retry is None:
            part = yield from super().publish(item)
            if part is not None and part_key(shard) in self.objects:
                body = self.objects[part_key(shard)][0]
                yield from self.put(f"record/{shard.number}", body, "")
            return part
        staged = f"retry/{shard.number}-{retry.number:04}.staged"
        body = tuple(sorted(item.finished, key=lambda pair: pair[0]))
        if (yield from self.put(staged, body, lease.attempt)) == "unknown":
            return None
        if staged not in self.objects:
            return None  # it was applied or swept meanwhile
        record = staged.replace(".staged", ".record")
        replacement = retry.replaces[shard.number], self.objects[staged][0]
        if (yield from self.put(record, replacement, "")) == "unknown":
            return None
        return Part(shard.number, part_key(shard), lease.attempt, 1, "", shard.num_rows)

    # -- drivers ---------------------------------------------------------------------------

    def check_lock(self, epoch: int) -> None:
        """As ``RunLock.check``: who has lost the lock does nothing more."""
        if self.holder != epoch and self.without != "unlocked":
            self.seen["locks lost"] += 1
            raise DriverDies

    def take_in(self, event: Event, state: RunState, epoch: int, retry: Any) -> Process:
        """A staged part takes its place before the coordinator hears that the shard is done."""
        self.check_lock(epoch)
        if retry is not None and isinstance(event, LeaseDone) and event.part is not None:
            if event.part.shard not in state.done:
                yield from self.apply_staged(epoch, event.part.shard, retry.number)

    def apply_staged(self, epoch: int, number: int, retry: int) -> Process:
        """As ``batchrun.data.retry.apply_staged``."""
        staged = f"retry/{number}-{retry:04}.staged"
        old, new = self.objects[staged.replace(".staged", ".record")][0]
        current = self.objects[f"record/{number}"][0]
        if current == new:
            yield from self.send(epoch, key=staged, delete=True)
            return
        if current != old:
            self.seen["retries refused"] += 1
            raise DriverDies
        shard = next(shard for shard in self.read_plan() if shard.number == number)
        steps: list[dict[str, Any]] = [
            {"key": "_SUCCESS", "delete": True},
            {"key": part_key(shard), "copy": staged},
            {"key": f"record/{number}", "body": new, "token": ""},
            {"key": staged, "delete": True},
        ]
        if self.without == "keepsuccess":
            del steps[0]
        if self.without == "eager":
            steps[1], steps[2] = steps[2], steps[1]
        for step in steps:
            self.check_lock(epoch)
            if (yield from self.send(epoch, **step)) == "gone" and "copy" in step:
                raise DriverDies

    def look(self) -> tuple[int, set[tuple[int, int]], set[tuple[int, int]]]:
        """The last retry's number; (shard, retry) of staged parts, and of records."""
        plans = self.listed("retry/plan-")
        found: dict[str, set[tuple[int, int]]] = {"staged": set(), "record": set()}
        for key in self.listed("retry/"):
            name, _, ending = key.removeprefix("retry/").partition(".")
            if ending:
                number, _, retry = name.partition("-")
                found[ending].add((int(number), int(retry)))
        return (int(plans[-1][-4:]) if plans else 0), found["staged"], found["record"]

    def left(self) -> set[int]:
        """The shards whose parts the last retry has not replaced yet."""
        last, staged, recorded = self.look()
        if not last:
            return set()
        done = recorded if self.without == "recorded" else recorded - staged
        _, rows = self.objects[f"retry/plan-{last:04}"][0]
        return {number for number in rows if (number, last) not in done}

    def recover(self, epoch: int) -> Process:
        """As ``batchrun.data.retry.recover``."""
        last, staged, recorded = self.look()
        for number, retry in sorted(staged & recorded, key=lambda key: key[::-1]):
            late = retry < last and not self.is_copied(number, retry)
            if late and self.without != "latestage":
                self.seen["late parts swept"] += 1
                self.check_lock(epoch)
                key = f"retry/{number}-{retry:04}.staged"
                yield from self.send(epoch, key=key, delete=True)
            elif self.without != "norecover":
                self.seen["retries recovered"] += 1
                yield from self.apply_staged(epoch, number, retry)

    def is_copied(self, number: int, retry: int) -> bool:
        """Whether a staged part was copied, and its record not replaced yet."""
        old, new = self.objects[f"retry/{number}-{retry:04}.record"][0]
        shard = next(shard for shard in self.read_plan() if shard.number == number)
        part, record = self.objects[part_key(shard)][0], self.objects[f"record/{number}"][0]
        return bool(record == old and part == new)

    def committed(
        self, epoch: int, shards: Sequence[Shard]
    ) -> Generator[None, None, dict[int, Body]]:
        """The parts by their records, one for each that has none yet; they must be the parts."""
        found: dict[int, Body] = {}
        for shard in shards:
            key = part_key(shard)
            if key not in self.objects:
                continue
            record = f"record/{shard.number}"
            if record not in self.objects:
                yield from self.put(record, self.objects[key][0], "")
            if record not in self.objects:
                raise DriverDies
            if self.objects[record][0] != self.objects[key][0]:
                self.check_lock(epoch)
                raise Violation("I3: a part is not what its record says")
            found[shard.number] = self.objects[key][0]
        return found

    def driver(self, epoch: int, box: int) -> Process:
        """A submit or a retry; what was cut off is finished first."""
        self.check_lock(epoch)
        yield from self.recover(epoch)
        is_whole = all(part_key(shard) in self.objects for shard in self.read_plan())
        if not (is_whole and self.is_planned()) and (not self.faults or self.random.random() < 0.5):
            yield from self.submitted(epoch, box)
        else:
            yield from self.retried(epoch, box)

    def submitted(self, epoch: int, box: int) -> Process:
        """What is new is planned and run; parts that are there stay."""
        if not self.is_planned():
            self.check_lock(epoch)
            yield from self.send(epoch, key="_SUCCESS", delete=True)
        shards: list[Shard] = yield from self.plan()
        parts = yield from self.committed(epoch, shards)
        done = {number: self.part(shards[number]) for number in parts}
        failed = yield from self.drive(shards, done, epoch, box)
        if failed is not None:
            yield from self.finish(epoch, shards)

    def retried(self, epoch: int, box: int) -> Process:
        """Failed rows of what has a part are tried again."""
        shards = self.read_plan()
        parts = yield from self.committed(epoch, shards)
        for _ in range(self.random.choice([0, 30])):
            yield  # to read the parts takes its time
        retry = yield from self.begin_retry(epoch, parts)
        finished = [shard for shard in shards if shard.number in parts]
        done = {
            shard.number: self.part(shard) for shard in finished if shard.number not in retry.rows
        }
        failed = yield from self.drive(finished, done, epoch, box, retry, retry.rows)
        if failed is not None:
            self.check_lock(epoch)
            self.check_retried(retry)
            if len(finished) == len(shards):
                yield from self.finish(epoch, shards)
            self.unfinished = None
            self.seen["retries finished"] += 1

    def check_retried(self, retry: Retry) -> None:
        """Each part that a retry was planned for is the one that it made."""
        if retry.number:
            shards = self.read_plan()
            for number in self.objects[f"retry/plan-{retry.number:04}"][0][1]:
                record = self.objects.get(f"retry/{number}-{retry.number:04}.record")
                if record is None or self.objects[part_key(shards[number])][0] != record[0][1]:
                    raise Violation("I3: a retry ends without one of its parts")

    def begin_retry(self, epoch: int, parts: Mapping[int, Body]) -> Generator[None, None, Retry]:
        """As ``batchrun.data.retry.begin_retry``; of the kinds that were cut off, mostly."""
        kinds = self.random.choice(KINDS)
        if self.unfinished is not None and self.random.random() < 0.7:
            kinds = self.unfinished
        if not self.faults:
            kinds = ("slow",)
        last, _, _ = self.look()
        if last:
            latest, rows = self.objects[f"retry/plan-{last:04}"][0]
            left = {number: rows[number] for number in self.left() if number in parts}
            goes_on = bool(left) and latest == kinds
            self.chain += not goes_on
            self.chains[epoch] = self.chain
            if goes_on and self.without != "replan":
                self.seen["retries resumed"] += 1
                return Retry(last, kinds, left, {number: parts[number] for number in left})
        self.chains[epoch] = self.chain
        rows = {
            number: Rows.of(row for row, value in body if value[0] in kinds)
            for number, body in parts.items()
        }
        rows = {number: found for number, found in rows.items() if found}
        if not rows:
            return Retry(0, kinds, {}, {})
        if self.without != "oldjournal":
            for number in rows:
                yield from self.delete(epoch, self.listed(f"journal/{number}/"))
        if "lost" in kinds:
            yield from self.delete(epoch, self.listed("strike/"))
        for _ in range(self.random.choice([0, 30])):
            yield  # there may be many to delete
        body = kinds, rows
        if (yield from self.put(f"retry/plan-{last + 1:04}", body, "")) == "unknown":
            raise DriverDies
        if self.objects[f"retry/plan-{last + 1:04}"][0] != body:
            raise DriverDies
        self.unfinished = kinds
        self.seen["retries planned"] += 1
        return Retry(last + 1, kinds, rows, {number: parts[number] for number in rows})

    def delete(self, epoch: int, keys: Sequence[str]) -> Process:
        """Delete what is there."""
        for key in keys:
            self.check_lock(epoch)
            yield from self.send(epoch, key=key, delete=True)

    def part(self, shard: Shard) -> Part:
        """A part that is there, as the coordinator knows it."""
        return Part(shard.number, part_key(shard), "", 1, "", shard.num_rows)

    def finish(self, epoch: int, shards: Sequence[Shard]) -> Process:
        """The manifest, and ``_SUCCESS``."""
        self.check_lock(epoch)
        parts = yield from self.committed(epoch, shards)
        if len(parts) < len(shards):
            raise DriverDies  # an input was replaced: there is no success
        body = tuple((part_key(shard), parts[shard.number]) for shard in shards)
        names = self.listed("manifest/")
        name = names[-1] if names else ""
        if not names or self.objects[name][0] != body:
            name = f"manifest/{len(names) + 1:04}"
            if (yield from self.put(name, body, f"{epoch}")) == "unknown":
                raise DriverDies
        if not self.tolerant and any(
            value[0] == "slow" for body in parts.values() for _, value in body
        ):
            return
        spared = self.left()
        for shard in shards:
            if shard.number not in spared or self.without == "sweepall":
                yield from self.delete(epoch, self.listed(f"journal/{shard.number}/"))
        self.check_lock(epoch)
        if "_SUCCESS" not in self.objects:
            yield from self.send(epoch, key="_SUCCESS", body=name, token="")

    # -- the world -------------------------------------------------------------------------

    def sweep(self) -> Process:
        """Deletes journal objects, as a fault: they are a saving, and no more."""
        while True:
            for key in self.listed("journal/"):
                if self.chance(0.002):
                    self.seen["journals deleted"] += 1
                    self.requests.append({"key": key, "delete": True, "fault": True})
                yield
            for _ in range(20):
                yield

    def submit(self) -> None:
        """Somebody submits or retries: with the lock, or not at all."""
        if self.holder in self.driver_pids and self.lives(self.holder):
            return
        # The one bound: what the one before has sent has arrived, or never will.
        for request in [item for item in self.requests if "epoch" in item]:
            self.requests.remove(request)
            request["answer"] = self.apply(request)
        self.holder = self.num_drivers + 1
        super().submit()

    def disturb(self) -> None:
        """Drivers stand still, long enough for another to take over, and go on."""
        super().disturb()
        pid = self.driver_pids[self.holder]
        if pid in self.processes and self.chance(0.004):
            self.seen["drivers stood still"] += 1
            until = self.step + self.random.choice([30, 200])
            self.paused[pid] = (until, self.processes.pop(pid))
        for pid, (until, process) in list(self.paused.items()):
            if self.step >= until or not self.faults:
                del self.paused[pid]
                self.processes[pid] = process

    def replace_input(self) -> None:
        """Not here: what a retry does then is its reader's to say."""

    def is_planned(self) -> bool:
        """Whether the plan has all inputs."""
        return {shard.path for shard in self.read_plan()} == {path for path, _ in self.inputs}

    def is_finished(self) -> bool:
        """Whether no row is slow any more, and a manifest that is true says so."""
        if self.paused or "_SUCCESS" not in self.objects:
            return False
        if not self.is_planned():
            return False
        plan = self.read_plan()
        if not all(part_key(shard) in self.objects for shard in plan):
            return False
        bodies = [self.objects[part_key(shard)][0] for shard in plan]
        return not any(value[0] == "slow" for body in bodies for _, value in body)

    def check(self) -> None:
        """Every row of every shard once; what was good stays as it was; records are true."""
        for shard in self.read_plan():
            rows, _ = self.objects[part_key(shard)]
            if self.objects[f"record/{shard.number}"][0] != rows:
                raise Violation("I3: a part is not what its record says")
            if [row for row, _ in rows] != list(range(shard.num_rows)):
                raise Violation("I2: rows are lost or there twice")
            for row, (status, _, tokens) in rows:
                length = length_of(shard.number, row)
                deadly = self.poison.get((shard.path, row), 99) < length
                if (status == "lost") != deadly:
                    raise Violation(f"I7: {'a deadly' if deadly else 'an innocent'} row is wrong")
                if not deadly and not (len(tokens) == length and is_text(tokens)):
                    raise Violation("I4: a text is wrong")
        self.tokens_again = sum(count - 1 for count in self.generated.values())

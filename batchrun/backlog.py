"""What is left to lease, in order: whole shards, ranges of split ones, and rows under suspicion.

A shard of which nothing is known but that it waits is a number in a queue. A shard that is split
(because many workers share it, or because a worker died of some of its rows) is an
:class:`OpenShard`. A row of it is in exactly one place: waiting, held, suspect, leased or lost;
what is in none of these is done, and in the journal.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from batchrun.records import Shard, Strike
from batchrun.rows import Rows

# Suspects are halved three times at once: a group that dies gives so many groups.
_FANOUT = 8
# Deaths in a row, with nobody knowing of which rows, after which a shard is given up.
_MAX_BLIND_DEATHS = 20
# A device is looked for among so many groups, before a worker does something else.
_MAX_LOOKS = 64


@dataclass(frozen=True, slots=True)
class Group:
    """Rows under suspicion that are run together, by a worker that does nothing else.

    ``whole`` is a shard whose reading or writing is suspected, not a row: it is published when it
    ends well. ``avoid`` are devices that a single row has died on.
    """

    rows: Rows
    whole: bool = False
    avoid: frozenset[str] = frozenset()


@dataclass(slots=True)
class OpenShard:
    """A shard that is split.

    ``waiting`` is in line, ``held`` waits for the canary, ``groups`` are suspects. ``num_leases``
    counts attempts. ``complete`` means that all rows were done or lost once, so that only the
    part is missing. ``deaths`` counts for each row how often a worker died that ran it alone.
    """

    waiting: Rows = field(default_factory=Rows)
    held: Rows = field(default_factory=Rows)
    groups: deque[Group] = field(default_factory=deque)
    lost: dict[int, str] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    num_leases: int = 0
    complete: bool = False
    idle_deaths: int = 0
    blind_deaths: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether no row of it is left to run."""
        return not (self.waiting or self.held or self.groups or self.num_leases)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a lease is to cover. ``group`` is set when it isolates suspects."""

    shard: int
    rows: Rows
    whole: bool
    group: Group | None = None


class Backlog:
    """Everything that no worker has. ``num_rows`` counts rows in line, without suspects.

    ``todo`` are shards of which only some rows have to run: the others are done already.
    """

    def __init__(
        self,
        shards: Mapping[int, Shard],
        waiting: Iterable[int],
        todo: Mapping[int, Rows] | None = None,
    ) -> None:
        self._shards = shards
        self._todo = todo or {}
        self.queue: OrderedDict[int, None] = OrderedDict.fromkeys(waiting)
        self.open: dict[int, OpenShard] = {}
        self.suspects: dict[int, None] = {}  # open shards that have groups, oldest first
        self.num_groups = 0
        self.num_rows = sum(len(self._rows_of(number)) for number in self.queue)

    def _rows_of(self, number: int) -> Rows:
        """The rows of a shard that have to run."""
        rows = self._todo.get(number)
        return Rows.all(self._shards[number].num_rows) if rows is None else rows

    # -- rows in line ----------------------------------------------------------------------

    def take(self, num_workers: int, min_rows: int) -> Grant:
        """The next rows for one of ``num_workers``; the queue must not be empty.

        Guided self-scheduling: half of a fair share of what is in line, so that pieces shrink
        towards the end; but no fewer than ``min_rows``, which keep an engine full. A shard that
        is not much bigger stays whole, which spares the journal: many shards of one size are all
        leased whole until there are fewer than two for each worker.
        """
        number = next(iter(self.queue))
        item = self.open.get(number)
        size = max(min_rows, self.num_rows // (2 * num_workers))
        if item is None:
            rows = self._rows_of(number)
            if num_workers == 1 or 2 * len(rows) <= 3 * size:
                self._unqueue(number, len(rows))
                return self._assembly(number)
            item = self.open[number] = OpenShard(waiting=rows)
        elif not item.waiting:
            self._unqueue(number, 0)
            return self._assembly(number)
        if num_workers == 1 or 2 * len(item.waiting) <= 3 * size:
            rows, item.waiting = item.waiting, Rows()
        else:
            rows, item.waiting = item.waiting.split(size)
        if item.waiting:
            self.num_rows -= len(rows)
        else:
            self._unqueue(number, len(rows))
        return Grant(number, rows, whole=False)

    def _assembly(self, number: int) -> Grant:
        return Grant(number, Rows.all(self._shards[number].num_rows), whole=True)

    def _unqueue(self, number: int, num_rows: int) -> None:
        del self.queue[number]
        self.num_rows -= num_rows

    def _queue_first(self, number: int, num_rows: int) -> None:
        self.queue[number] = None
        self.queue.move_to_end(number, last=False)
        self.num_rows += num_rows

    def give_back(self, grant: Grant) -> None:
        """Put what a worker had first in line again: the journal may have the most of it."""
        item = self.open.get(grant.shard)
        if grant.group is not None:
            self._suspect(grant.shard, self._opened(grant.shard), [grant.group])
        elif item is None:
            self._queue_first(grant.shard, len(self._rows_of(grant.shard)))
        elif grant.whole:
            self._queue_first(grant.shard, 0)
        else:
            item.waiting |= grant.rows
            self._queue_first(grant.shard, len(grant.rows))

    def settle(self, number: int) -> bool:
        """Whether the shard now lacks its part alone; then it stands first in line."""
        item = self.open.get(number)
        if item is None or not item.is_complete:
            return False
        item.complete = True
        self._queue_first(number, 0)
        return True

    def take_assembly(self, number: int) -> Grant:
        """The whole shard that :meth:`settle` has just put first in line."""
        self._unqueue(number, 0)
        return self._assembly(number)

    def drop(self, number: int) -> None:
        """A shard is done or has failed: forget what is known of it. May be called twice."""
        item = self.open.pop(number, None)
        if number in self.queue:
            num_rows = len(self._rows_of(number) if item is None else item.waiting)
            self._unqueue(number, num_rows)
        if item is not None:
            self.num_groups -= len(item.groups)
            self.suspects.pop(number, None)

    def hold(self, number: int, keep: Rows) -> None:
        """Take a shard out of line but for the rows ``keep``, until :meth:`release`."""
        item = self.open.get(number)
        queued = number in self.queue
        if item is None and not keep:
            if queued:
                self._unqueue(number, len(self._rows_of(number)))
            return
        if item is None:
            item = self.open[number] = OpenShard(waiting=self._rows_of(number))
        if queued:
            self._unqueue(number, len(item.waiting))
        item.waiting, item.held = item.waiting & keep, item.waiting - keep
        if item.waiting:
            self.queue[number] = None
            self.num_rows += len(item.waiting)

    def release(self, numbers: Iterable[int]) -> None:
        """Put shards, or the rest of them, to the end of the line again."""
        for number in numbers:
            item = self.open.get(number)
            if item is None:
                self.queue[number] = None
                self.num_rows += len(self._rows_of(number))
            elif item.held:
                held, item.held = item.held, Rows()
                self.queue.setdefault(number)
                item.waiting |= held
                self.num_rows += len(held)
            elif item.is_complete:
                item.complete = True
                self.queue.setdefault(number)

    # -- suspects --------------------------------------------------------------------------

    def has_group(self, accepts: Callable[[frozenset[str]], bool]) -> bool:
        """Whether :meth:`take_group` would find one."""
        return self._find_group(accepts) is not None

    def take_group(self, accepts: Callable[[frozenset[str]], bool]) -> Grant | None:
        """The first group whose ``avoid`` is acceptable."""
        found = self._find_group(accepts)
        if found is None:
            return None
        number, index = found
        groups = self.open[number].groups
        group = groups[index]
        del groups[index]
        self.num_groups -= 1
        if not groups:
            del self.suspects[number]
        return Grant(number, group.rows, group.whole, group)

    def _find_group(self, accepts: Callable[[frozenset[str]], bool]) -> tuple[int, int] | None:
        looks = 0
        for number in self.suspects:
            for index, group in enumerate(self.open[number].groups):
                if accepts(group.avoid):
                    return number, index
                looks += 1
                if looks >= _MAX_LOOKS:
                    return None
        return None

    def blame(self, grant: Grant, strike: Strike, max_retries: int) -> str | None:
        """Deal with a lease whose worker died, perhaps of the rows that ``strike`` names.

        They become suspects, and a single one that was alone has one death more; the others go
        back in line. The answer, if any, is why the shard has to be given up.
        """
        number = grant.shard
        item = self._opened(number)
        guilty = (strike.rows.get(number, Rows()) & grant.rows) - Rows.of(item.lost)
        innocent = (grant.rows & self._rows_of(number)) - guilty - Rows.of(item.lost)
        if grant.whole and item.complete:
            innocent = Rows()  # they are in the journal
        is_left = bool(grant.rows) and not (grant.whole and item.complete)
        shard_itself = strike.idle or (strike.blind and not is_left)
        if shard_itself:
            # No row ran: what kills is to read the shard or to write it.
            item.idle_deaths += strike.alone
            if item.idle_deaths > max_retries:
                return _given_up(item.idle_deaths, strike.message)
            self._suspect(number, item, [Group(grant.rows, whole=grant.whole)])
            return None
        if strike.blind and strike.alone:
            item.blind_deaths += 1
            if item.blind_deaths > max_retries + _MAX_BLIND_DEATHS:
                return _given_up(item.blind_deaths, strike.message)
        if len(guilty) == 1 and strike.alone:
            avoid = grant.group.avoid if grant.group is not None else frozenset()
            self._count_death(item, number, guilty, strike, avoid, max_retries)
        else:
            size = -(-_num_rows(strike) // _FANOUT)
            self._suspect(number, item, [Group(rows) for rows in guilty.groups(size)])
        if innocent:
            item.waiting |= innocent
            self._queue_first(number, len(innocent))
        return None

    def accuse(self, strikes: Sequence[Strike], max_retries: int) -> dict[int, str]:
        """Take in what earlier drivers wrote down; the shards to give up, and why.

        A row belongs to the smallest group that died with it. Rows that were acquitted since are
        suspects again, which costs little: the journal has them.
        """
        failed: dict[int, str] = {}
        by_size = sorted(strikes, key=lambda strike: (_num_rows(strike), strike.worker))
        of_shard: dict[int, list[Strike]] = {}
        for strike in by_size:
            for number in strike.rows:
                if number in self.queue:
                    of_shard.setdefault(number, []).append(strike)
        for number, found in of_shard.items():
            everything = self._rows_of(number)
            item = OpenShard()
            groups: list[Group] = []
            left = everything
            for strike in found:
                rows = strike.rows[number] & everything
                mine, left = rows & left, left - rows
                if strike.idle:
                    item.idle_deaths += strike.alone
                    if mine:
                        whole = mine == everything
                        rows = Rows.all(self._shards[number].num_rows) if whole else mine
                        groups.append(Group(rows, whole=whole))
                elif _num_rows(strike) == 1 and strike.alone and rows:
                    self._recall_death(item, rows, strike, groups, max_retries)
                else:
                    size = -(-_num_rows(strike) // _FANOUT)
                    groups += [Group(piece) for piece in mine.groups(max(1, size))]
            if item.idle_deaths > max_retries:
                failed[number] = _given_up(item.idle_deaths, found[-1].message)
                continue
            if left == everything and not item.idle_deaths:
                continue  # all of it concerns rows that the shard does not have
            self._unqueue(number, len(everything))
            self.open[number] = item
            groups.sort(key=lambda group: (-len(group.rows), group.rows.ranges))
            self._suspect(number, item, groups)
            item.waiting = left
            if left:
                self.queue[number] = None
                self.num_rows += len(left)
            self.settle(number)
        for number in failed:
            self.drop(number)
        return failed

    @staticmethod
    def _recall_death(
        item: OpenShard, row: Rows, strike: Strike, groups: list[Group], max_retries: int
    ) -> None:
        (ordinal,) = row
        deaths = item.deaths[ordinal] = item.deaths.get(ordinal, 0) + 1
        before = next((group for group in groups if group.rows == row), Group(row))
        if before in groups:
            groups.remove(before)
        if deaths > max_retries:
            item.lost[ordinal] = lost_message(deaths, strike.message)
        else:
            groups.append(Group(row, avoid=before.avoid | {strike.device}))

    def _count_death(
        self,
        item: OpenShard,
        number: int,
        row: Rows,
        strike: Strike,
        avoid: frozenset[str],
        max_retries: int,
    ) -> None:
        (ordinal,) = row
        deaths = item.deaths[ordinal] = item.deaths.get(ordinal, 0) + 1
        if deaths > max_retries:
            item.lost[ordinal] = lost_message(deaths, strike.message)
        else:
            self._suspect(number, item, [Group(row, avoid=avoid | {strike.device})])

    def acquit(self, grant: Grant) -> None:
        """A group has come to its end: its rows are done."""
        item = self.open.get(grant.shard)
        if item is not None:
            item.blind_deaths = 0
            for ordinal in list(item.deaths):
                if ordinal in grant.rows:
                    del item.deaths[ordinal]

    def lease(self, grant: Grant) -> Mapping[int, str]:
        """Count a lease that is given; the rows that it has to give up."""
        item = self.open.get(grant.shard)
        if item is None:
            return {}
        item.num_leases += 1
        return dict(item.lost) if grant.whole else {}

    def end_lease(self, number: int) -> None:
        """Count a lease that has ended in any way, before its rows are dealt with."""
        item = self.open.get(number)
        if item is not None:
            item.num_leases = max(0, item.num_leases - 1)

    def _opened(self, number: int) -> OpenShard:
        """The open shard; one that was leased whole is opened with nothing in it."""
        return self.open.setdefault(number, OpenShard())

    def _suspect(self, number: int, item: OpenShard, groups: Iterable[Group]) -> None:
        """Put groups first among those of their shard."""
        groups = list(groups)
        if groups:
            item.groups.extendleft(reversed(groups))
            self.num_groups += len(groups)
            self.suspects.setdefault(number)


def _num_rows(strike: Strike) -> int:
    return sum(len(rows) for rows in strike.rows.values())


def _given_up(times: int, message: str) -> str:
    return f"worker_lost: {times} workers died with it ({message})"


def lost_message(times: int, message: str) -> str:
    """What stands in the output for a row that is given up, after the kind."""
    workers = "1 worker" if times == 1 else f"{times} workers"
    return f"{workers} died while running this row alone ({message})"

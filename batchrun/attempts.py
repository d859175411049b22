"""The leases that living workers have, by attempt, by shard, and in pairs.

Every question that is asked at every event is answered without a walk over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from batchrun.backlog import Grant


@dataclass(slots=True)
class Attempt:
    """A lease that a living worker has. ``twin`` is the other attempt at the same rows."""

    worker: str
    grant: Grant
    since: float
    twin: str | None = None


class Attempts(Mapping[str, Attempt]):
    """Living attempts by name."""

    def __init__(self) -> None:
        self._attempts: dict[str, Attempt] = {}
        self._of_shard: dict[int, list[str]] = {}
        self._single: dict[str, None] = {}  # those that may get a twin, oldest first
        self.num_rows = 0
        """Rows that they cover; rows of twins count twice."""

    def __getitem__(self, name: str) -> Attempt:
        return self._attempts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._attempts)

    def __len__(self) -> int:
        return len(self._attempts)

    def add(self, name: str, attempt: Attempt) -> None:
        """A lease was given; with a ``twin`` it is the second attempt at that one's rows."""
        self._attempts[name] = attempt
        self._of_shard.setdefault(attempt.grant.shard, []).append(name)
        self.num_rows += len(attempt.grant.rows)
        if attempt.twin is not None:
            self._attempts[attempt.twin].twin = name
            del self._single[attempt.twin]
        elif attempt.grant.group is None:
            self._single[name] = None

    def remove(self, name: str) -> Attempt | None:
        """A lease has ended; None when it is not known, or not any more."""
        found = self._attempts.pop(name, None)
        if found is None:
            return None
        number = found.grant.shard
        self.num_rows -= len(found.grant.rows)
        self._of_shard[number].remove(name)
        if not self._of_shard[number]:
            del self._of_shard[number]
        self._single.pop(name, None)
        return found

    def part(self, removed: Attempt) -> str | None:
        """The twin of an attempt that was removed, if it still runs; it is alone from now on, and
        gets no other."""
        if removed.twin is not None:
            self._attempts[removed.twin].twin = None
        return removed.twin

    def of_shard(self, number: int) -> list[str]:
        """The names of a shard's attempts."""
        return list(self._of_shard.get(number, ()))

    def oldest_single(self) -> str | None:
        """The oldest attempt that may get a twin: of rows that are not suspects, and for the first
        time."""
        return next(iter(self._single), None)

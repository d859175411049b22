"""The workers as the coordinator knows them: who is there, who holds what, who has room.

Every question that is asked at every event is answered without a walk over the workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field

# A lease has at least as many rows as its worker can run at once, and never fewer than this.
MIN_LEASE_ROWS = 16


@dataclass(slots=True)
class Member:
    """What is known of a living worker. ``leases`` are attempts, the oldest first. One that is
    ``aside`` gets none: it holds its device, so that no other worker starts there."""

    ready: bool = False
    draining: bool = False
    aside: bool = False
    alone: bool = False
    min_rows: int = MIN_LEASE_ROWS
    device: str = ""
    wanted: int = 0
    leases: dict[str, None] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether it may be given leases at all."""
        return self.ready and not self.draining and not self.aside


class Crew:
    """Living workers by name. ``idle`` have no lease, ``hungry`` want more than they have; both
    are ready, not draining, and in the order in which they became so."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.idle: dict[str, None] = {}
        self.hungry: dict[str, None] = {}
        self.devices: Counter[str] = Counter()
        self.isolating: set[str] = set()
        self.num_ready = 0
        """Those that may be given leases."""
        self.num_starting = 0
        """Not ready yet, and not draining."""
        self.num_loaded = 0
        """Ready, draining or not: those that are paid for."""
        self.num_drained_leases = 0
        """Leases that draining workers hold."""

    @property
    def num_living(self) -> int:
        """All but those that drain or are aside."""
        return self.num_ready + self.num_starting

    @property
    def num_idle(self) -> int:
        """Those without a lease that have one coming: still starting, or idle."""
        return self.num_starting + len(self.idle)

    def add(self, name: str) -> None:
        """A worker was asked for."""
        self.members[name] = Member()
        self.num_starting += 1

    def load(self, name: str, max_sequences: int, device: str, *, aside: bool = False) -> bool:
        """A worker is ready; False when that is no news, or it is not known."""
        member = self.members.get(name)
        if member is None or member.ready:
            return False
        member.ready = True
        member.min_rows = max(MIN_LEASE_ROWS, max_sequences)
        member.device = device
        member.aside = aside
        self.num_loaded += 1
        if not member.draining:
            self.num_starting -= 1
        if member.is_open:
            self.num_ready += 1
            self.devices[device] += 1
            self.idle[name] = None
        return True

    def drain(self, name: str) -> None:
        """A worker is about to end."""
        member = self.members.get(name)
        if member is not None and not member.draining:
            self._leave(name, member)
            member.draining = True
            self.num_drained_leases += len(member.leases)

    def remove(self, name: str) -> Member | None:
        """A worker is gone; what it held is the caller's to deal with."""
        member = self.members.pop(name, None)
        if member is None:
            return None
        if member.draining:
            self.num_drained_leases -= len(member.leases)
        else:
            self._leave(name, member)
        self.num_loaded -= member.ready
        self.isolating.discard(name)
        return member

    def _leave(self, name: str, member: Member) -> None:
        """Take a worker out of what counts those that may be given leases, or will be."""
        self.idle.pop(name, None)
        self.hungry.pop(name, None)
        if not member.ready:
            self.num_starting -= 1
            return
        if member.aside:
            return
        self.num_ready -= 1
        self.devices[member.device] -= 1
        if not self.devices[member.device]:
            del self.devices[member.device]

    def sitting_on(self, devices: Container[str]) -> list[str]:
        """The workers that are aside on one of these."""
        return [n for n, found in self.members.items() if found.aside and found.device in devices]

    def want(self, name: str, count: int) -> None:
        """A worker has room for so many leases more."""
        member = self.members.get(name)
        if member is not None:
            member.wanted = max(0, count)
            self._sort(name, member)

    def give(self, name: str, attempt: str, *, alone: bool) -> None:
        """A worker holds a lease more."""
        member = self.members[name]
        member.leases[attempt] = None
        member.wanted = max(0, member.wanted - 1)
        member.alone = alone
        if alone:
            self.isolating.add(name)
        self._sort(name, member)

    def take(self, name: str, attempt: str) -> None:
        """A worker holds a lease less."""
        member = self.members.get(name)
        if member is None or attempt not in member.leases:
            return
        del member.leases[attempt]
        if not member.leases:
            member.alone = False
            self.isolating.discard(name)
        if member.draining:
            self.num_drained_leases -= 1
        self._sort(name, member)

    def _sort(self, name: str, member: Member) -> None:
        """Put a worker among the idle or the hungry, or neither."""
        if member.is_open and not member.leases:
            self.idle.setdefault(name)
        else:
            self.idle.pop(name, None)
        if member.is_open and member.leases and not member.alone and member.wanted:
            self.hungry.setdefault(name)
        else:
            self.hungry.pop(name, None)

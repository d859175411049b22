"""Sets of rows of one shard, as sorted ranges: small however many rows they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_MAX_SHOWN = 16  # ranges


@dataclass(frozen=True, slots=True)
class Rows:
    """Ordinals of one shard as half-open ranges: sorted, disjoint, none empty, none adjacent.

    Make them with :meth:`all`, :meth:`of_ranges` or :meth:`of`; the constructor trusts its caller.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def all(cls, num_rows: int) -> Rows:
        """The ordinals 0 to ``num_rows`` - 1."""
        return cls(((0, num_rows),)) if num_rows > 0 else cls()

    @classmethod
    def of_ranges(cls, ranges: Iterable[Iterable[int]]) -> Rows:
        """Half-open ranges in any order; they may touch, overlap or be empty.

        Raises ValueError for what is no pair of ordinals.
        """
        merged: list[tuple[int, int]] = []
        for begin, end in sorted((begin, end) for begin, end in ranges):
            if begin < 0:
                raise ValueError(f"a row cannot have the ordinal {begin}")
            if begin >= end:
                continue
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((begin, end))
        return cls(tuple(merged))

    @classmethod
    def of(cls, ordinals: Iterable[int]) -> Rows:
        """Single ordinals in any order."""
        return cls.of_ranges((ordinal, ordinal + 1) for ordinal in ordinals)

    def __len__(self) -> int:
        return sum(end - begin for begin, end in self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __iter__(self) -> Iterator[int]:
        """The ordinals, rising."""
        for begin, end in self.ranges:
            yield from range(begin, end)

    def __str__(self) -> str:
        """For people: ``0-15,20``, both ends included; of many ranges the first and how many."""
        texts = [
            f"{begin}" if end - begin == 1 else f"{begin}-{end - 1}"
            for begin, end in self.ranges[:_MAX_SHOWN]
        ]
        more = len(self.ranges) - _MAX_SHOWN
        return ",".join(texts) + (f" and {more} more ranges" if more > 0 else "")

    def __contains__(self, ordinal: int) -> bool:
        return any(begin <= ordinal < end for begin, end in self.ranges)

    def __or__(self, other: Rows) -> Rows:
        if not (self.ranges and other.ranges):
            return self if self.ranges else other
        return Rows.of_ranges((*self.ranges, *other.ranges))

    def __sub__(self, other: Rows) -> Rows:
        """Those that ``other`` does not have."""
        if not (self.ranges and other.ranges):
            return self
        left: list[tuple[int, int]] = []
        cuts = other.ranges
        first = 0
        for begin, end in self.ranges:
            while first < len(cuts) and cuts[first][1] <= begin:
                first += 1
            at = first
            while at < len(cuts) and cuts[at][0] < end:
                if begin < cuts[at][0]:
                    left.append((begin, cuts[at][0]))
                begin = max(begin, cuts[at][1])
                at += 1
            if begin < end:
                left.append((begin, end))
        return Rows(tuple(left))

    def __and__(self, other: Rows) -> Rows:
        """Those that both have."""
        return self - (self - other)

    def split(self, num_rows: int) -> tuple[Rows, Rows]:
        """The first ``num_rows`` (fewer where there are not so many), and the others."""
        head: list[tuple[int, int]] = []
        for index, (begin, end) in enumerate(self.ranges):
            if num_rows <= 0:
                return Rows(tuple(head)), Rows(self.ranges[index:])
            if end - begin > num_rows:
                cut = begin + num_rows
                return (
                    Rows((*head, (begin, cut))),
                    Rows(((cut, end), *self.ranges[index + 1 :])),
                )
            head.append((begin, end))
            num_rows -= end - begin
        return self, Rows()

    def groups(self, num_rows: int) -> Iterator[Rows]:
        """Pieces of ``num_rows`` in their order; the last may have fewer."""
        if num_rows < 1:
            raise ValueError("a group has at least one row")
        rest = self
        while rest:
            head, rest = rest.split(num_rows)
            yield head

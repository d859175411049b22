"""Free lists: of state slots, and of the blocks that attention keys and values are paged in."""

from __future__ import annotations

from collections.abc import Iterable


class Pool:
    """Indices first … end-1 that are each free or held once. Index 0 is the scratch one: padding
    points to it and no sequence ever holds it."""

    def __init__(self, name: str, end: int, first: int = 1) -> None:
        """``name`` is what errors call one index, e.g. ``slot``."""
        self._name = name
        self._range = range(first, end)
        self._free = list(reversed(self._range))
        self._held: set[int] = set()

    @property
    def num_total(self) -> int:
        """How many indices can be held."""
        return len(self._range)

    @property
    def num_free(self) -> int:
        """How many are free now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """How many are held now."""
        return len(self._held)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Hand out ``count`` indices; what they held before is still there.

        :raises RuntimeError: there are not so many; ask :attr:`num_free` first.
        """
        if count > len(self._free):
            raise RuntimeError(f"{count} of {self._name} asked for, {len(self._free)} free")
        taken = tuple(self._free.pop() for _ in range(count))
        self._held.update(taken)
        return taken

    def free(self, indices: Iterable[int]) -> None:
        """Take back indices.

        :raises RuntimeError: one is not held, so two sequences would come to share it.
        """
        for index in indices:
            if index not in self._held:
                raise RuntimeError(f"{self._name} {index} is freed but not held")
            self._held.remove(index)
            self._free.append(index)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Check that exactly these are held and that none is lost.

        :raises RuntimeError: an index is lost, held twice, or held by nobody.
        """
        held = list(held)
        if len(held) != len(set(held)):
            raise RuntimeError(f"a {self._name} is held twice")
        if set(held) != self._held:
            raise RuntimeError(f"{self._name}: held {sorted(self._held)}, known {sorted(held)}")
        if sorted([*self._free, *self._held]) != list(self._range):
            raise RuntimeError(f"{self._name}: indices are lost or doubled")

"""The canary: the first rows of the plan, run before all others, and what they tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from batchrun.records import Counts, Part, Shard


class Canary:
    """The first ``num_rows`` rows of the plan, in as many shards as they reach into.

    Shards that lie inside count with their parts; the one on the border counts with the leases of
    its first :attr:`border_rows` rows, because the rest has to wait. What an earlier submit has
    published of them counts as it did then, except on the border: past it only a run that passed
    can have come.
    """

    def __init__(self, shards: Iterable[Shard], done: Mapping[int, Part], num_rows: int) -> None:
        self.counts = Counts()
        self.left: set[int] = set()
        self.border: int | None = None
        self.border_rows = 0
        self.num_rows = 0
        for shard in shards:
            wanted = num_rows - self.num_rows
            if wanted <= 0:
                break
            self.num_rows += min(wanted, shard.num_rows)
            if shard.num_rows <= wanted:
                if shard.number in done:
                    self.counts += done[shard.number].counts
                else:
                    self.left.add(shard.number)
            elif shard.number not in done:
                self.border, self.border_rows = shard.number, wanted
                self.left.add(shard.number)

    def add(self, shard: int, counts: Counts) -> None:
        """Some rows of the border are done."""
        if shard == self.border:
            self.counts += counts

    def settle(self, shard: int, counts: Counts) -> None:
        """A shard of the canary has come to its end, or the border's first rows have."""
        if shard in self.left:
            self.left.discard(shard)
            self.counts += counts

    def problem(self, allowed: float, num_samples: int) -> str | None:
        """Why the run must not go on; ``allowed`` as ``errors.max_failed_rows``."""
        if 0 < allowed < 1:
            allowed *= self.num_rows
        failed, samples = self.counts.failed_rows, self.num_rows * num_samples
        if failed > allowed:
            return f"{failed} of the {self.num_rows} canary rows failed"
        if 2 * self.counts.empty > samples:
            return f"{self.counts.empty} of the {samples} completions of the canary are empty"
        return None

"""Devices that end whatever runs on them, told from rows that do: others run well meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from batchrun.rows import Rows

MAX_DEATHS = 3
_MOST_KEPT = 32  # deaths on a device that are looked at


@dataclass(slots=True)
class _Record:
    """What happened since a device last did something: deaths, with their rows by shard."""

    deaths: list[Mapping[int, Rows]] = field(default_factory=list)
    others_work: bool = False

    @property
    def num_apart(self) -> int:
        """How many of the deaths no row can explain together: they have none in common."""
        seen: dict[int, Rows] = {}
        count = 0
        for death in sorted(self.deaths, key=lambda death: sum(map(len, death.values()))):
            if not any(rows & seen.get(shard, Rows()) for shard, rows in death.items()):
                count += 1
                for shard, rows in death.items():
                    seen[shard] = seen.get(shard, Rows()) | rows
        return count


class Devices:
    """What is held against devices. One is set aside when so many workers in a row have died on
    it, each with rows of its own, while another device did its work.

    A row that dies alone on one device and was there when another one's worker died is what killed
    on both; a device that was set aside for it is given back, and not suspected any more. Devices
    without a name are not looked at.
    """

    def __init__(self) -> None:
        self.aside: frozenset[str] = frozenset()
        self._records: dict[str, _Record] = {}
        self._alone: dict[tuple[int, int], str] = {}  # rows that died alone: the first device
        self._trusted: set[str] = set()

    def die(self, device: str, rows: Mapping[int, Rows], *, alone: bool) -> None:
        """A worker on the device died of one of these rows, by shard, or of the device."""
        if not device:
            return
        record = self._records.setdefault(device, _Record())
        record.deaths.append(rows)
        del record.deaths[:-_MOST_KEPT]
        keys = [(shard, row) for shard, found in rows.items() for row in found] if alone else []
        if len(keys) == 1:
            first = self._alone.setdefault(keys[0], device)
            elsewhere = [r for name, r in self._records.items() if name != device]
            if first != device or any(_share(d, rows) for r in elsewhere for d in r.deaths):
                for each in self._records.values():
                    each.deaths = [death for death in each.deaths if not _share(death, rows)]
        self._judge()

    def work(self, device: str) -> None:
        """A worker on the device has done something."""
        self._records.pop(device, None)
        for record in self._records.values():
            record.others_work = True
        self._judge()

    def _judge(self) -> None:
        guilty = {
            device
            for device, record in self._records.items()
            if record.others_work and record.num_apart >= MAX_DEATHS
        }
        self._trusted |= self.aside - guilty
        self.aside = frozenset(guilty - self._trusted)


def _share(death: Mapping[int, Rows], rows: Mapping[int, Rows]) -> bool:
    """Whether two deaths have a row in common."""
    return any(number in death and death[number] & found for number, found in rows.items())

"""How a run went, over time: one object a driver, rewritten while it runs, for the report.

Small whatever the run: see :mod:`batchrun.cluster.chronicle`, which makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batchrun.data.layout import history_path, run_folder
from batchrun.data.store import Store


@dataclass(frozen=True, slots=True)
class Moment:
    """The state of a submit, ``at`` seconds after its start. Numbers are sums since then; rows
    are finished ones, ``sampled_tokens`` those of unfinished rows too; ``in_flight`` are sequences
    that have a slot."""

    at: float
    rows: int = 0
    failed_rows: int = 0
    sampled_tokens: int = 0
    discarded_tokens: int = 0
    in_flight: int = 0
    workers: int = 0


@dataclass(frozen=True, slots=True)
class WorkerMoment:
    """The state of a worker, ``at`` seconds after the submit's start."""

    at: float
    tokens: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class WorkerHistory:
    """What a worker did. ``seconds`` are by state, as in ``batchrun_worker_state_seconds_total``;
    ``tokens`` those of rows that it finished; ``lost`` is why it is gone, "" as long as it is not.
    """

    host: str = ""
    device: str = ""
    lost: str = ""
    tokens: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    moments: tuple[WorkerMoment, ...] = ()


@dataclass(frozen=True, slots=True)
class History:
    """One submit of a run: one driver, from its start to its end.

    ``outcome`` is "" while it runs, and for ever if it was killed; ``updated_at`` says when it was
    last heard of. Times are Unix seconds.
    """

    epoch: int
    started_at: float
    updated_at: float
    version: str
    host: str
    outcome: str = ""
    message: str = ""
    exit_code: int | None = None
    restarts: Mapping[str, int] = field(default_factory=dict)
    moments: tuple[Moment, ...] = ()
    workers: Mapping[str, WorkerHistory] = field(default_factory=dict)

    @property
    def elapsed_s(self) -> float:
        """From the start to when it was last heard of."""
        return max(0.0, self.updated_at - self.started_at)

    @property
    def seconds(self) -> dict[str, float]:
        """What the workers' time went into, by state."""
        sums: dict[str, float] = {}
        for worker in self.workers.values():
            for state, spent in worker.seconds.items():
                sums[state] = sums.get(state, 0.0) + spent
        return sums


def write_history(store: Store, run: str, history: History) -> None:
    """Replace what is known of a driver; only that driver writes it."""
    store.put(history_path(run, history.epoch), json.dumps(asdict(history)).encode())


def read_histories(store: Store, run: str) -> tuple[History, ...]:
    """The histories of all drivers, in their order. What cannot be read is left out: a history is
    for people, and nothing depends on it."""
    found = []
    for item in sorted(store.list(f"{run_folder(run)}/history"), key=lambda item: item.path):
        data = store.read(item.path)
        try:
            found.append(_parse(json.loads(data or b"null")))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return tuple(found)


def _parse(raw: Any) -> History:
    workers = {
        name: WorkerHistory(
            **{**worker, "moments": tuple(WorkerMoment(**item) for item in worker["moments"])}
        )
        for name, worker in raw["workers"].items()
    }
    moments = tuple(Moment(**item) for item in raw["moments"])
    return History(**{**raw, "workers": workers, "moments": moments})

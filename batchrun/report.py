"""What a run did, gathered from its output alone, for a person who was asleep meanwhile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batchrun.data.facts import Facts, read_facts
from batchrun.data.history import History, read_histories
from batchrun.data.layout import run_folder
from batchrun.data.status import RunState, RunStatus, read_status
from batchrun.data.store import Store
from batchrun.metrics import WORKER_SECONDS

STATES = WORKER_SECONDS.labels["state"]
"""What a worker's time goes into, in the order of its life."""


@dataclass(frozen=True, slots=True)
class Report:
    """A run at the moment of asking.

    ``job`` is the resolved job without secrets. ``histories`` are its submits, as far as they
    are known; ``price`` is of one GPU hour, None where the job names none.
    """

    url: str
    status: RunStatus
    job: Mapping[str, Any]
    histories: tuple[History, ...]
    facts: Facts
    price: float | None

    @property
    def name(self) -> str:
        """The name of the job."""
        return str(self.job.get("name", "job"))

    @property
    def seconds(self) -> dict[str, float]:
        """What the workers' time went into, over all submits, by state."""
        sums = dict.fromkeys(STATES, 0.0)
        for history in self.histories:
            for state, spent in history.seconds.items():
                sums[state] = sums.get(state, 0.0) + spent
        return sums

    @property
    def worker_hours(self) -> float:
        """Hours of all workers together: GPU hours, where each has a GPU."""
        return sum(self.seconds.values()) / 3600

    @property
    def elapsed_s(self) -> float:
        """Wall-clock time of all submits together."""
        return sum(history.elapsed_s for history in self.histories)

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the engines sampled, over all submits."""
        return sum(h.moments[-1].sampled_tokens for h in self.histories if h.moments)

    @property
    def discarded_tokens(self) -> int:
        """Tokens of them that were lost with workers and sampled again."""
        return sum(h.moments[-1].discarded_tokens for h in self.histories if h.moments)

    @property
    def restarts(self) -> dict[str, int]:
        """Workers that were replaced, by cause."""
        sums: dict[str, int] = {}
        for history in self.histories:
            for cause, count in history.restarts.items():
                sums[cause] = sums.get(cause, 0) + count
        return sums

    @property
    def tokens_per_s(self) -> float:
        """Tokens sampled for each second of wall-clock time, with every start."""
        return self.sampled_tokens / self.elapsed_s if self.elapsed_s else 0.0

    def cost(self, hours: float) -> float | None:
        """The price of so many worker hours."""
        return None if self.price is None else hours * self.price

    @property
    def verdict(self) -> tuple[str, str]:
        """``good``, ``fair``, ``bad`` or ``open``, and the run in a sentence."""
        status = self.status
        done, total = status.counts.rows, status.total_rows
        failed = status.counts.failed_rows
        lost = f"; {len(status.failed_shards)} shards could not be run" * bool(status.failed_shards)
        match status.state:
            case RunState.FINISHED if not failed:
                return "good", f"All {total:,} rows are done and none failed."
            case RunState.FINISHED:
                return (
                    "fair",
                    f"All {total:,} rows are done; {failed:,} of them failed, as many as the job "
                    "allows.",
                )
            case RunState.FAILED:
                return (
                    "bad",
                    f"The run came to its end, but {failed:,} of {total:,} rows failed{lost}: more "
                    "than the job allows.",
                )
            case RunState.LIVE:
                return "open", f"The run goes on: {done:,} of {total:,} rows are done{lost}."
            case RunState.STOPPED:
                why = next((h.message for h in reversed(self.histories) if h.outcome), "")
                because = f" ({why})" if why else ""
                return (
                    "bad",
                    f"The run stopped{because}: {done:,} of {total:,} rows are done{lost}. Submit "
                    "the job again to resume it.",
                )

    def to_json(self) -> dict[str, object]:
        """Plain values for one JSON document."""
        status, facts = self.status, self.facts
        counts = asdict(status.counts)
        scores = status.counts.scores
        del counts["scores"]
        kind, sentence = self.verdict
        return {
            "name": self.name,
            "output": self.url,
            "run_id": status.run_id,
            "state": status.state.value,
            "verdict": kind,
            "summary": sentence,
            "rows": {
                "total": status.total_rows,
                "done": counts.pop("rows"),
                "failed": counts.pop("failed_rows"),
                "left": status.rows_left,
            },
            "shards": {
                "total": status.num_shards,
                "done": status.shards_done,
                "failed": {str(number): why for number, why in status.failed_shards.items()},
            },
            "counts": counts,
            "evaluation": None if scores is None else scores.report(),
            "elapsed_s": round(self.elapsed_s, 3),
            "worker_hours": round(self.worker_hours, 6),
            "worker_seconds": {state: round(spent, 3) for state, spent in self.seconds.items()},
            "cost": self.cost(self.worker_hours),
            "sampled_tokens": self.sampled_tokens,
            "discarded_tokens": self.discarded_tokens,
            "tokens_per_s": round(self.tokens_per_s, 3),
            "worker_restarts": self.restarts,
            "parts_read": facts.num_parts,
            "parts": facts.total_parts,
            "tokens": {name: asdict(spread) for name, spread in facts.tokens.items()},
            "finish_reasons": dict(facts.finish_reasons),
            "errors": dict(facts.errors),
            "failures": [asdict(item) for item in facts.failures],
            "longest": [asdict(item) for item in facts.longest],
            "submits": [
                {
                    "epoch": history.epoch,
                    "started_at": history.started_at,
                    "elapsed_s": round(history.elapsed_s, 3),
                    "host": history.host,
                    "version": history.version,
                    "outcome": history.outcome or None,
                    "exit_code": history.exit_code,
                    "message": history.message,
                    "workers": len(history.workers),
                    "worker_restarts": dict(history.restarts),
                }
                for history in self.histories
            ],
            "model_license": facts.model_license,
            "job": dict(self.job),
        }


def read_report(store: Store, *, texts: bool = True) -> Report:
    """Gather the report of the run in ``store``. Only reads, from any machine.

    Without ``texts`` it holds no id, no error message of a row and nothing that the model wrote.
    Raises :class:`~batchrun.errors.OutputError` when there is no run, or a part cannot be read.
    """
    status = read_status(store)
    record = json.loads(store.read(f"{run_folder(status.run_id)}/job.json") or b"{}")
    job = record.get("job", {})
    price = job.get("resources", {}).get("price_per_gpu_hour")
    return Report(
        url=store.url,
        status=status,
        job=job,
        histories=read_histories(store, status.run_id),
        facts=read_facts(store, status.parts.values(), texts=texts),
        price=price,
    )

"""What a run came to, for people, for ``--json`` and for :func:`batchrun.run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from batchrun.errors import BatchrunError, InterruptedRunError, TooManyFailuresError
from batchrun.events import OutcomeKind
from batchrun.records import Counts


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run. Rows and tokens are those of the whole output; ``generated_rows`` and
    ``generated_tokens`` those of this submit alone; ``journaled_rows`` are finished and safe, but
    not in a part yet. ``sampled_tokens`` are what its engines
    sampled: tokens of rows that were lost count too, tokens taken over from another run do not.
    ``prefix_tokens`` are the tokens of prompts that it did not have to compute, as another prompt
    with the same beginning had been there. ``startup_s`` of ``elapsed_s`` passed before the first
    worker had its model."""

    name: str
    run_id: str
    output: str
    outcome: OutcomeKind
    message: str
    total_rows: int
    counts: Counts
    failed_rows: int
    num_shards: int
    failed_shards: Mapping[str, str]
    journaled_rows: int
    generated_rows: int
    generated_tokens: int
    sampled_tokens: int
    prefix_tokens: int
    discarded_tokens: int
    restarts: int
    elapsed_s: float
    startup_s: float

    @property
    def exit_code(self) -> int:
        """The exit code of the command that ran it."""
        error = self.error
        return 0 if error is None else error.exit_code

    @property
    def error(self) -> BatchrunError | None:
        """Why the run is not a success, or None."""
        match self.outcome:
            case OutcomeKind.SUCCESS:
                return None
            case OutcomeKind.TOO_MANY_FAILURES:
                if self.failed_shards:
                    shards = "; ".join(f"{name}: {why}" for name, why in self.failed_shards.items())
                    return TooManyFailuresError(
                        f"{self.message} ({shards[:500]})",
                        "mend what is named and submit again: what is finished is kept",
                    )
                return TooManyFailuresError(
                    self.message,
                    "the column `error` of the output says why rows failed; "
                    "errors.max_failed_rows is how many may",
                )
            case OutcomeKind.CANARY_FAILED:
                return TooManyFailuresError(
                    self.message,
                    "nothing else was run; mend the job and submit again. "
                    "errors.canary_rows is how many rows are run first",
                )
            case OutcomeKind.LIMIT_REACHED:
                return InterruptedRunError(
                    f"{self.message}: {self._done} are done",
                    "everything finished so far is kept; raise the limit, or submit again to go on "
                    "with a new one",
                )
            case OutcomeKind.INTERRUPTED:
                return InterruptedRunError(
                    f"{self.message}: {self._done} are done",
                    "everything finished so far is kept; submit again to resume",
                )
            case OutcomeKind.NO_WORKERS:
                return BatchrunError(
                    f"no worker could be started: {self.message}",
                    "`batchrun doctor` checks the machine; what is done is kept",
                )

    @property
    def _done(self) -> str:
        done = self.counts.rows + self.journaled_rows
        return f"{done:,} of {self.total_rows:,} rows"

    def to_json(self) -> dict[str, object]:
        """Plain values for one JSON document."""
        counts = asdict(self.counts)
        del counts["rows"], counts["failed_rows"], counts["scores"]
        scores = self.counts.scores
        generated = self.generated_tokens
        return {
            "name": self.name,
            "run_id": self.run_id,
            "output": self.output,
            "outcome": self.outcome.value,
            "exit_code": self.exit_code,
            "message": self.message,
            "rows": {
                "total": self.total_rows,
                "done": self.counts.rows,
                "failed": self.failed_rows,
                "journaled": self.journaled_rows,
                "generated": self.generated_rows,
            },
            "shards": {
                "total": self.num_shards,
                "failed": dict(self.failed_shards),
            },
            **counts,
            "evaluation": None if scores is None else scores.report(),
            "generated_tokens": generated,
            "sampled_tokens": self.sampled_tokens,
            "prefix_tokens": self.prefix_tokens,
            "discarded_tokens": self.discarded_tokens,
            "tokens_per_s": round(generated / self.elapsed_s, 1) if self.elapsed_s else 0.0,
            "worker_restarts": self.restarts,
            "elapsed_s": round(self.elapsed_s, 3),
            "startup_s": round(self.startup_s, 3),
        }

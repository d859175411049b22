"""What a run came to, for people, for ``--json`` and for :func:`batchrun.run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from batchrun.data.retry import Retry
from batchrun.errors import BatchrunError, InterruptedRunError, TooManyFailuresError
from batchrun.events import OutcomeKind
from batchrun.records import Counts, ErrorKind, Part


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry came to. Of ``rows`` that were to be tried again ``done`` are in their parts,
    ``healed`` of them without an error. ``unfinished_shards`` have no part yet and were left."""

    errors: tuple[ErrorKind, ...]
    rows: int
    done: int
    healed: int
    unfinished_shards: int = 0

    @classmethod
    def of(cls, retry: Retry, parts: Mapping[int, Part], unfinished_shards: int) -> Retried:
        """Count a retry by the ``parts`` that are in place at its end."""
        replaced = [number for number in retry.rows if number in parts]
        before = sum(retry.replaces[number].counts.failed_rows for number in replaced)
        after = sum(parts[number].counts.failed_rows for number in replaced)
        return cls(
            retry.kinds,
            retry.num_rows,
            sum(len(retry.rows[number]) for number in replaced),
            before - after,
            unfinished_shards,
        )

    def to_json(self) -> dict[str, object]:
        """Plain values for one JSON document."""
        return {
            "errors": [kind.value for kind in self.errors],
            "rows": self.rows,
            "done": self.done,
            "healed": self.healed,
            "unfinished_shards": self.unfinished_shards,
        }


def retry_text(retry: Retry) -> str:
    """What a retry is about to do."""
    names = ", ".join(kind.value for kind in retry.kinds)
    if not retry.rows:
        return f"nothing to retry: no row failed with {names}"
    rows, parts = retry.num_rows, len(retry.rows)
    return (
        f"retrying {rows:,} {'row' if rows == 1 else 'rows'} of {parts:,} "
        f"{'part' if parts == 1 else 'parts'} ({names})"
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run. Rows and tokens are those of the whole output; ``generated_rows`` and
    ``generated_tokens`` those of this submit alone; ``journaled_rows`` are finished and safe, but
    not in a part yet. ``sampled_tokens`` are what its engines
    sampled: tokens of rows that were lost count too, tokens taken over from another run do not.
    ``prefix_tokens`` are the tokens of prompts that it did not have to compute, as another prompt
    with the same beginning had been there. ``startup_s`` of ``elapsed_s`` passed before the first
    worker had its model. ``retried`` is there when only failed rows were run."""

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
    retried: Retried | None = None

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
                if self.failed_shards and self.retried is not None:
                    shards = "; ".join(f"{name}: {why}" for name, why in self.failed_shards.items())
                    return TooManyFailuresError(
                        f"{len(self.failed_shards)} shards could not be run again ({shards[:500]})",
                        "their parts stay as they are; mend what is named and retry",
                    )
                if self.failed_shards:
                    shards = "; ".join(f"{name}: {why}" for name, why in self.failed_shards.items())
                    return TooManyFailuresError(
                        f"{self.message} ({shards[:500]})",
                        "mend what is named and submit again: what is finished is kept",
                    )
                return TooManyFailuresError(
                    self.message,
                    "the column `error` of the output says why rows failed; `batchrun retry` runs "
                    "those again that may heal; errors.max_failed_rows is how many may",
                )
            case OutcomeKind.CANARY_FAILED:
                return TooManyFailuresError(
                    self.message,
                    "nothing else was run; mend the job and submit again. "
                    "errors.canary_rows is how many rows are run first",
                )
            case OutcomeKind.LIMIT_REACHED:
                verb = "submit" if self.retried is None else "retry"
                return InterruptedRunError(
                    f"{self.message}: {self._done} are done",
                    f"everything finished so far is kept; raise the limit, or {verb} again to go "
                    "on with a new one",
                )
            case OutcomeKind.INTERRUPTED:
                if self.retried is not None:
                    return InterruptedRunError(
                        f"{self.message}: {self._done} to be retried are done",
                        "what is done is kept; the same retry goes on",
                    )
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
        if self.retried is not None:
            done = self.retried.done + self.journaled_rows
            return f"{done:,} of {self.retried.rows:,} rows"
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
            **({} if self.retried is None else {"retried": self.retried.to_json()}),
        }

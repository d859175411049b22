"""What a sweep found: accuracy, tokens, time and cost over the thinking budget. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchrun.cluster.budgets import Budget
from batchrun.cluster.summary import Summary
from batchrun.coordinator import OutcomeKind
from batchrun.errors import BatchrunError, InterruptedRunError
from batchrun.scores import Estimate


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent on one budget, over all submits of the sweep. ``working_seconds`` are those
    after the first worker had its model."""

    seconds: float = 0.0
    working_seconds: float = 0.0
    sampled_tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.seconds + other.seconds,
            self.working_seconds + other.working_seconds,
            self.sampled_tokens + other.sampled_tokens,
        )


@dataclass(frozen=True, slots=True)
class BudgetResult:
    """The run at one budget. ``num_samples`` is how many each row has."""

    budget: Budget
    summary: Summary
    num_samples: int
    spent: Spent

    @property
    def is_finished(self) -> bool:
        """Whether every row is done, well or not."""
        return self.summary.outcome in (OutcomeKind.SUCCESS, OutcomeKind.TOO_MANY_FAILURES)

    @property
    def accuracy(self) -> Estimate | None:
        """The share of right samples; None without ``evaluate``."""
        scores = self.summary.counts.scores
        return None if scores is None else scores.accuracy

    @property
    def mean_reasoning_tokens(self) -> float:
        """Reasoning tokens of a sample."""
        return self._mean(self.summary.counts.reasoning_tokens)

    @property
    def mean_completion_tokens(self) -> float:
        """Completion tokens of a sample."""
        return self._mean(self.summary.counts.completion_tokens)

    @property
    def mean_tokens(self) -> float:
        """Tokens that a sample takes in a run at this budget alone."""
        return self.mean_reasoning_tokens + self.mean_completion_tokens

    def _mean(self, tokens: int) -> float:
        return tokens / max(1, self.summary.counts.rows * self.num_samples)


@dataclass(frozen=True, slots=True)
class Curve:
    """The results from the least thinking to the most.

    ``base`` is the budget whose tokens the others took over; ``price_per_worker_s`` is None where
    the job names no price. ``is_complete`` says that all budgets of the sweep are there.
    """

    name: str
    output: str
    tolerance: float
    results: tuple[BudgetResult, ...]
    base: Budget
    num_workers: int
    price_per_worker_s: float | None
    is_complete: bool

    @property
    def best(self) -> BudgetResult | None:
        """The most accurate result, of equal ones the cheapest; None without ``evaluate``."""
        scored = [item for item in self.results if item.is_finished and item.accuracy is not None]
        return min(scored, key=lambda item: (-_share(item), item.mean_tokens), default=None)

    @property
    def cheapest(self) -> BudgetResult | None:
        """The result of the fewest tokens a sample whose accuracy is within the tolerance of the
        best; None as long as the sweep is not complete, or without ``evaluate``."""
        best = self.best
        if best is None or not self.is_complete:
            return None
        least = _share(best) - self.tolerance - 1e-12
        near = [
            item
            for item in self.results
            if item.is_finished and item.accuracy is not None and _share(item) >= least
        ]
        return min(near, key=lambda item: (item.mean_tokens, item.budget.rank))

    @property
    def error(self) -> BatchrunError | None:
        """Why the sweep is no success: what stopped it, else the first run that is none."""
        errors = [item.summary.error for item in self.results if item.summary.error is not None]
        stopped = (item.summary.error for item in self.results if not item.is_finished)
        first = next(stopped, None)
        if first is None and not self.is_complete:
            return InterruptedRunError(
                f"stopped: {len(self.results)} budgets are done, the others are not begun",
                "everything finished so far is kept; the same command resumes",
            )
        return first or next(iter(errors), None)

    def alone_seconds(self, result: BudgetResult) -> float | None:
        """About how long a run at this budget alone takes, without its start: what it took here,
        and the tokens that it took over at the pace of the base. None where that is not known."""
        base = next((item for item in self.results if item.budget == self.base), None)
        if base is None or not base.spent.sampled_tokens or not result.spent.seconds:
            return None
        tokens = result.summary.counts.output_tokens
        saved = max(0, tokens - result.spent.sampled_tokens)
        pace = base.spent.working_seconds / base.spent.sampled_tokens
        return result.spent.working_seconds + saved * pace

    def cost(self, seconds: float | None) -> float | None:
        """The price of so many seconds of all workers, each of them a GPU; None without one."""
        if seconds is None or self.price_per_worker_s is None:
            return None
        return seconds * self.num_workers * self.price_per_worker_s

    def to_json(self) -> dict[str, object]:
        """Plain values: the document of ``--json`` and of ``sweep.json``."""
        best, cheapest = self.best, self.cheapest
        return {
            "name": self.name,
            "output": self.output,
            "complete": self.is_complete,
            "tolerance": self.tolerance,
            "best": None if best is None else best.budget.name,
            "cheapest": None if cheapest is None else cheapest.budget.name,
            "budgets": [self._plain(item) for item in self.results],
        }

    def _plain(self, item: BudgetResult) -> dict[str, object]:
        counts, alone = item.summary.counts, self.alone_seconds(item)
        summary = item.summary
        return {
            "budget": item.budget.name,
            "run_id": summary.run_id,
            "output": summary.output,
            "outcome": summary.outcome.value,
            "exit_code": summary.exit_code,
            "rows": {
                "total": summary.total_rows,
                "done": counts.rows,
                "failed": summary.failed_rows,
            },
            "samples": item.num_samples,
            "evaluation": None if counts.scores is None else counts.scores.report(),
            "prompt_tokens": counts.prompt_tokens,
            "reasoning_tokens": counts.reasoning_tokens,
            "completion_tokens": counts.completion_tokens,
            "mean_reasoning_tokens": round(item.mean_reasoning_tokens, 3),
            "mean_completion_tokens": round(item.mean_completion_tokens, 3),
            "thinking_budget_hits": counts.thinking_budget_hits,
            "spent": {
                "seconds": round(item.spent.seconds, 3),
                "working_seconds": round(item.spent.working_seconds, 3),
                "sampled_tokens": item.spent.sampled_tokens,
                "cost": _rounded(self.cost(item.spent.seconds)),
            },
            "alone": {"seconds": _rounded(alone), "cost": _rounded(self.cost(alone))},
        }


def read_spent(document: object) -> Mapping[tuple[str, str], Spent]:
    """What an earlier ``sweep.json`` says was spent, by budget and run; nothing where it is not
    such a document."""
    found: dict[tuple[str, str], Spent] = {}
    raw: Any = document
    try:
        for item in raw["budgets"]:
            spent = item["spent"]
            key = (str(item["budget"]), str(item["run_id"]))
            found[key] = Spent(
                float(spent["seconds"]),
                float(spent["working_seconds"]),
                int(spent["sampled_tokens"]),
            )
    except (KeyError, TypeError, ValueError):
        return {}
    return found


def _share(item: BudgetResult) -> float:
    assert item.accuracy is not None
    return item.accuracy.value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)

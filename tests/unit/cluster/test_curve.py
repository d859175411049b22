"""The results of a sweep: which budget to take, what it costs, and why it failed."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from batchrun.cli.curve import curve_text
from batchrun.cluster.budgets import Budget
from batchrun.cluster.curve import BudgetResult, Curve, Spent, read_spent
from batchrun.cluster.summary import Summary
from batchrun.coordinator import OutcomeKind
from batchrun.records import Counts
from batchrun.scores import Scores


def result(
    name: str,
    right: int | None,
    tokens: int,
    *,
    spent: Spent | None = None,
    outcome: OutcomeKind = OutcomeKind.SUCCESS,
) -> BudgetResult:
    """A budget with so many right of 100 rows (None: not scored) and so many tokens a row."""
    scores = None if right is None else Scores((100 - right, right), right)
    counts = Counts(
        rows=100, reasoning_tokens=100 * (tokens - 5), completion_tokens=500, scores=scores
    )
    summary = Summary(
        name="job", run_id=f"run-{name}", output=f"out/budget-{name}", outcome=outcome,
        message="told to stop", total_rows=100, counts=counts, failed_rows=0, num_shards=1,
        prefix_tokens=0, journaled_rows=0,
        failed_shards={}, generated_rows=100, generated_tokens=0, sampled_tokens=0,
        discarded_tokens=0, restarts=0, elapsed_s=1.0, startup_s=0.5,
    )  # fmt: skip
    return BudgetResult(Budget(name), summary, 1, spent or Spent())


def curve(results: Sequence[BudgetResult], **changes: object) -> Curve:
    """A curve of two workers that cost 36 an hour each."""
    values: dict[str, object] = {
        "name": "job", "output": "out", "tolerance": 0.01, "results": tuple(results),
        "base": results[-1].budget, "num_workers": 2, "price_per_worker_s": 0.01,
        "is_complete": True,
    }  # fmt: skip
    return Curve(**{**values, **changes})  # type: ignore[arg-type]


def test_the_cheapest_within_the_tolerance_has_the_fewest_tokens() -> None:
    """Within means at most so far below the best; a larger budget may take fewer tokens."""
    results = [
        result("off", 90, 30),
        result("8", 97, 12),
        result("16", 98, 25),
        result("32", 99, 20),
    ]
    assert curve(results).best is results[3]
    for tolerance, expected in ((0.0, "32"), (0.01, "32"), (0.02, "8"), (0.09, "8")):
        found = curve(results, tolerance=tolerance).cheapest
        assert found is not None and found.budget.name == expected
    same = [result("8", 99, 12), result("16", 99, 12), result("32", 99, 20)]
    assert curve(same).best is curve(same).cheapest is same[0]


def test_nothing_is_named_before_all_is_there() -> None:
    """A sweep that was stopped, or has no scores, does not say which budget to take."""
    half = [result("8", 97, 12, outcome=OutcomeKind.INTERRUPTED), result("32", 99, 20)]
    stopped = curve(half, is_complete=False)
    assert stopped.cheapest is None and "cheapest" not in curve_text(stopped)
    plain = curve([result("8", None, 12), result("32", None, 20)])
    assert plain.best is plain.cheapest is None
    text = curve_text(plain)
    assert "accuracy" not in text and "|" not in text and "reasoning" in text


def test_a_budget_alone_takes_what_it_took_and_what_it_took_over() -> None:
    """4 s for 2,000 tokens, so 2.2 s for the 1,100 of another run; two workers of 0.01 a second."""
    base = result("32", 99, 20, spent=Spent(6.0, 4.0, 2000))
    small = result("8", 97, 12, spent=Spent(0.5, 0.25, 100))
    found = curve([small, base])
    assert found.alone_seconds(small) == pytest.approx(2.45)
    document = json.loads(json.dumps(found.to_json()))
    assert document["budgets"][0]["alone"] == {"seconds": 2.45, "cost": 0.049}
    assert document["budgets"][1]["spent"]["cost"] == pytest.approx(0.12)
    assert (document["best"], document["cheapest"]) == ("32", "32")
    assert read_spent(document) == {
        ("8", "run-8"): Spent(0.5, 0.25, 100), ("32", "run-32"): Spent(6.0, 4.0, 2000)
    }  # fmt: skip
    damaged_ones: list[object] = [None, [], {"budgets": [{"budget": "8"}]}, {"budgets": 3}, "x"]
    assert found.alone_seconds(base) == pytest.approx(4.0)
    assert curve([result("8", 97, 12), base]).alone_seconds(result("8", 97, 12)) is None
    for damaged in damaged_ones:
        assert read_spent(damaged) == {}
    free = curve([small, base], price_per_worker_s=None)
    assert "cost" in curve_text(found) and "cost" not in curve_text(free)


def test_the_plot_has_a_line_a_budget_on_one_scale() -> None:
    """The share stands at its place between 0 and 100%, inside its interval."""
    text = curve_text(curve([result("off", 0, 5), result("8", 50, 12), result("full", 100, 20)]))
    lines = [line.partition("|")[2] for line in text.splitlines() if "|" in line]
    assert [line.index("o") for line in lines] == [0, 30, 60]
    assert [line.index("]") for line in lines[:2]] == [2, 36]
    assert lines[1].index("[") == 24 and text.splitlines()[-1].startswith("cheapest")


def test_the_error_is_what_stopped_the_sweep() -> None:
    """An interruption first, then failed rows, then budgets that were not begun."""
    failed = result("8", 97, 12, outcome=OutcomeKind.TOO_MANY_FAILURES)
    stopped = result("4", 97, 12, outcome=OutcomeKind.INTERRUPTED)
    whole = result("32", 99, 20)
    codes = []
    for results, is_complete in (
        ([whole], True),
        ([failed, whole], True),
        ([stopped, failed, whole], False),
        ([whole], False),
    ):
        error = curve(results, is_complete=is_complete).error
        codes.append(0 if error is None else error.exit_code)
    assert codes == [0, 3, 75, 75]

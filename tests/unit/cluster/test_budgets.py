"""Thinking budgets: words of the command line, in order, and the job at each."""

from __future__ import annotations

import pytest

from batchrun.cluster.budgets import Budget, parse_budgets
from batchrun.errors import RequestError
from batchrun.job import parse_job
from batchrun.jobfile import JobSource


def test_budgets_go_from_the_least_thinking_to_the_most() -> None:
    """However they are written: `off`, numbers, `full`."""
    found = parse_budgets("64, full,0,OFF,008")
    assert [budget.name for budget in found] == ["off", "0", "8", "64", "full"]
    assert [budget.num_tokens for budget in found] == [None, 0, 8, 64, None]
    assert [budget.thinks for budget in found] == [False, True, True, True, True]


@pytest.mark.parametrize(
    "text",
    ["", "1,,2", "-1", "1.5", "8;16", "none", "0x10", "٣", "1e3", "2147483648", "8,8", "08,8"],
)
def test_what_is_no_budget_is_said(text: str) -> None:
    """The word is named; twice the same budget would be one run in one place."""
    with pytest.raises(RequestError, match=r"no thinking budget|there twice"):
        parse_budgets(text)


def test_the_job_at_a_budget_is_the_job_with_that_budget() -> None:
    """It is equal to the one that names the budget itself, so it is the same run."""
    raw = {
        "model": {"path": "tiny"},
        "input": {"path": "in", "prompt_column": "prompt"},
        "generation": {"reasoning": False, "max_thinking_tokens": 7, "seed": 3},
        "output": {"path": "out/"},
    }
    job = parse_job(JobSource.of_mapping(raw))
    for name, reasoning, tokens in (("off", False, None), ("16", True, 16), ("full", True, None)):
        generation = {"reasoning": reasoning, "max_thinking_tokens": tokens, "seed": 3}
        output = {"path": f"out/budget-{name}"}
        expected = {**raw, "generation": generation, "output": output}
        assert Budget(name).job(job) == parse_job(JobSource.of_mapping(expected))

"""Scores of whole runs: in the output, in the summary, in `status`, over a resume."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

import batchrun
from batchrun.cli.runner import summary_text
from batchrun.cli.status import status_json, status_text
from batchrun.data.status import read_status
from batchrun.data.store import Store
from batchrun.errors import JobError, OutputError

from .conftest import WarmRuns, Work, answer_of, sums


def write_sums(work: Work, name: str, count: int, start: int = 1) -> list[str]:
    """An input file of questions with their answers; those answers."""
    questions = sums(count, start)
    answers = [answer_of(question) for question in questions]
    work.write(name, questions, answer=pa.array(answers))
    return answers


def test_a_run_knows_its_accuracy(work: Work, warm: WarmRuns) -> None:
    """`correct` stands last and is right row by row; everything that counts rows tells accuracy."""
    answers = [*write_sums(work, "a", 12), *write_sums(work, "b", 8, start=40)]
    work.write("c", ["What is 1+1?", None], answer=pa.array([None, "3"], pa.string()))
    evaluate = {"answer_column": "answer", "scorer": "number"}
    summary = warm(work.raw(evaluate=evaluate, errors={"max_failed_rows": 1}))
    table = ds.dataset(work.folder / "out").to_table()
    assert table.column_names[-1] == "correct" and "answer" not in table.column_names
    rows = table.to_pylist()
    expected = [row["completion"] == answer for row, answer in zip(rows, answers, strict=False)]
    assert [row["correct"] for row in rows] == [*expected, None, False]
    assert rows[-1]["error"].startswith("invalid_prompt")
    scores = summary.counts.scores
    assert scores is not None
    assert (scores.num_rows, scores.num_correct) == (21, sum(expected))
    assert sum(expected) >= 18
    report = scores.report()
    assert summary.to_json()["evaluation"] == report
    success = json.loads((work.folder / "out" / "_SUCCESS").read_text())
    assert success["evaluation"] == report
    status = read_status(Store.open(str(work.folder / "out")))
    assert status_json("out", status)["evaluation"] == report
    share = f"{sum(expected) / 21:.1%} (95% interval "
    assert f"  right   {share}" in status_text("out", status)
    assert f"  right   {share}" in summary_text(summary)
    # The same job again reads no row, and says the same.
    again = warm(work.raw(evaluate=evaluate, errors={"max_failed_rows": 1}))
    assert (again.generated_rows, again.counts) == (0, summary.counts)


def test_samples_have_pass_at_k_and_a_vote(work: Work, warm: WarmRuns) -> None:
    """With n samples, shares come from all of them; input that grows adds to the counts."""
    answers = write_sums(work, "a", 4)
    sections = {
        "generation": {"n": 3, "temperature": 1.0},
        "evaluate": {"answer_column": "answer", "scorer": "math"},
    }
    warm(work.raw(**sections))
    answers += write_sums(work, "b", 3, start=20)
    summary = warm(work.raw(**sections))
    rows = work.rows()
    expected = [row["completion"] == answers[place // 3] for place, row in enumerate(rows)]
    assert [row["correct"] for row in rows] == expected
    scores = summary.counts.scores
    assert scores is not None and (scores.num_rows, scores.num_samples) == (7, 3)
    any_right = [any(expected[3 * place : 3 * place + 3]) for place in range(7)]
    found = scores.pass_at(3)
    assert found is not None and found.value == pytest.approx(sum(any_right) / 7)
    assert [line.split()[0] for line in summary_text(summary).splitlines()[3:7]] == [
        "right", "pass@2", "pass@3", "vote",
    ]  # fmt: skip


def test_another_scorer_is_another_run(work: Work, warm: WarmRuns) -> None:
    """What decides `correct` is content: it cannot change below parts that are finished."""
    write_sums(work, "a", 2)
    warm(work.raw(evaluate={"answer_column": "answer", "scorer": "exact"}))
    with pytest.raises(OutputError, match=r'evaluate\.scorer: "exact" -> "number"'):
        warm(work.raw(evaluate={"answer_column": "answer", "scorer": "number"}))
    with pytest.raises(OutputError, match="evaluate"):
        warm(work.raw())


def test_a_column_that_is_not_there_is_found_first(work: Work) -> None:
    """A wrong answer column is a job error; nothing is written."""
    write_sums(work, "a", 2)
    with pytest.raises(JobError, match=r"evaluate\.answer_column.*no column 'anser'"):
        batchrun.run(work.raw(evaluate={"answer_column": "anser", "scorer": "exact"}))
    assert not (work.folder / "out").exists()

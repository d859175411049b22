"""Sweeps over thinking budgets: every budget as if it were run alone, for little more than one."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import batchrun
from batchrun.cli import main
from batchrun.cluster import fleet
from batchrun.cluster.budgets import parse_budgets
from batchrun.cluster.curve import BudgetResult, Curve
from batchrun.cluster.sweep import run_sweep
from batchrun.cluster.view import NoView
from batchrun.data.store import Store
from batchrun.data.verify import verify_run
from batchrun.errors import JobError, OutputError
from batchrun.job import parse_job
from batchrun.jobfile import JobSource

from .conftest import Call, Command, WarmRuns, Work, answer_of, sums

SECTIONS: dict[str, dict[str, object]] = {
    "generation": {"max_tokens": 64, "temperature": 0.7, "n": 2, "logprobs": 0, "seed": 4},
    "evaluate": {"answer_column": "answer", "scorer": "exact"},
    "errors": {"max_failed_rows": 1},
}


def write_questions(work: Work) -> None:
    """41 rows in two files; one of them cannot be asked."""
    for name, count, start in (("a", 25, 1), ("b", 15, 60)):
        questions: list[object] = list(sums(count, start))
        answers = [answer_of(str(question)) for question in questions]
        if name == "b":
            questions, answers = [None, *questions], ["0", *answers]
        work.write(name, questions, answer=pa.array(answers))


def sweep(work: Work, budgets: str, output: str = "sweep", **changes: object) -> Curve:
    """A sweep of the job over the questions."""
    job = parse_job(JobSource.of_mapping(work.raw(output, **SECTIONS)))
    return run_sweep(job, parse_budgets(budgets), **changes)  # type: ignore[arg-type]


def close_rows(work: Work, output: str) -> list[dict[str, object]]:
    """The rows of an output, log-probabilities as far as rounding leaves them alone."""
    rows = work.rows(output)
    for row in rows:
        values = row["logprobs"]
        if isinstance(values, list):
            row["logprobs"] = [v if v is None else pytest.approx(v, abs=1e-3) for v in values]
    return rows


@pytest.fixture
def alone(cluster: str) -> Iterator[WarmRuns]:
    """Runs without a sweep, of one test: a sweep in the next one needs the cluster for itself."""
    runs = WarmRuns()
    yield runs
    runs.close()


def test_a_budget_of_a_sweep_is_the_run_at_that_budget(
    work: Work, alone: WarmRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, texts, counts and scores; for the answers alone, in workers that stay."""
    ended: list[object] = []
    end_actor = fleet.end_actor

    def end(actor: object) -> None:
        ended.append(actor)
        end_actor(actor)

    monkeypatch.setattr(fleet, "end_actor", end)
    write_questions(work)
    curve = sweep(work, "off,6,16,full")
    assert curve.error is None and curve.is_complete
    assert len(ended) == 1  # one worker for four runs
    for item, reasoning in zip(curve.results, (False, True, True, True), strict=True):
        name = item.budget.name
        generation = {
            **SECTIONS["generation"],
            "reasoning": reasoning,
            "max_thinking_tokens": item.budget.num_tokens,
        }
        summary = alone(work.raw(f"alone-{name}", **{**SECTIONS, "generation": generation}))
        assert work.rows(f"alone-{name}") == close_rows(work, f"sweep/budget-{name}")
        assert summary.counts == item.summary.counts
        assert summary.run_id == item.summary.run_id
        assert verify_run(Store.open(str(work.folder / f"sweep/budget-{name}"))).problems == ()
    _, six, sixteen, full = curve.results
    assert full.spent.sampled_tokens == sum(
        int(str(row[f"{kind}_tokens"]))
        for row in work.rows("sweep/budget-full")
        for kind in ("reasoning", "completion")
    )
    for item in (six, sixteen):  # what was cut costs its answer, what was not costs nothing
        assert item.spent.sampled_tokens == sum(
            int(str(row["completion_tokens"]))
            for row in work.rows(f"sweep/budget-{item.budget.name}")
            if row["thinking_budget_hit"]
        )
    shares = [item.accuracy.value for item in curve.results if item.accuracy is not None]
    assert len(shares) == 4 and shares[-1] > 0.75 > 0.5 > shares[0]
    assert curve.cheapest is full
    document = json.loads((work.folder / "sweep/sweep.json").read_text())
    assert document == curve.to_json()
    assert [item["budget"] for item in document["budgets"]] == ["off", "6", "16", "full"]


def same_spent(one: BudgetResult, other: BudgetResult) -> bool:
    """Equal as far as the document holds it."""
    seconds = round(one.spent.seconds, 3) == round(other.spent.seconds, 3)
    return seconds and one.spent.sampled_tokens == other.spent.sampled_tokens


class StopAfter(NoView):
    """Sets ``stop`` when the sweep comes to a budget."""

    def __init__(self, budget: str) -> None:
        self.stop = threading.Event()
        self._line = f"thinking budget {budget} "

    def say(self, text: str) -> None:
        """Look for the line."""
        if text.startswith(self._line):
            self.stop.set()


@pytest.mark.usefixtures("cluster")
def test_a_sweep_goes_on_where_it_was_stopped(work: Work) -> None:
    """What is finished is not run again, whether or not the tokens it kept are still there."""
    write_questions(work)
    view = StopAfter("6")
    stopped = sweep(work, "0,6,16", view=view, stop=view.stop)
    assert not stopped.is_complete and stopped.cheapest is None
    assert stopped.error is not None and stopped.error.exit_code == 75
    assert [item.budget.name for item in stopped.results] == ["6", "16"]
    traces = list((work.folder / "sweep").rglob("traces/*.parquet"))
    assert len(traces) == 2
    traces[0].unlink()  # lost: generated again
    whole = sweep(work, "0,6,16")
    assert whole.error is None and whole.is_complete
    none, six, sixteen = whole.results
    assert sixteen.summary.generated_rows == 0
    assert same_spent(sixteen, stopped.results[1])
    assert six.spent.sampled_tokens > 0
    generation = {**SECTIONS["generation"], "max_thinking_tokens": 6}
    batchrun.run(work.raw("alone", **{**SECTIONS, "generation": generation}))
    assert work.rows("alone") == close_rows(work, "sweep/budget-6")
    again = sweep(work, "0,6,16,24")  # one more budget, which is the base now
    assert [item.summary.generated_rows for item in again.results] == [0, 0, 0, 41]
    assert all(map(same_spent, again.results[:3], (none, six, sixteen)))


@pytest.mark.usefixtures("cluster")
def test_deterministic_sweeps_are_equal_to_the_byte(work: Work) -> None:
    """Nothing is taken over then, so the parts are those of the runs alone."""
    work.write("a", sums(6), answer=pa.array([answer_of(text) for text in sums(6)]))
    sweep(work, "4,full", deterministic=True)
    generation = {**SECTIONS["generation"], "max_thinking_tokens": 4}
    sections = {**SECTIONS, "generation": generation}
    batchrun.run(work.raw("alone", **sections), deterministic=True)
    assert work.rows("alone") == work.rows("sweep/budget-4")
    assert not list((work.folder / "sweep").rglob("traces/*"))


def test_sigterm_keeps_what_is_done(
    work: Work, batchrun: Callable[..., Command], call: Call, cluster: str
) -> None:
    """Exit code 75 in the midst of the first budget; the same command does the rest."""
    for number in range(6):
        work.write(str(number), sums(30, start=1 + 30 * number))
    job = work.job_file("sweep", generation={"n": 4, "temperature": 0.7})
    arguments = ["sweep", job, "--thinking-budget", "0,full", "--address", cluster]
    command = batchrun(*arguments)
    command.wait_until(lambda: len(work.parts("sweep/budget-full")) >= 1)
    command.process.send_signal(signal.SIGTERM)
    code, out, err = command.end(timeout_s=20)
    assert code == 75 and "cheapest" not in out
    assert "submit again to resume" in err and "Traceback" not in err
    kept = len(work.parts("sweep/budget-full"))
    assert 1 <= kept < 6 and not work.parts("sweep/budget-0")
    code, out, err = call(*arguments)
    assert code == 0, err
    assert len(work.rows("sweep/budget-0")) == len(work.rows("sweep/budget-full")) == 720
    assert "accuracy" not in out and "cost" not in out  # neither scores nor a price


def test_a_sweep_in_s3(work: Work, s3_server: object, cluster: str) -> None:
    """Output, kept tokens and the document in object storage: the same rows as from disk."""
    options = s3_server.storage_options  # type: ignore[attr-defined]
    url = s3_server.url  # type: ignore[attr-defined]
    work.write("a", sums(10))
    raw = work.raw("out", output={"path": f"{url}/out", "storage_options": options})
    curve = run_sweep(parse_job(JobSource.of_mapping(raw)), parse_budgets("4,full"))
    assert curve.error is None
    tokens = {int(row["completion_tokens"]) for row in remote_rows(url, options, "budget-4")}
    assert curve.results[0].spent.sampled_tokens <= 10 * max(tokens)
    store = Store.open(f"{url}/out", options)
    assert json.loads(store.read("sweep.json") or b"") == curve.to_json()
    here = parse_job(JobSource.of_mapping(work.raw("out")))
    run_sweep(here, parse_budgets("4,full"))
    for name in ("budget-4", "budget-full"):
        assert remote_rows(url, options, name) == work.rows(f"out/{name}")


def remote_rows(url: str, options: dict[str, object], name: str) -> list[dict[str, Any]]:
    """The rows of a budget in S3."""
    store = Store.open(f"{url}/out/{name}", options)
    [part] = [item.path for item in store.list(recursive=False) if "part-" in item.path]
    with store.open_file(part) as source:
        rows: list[dict[str, Any]] = pq.read_table(source).to_pylist()
    return rows


def test_what_cannot_be_swept_is_refused(work: Work) -> None:
    """Columns that set the budget, and an output that is another run's: nothing is written."""
    work.write("a", sums(2), reasoning=pa.array([True, False]), answer=pa.array(["1", "2"]))
    raw = work.raw("sweep", **SECTIONS, input={"overrides": ["reasoning"]})
    with pytest.raises(JobError, match=r"input\.overrides: a sweep sets reasoning for all rows"):
        run_sweep(parse_job(JobSource.of_mapping(raw)), parse_budgets("0,1"))
    assert not (work.folder / "sweep").exists()
    run_folder = work.folder / "sweep/_batchrun/abc"
    run_folder.mkdir(parents=True)
    (run_folder / "job.json").write_text("{}")
    with pytest.raises(OutputError, match="is the output of a run"):
        sweep(work, "0,1")
    assert not list((work.folder / "sweep").glob("budget-*/*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--thinking-budget", "1,x"],
        ["--thinking-budget", "-1"],
        ["--thinking-budget", "4,4"],
        ["--thinking-budget", ""],
        ["--thinking-budget", "4", "--tolerance", "2"],
        ["--thinking-budget", "4", "--tolerance", "nan"],
        [],
    ],
)
def test_wrong_budgets_are_usage_errors(arguments: list[str]) -> None:
    """Exit code 2, before the job file is looked at."""
    result = CliRunner().invoke(main, ["sweep", "nowhere.yaml", *arguments])
    assert result.exit_code == 2
    assert "--thinking-budget" in result.output or "--tolerance" in result.output
    assert " sweep --help`" in result.output


def test_the_demonstration_can_be_swept(call: Call, cluster: str, tmp_path: Path) -> None:
    """The command: table, plot and choice on stdout, then JSON alone."""
    arguments = [
        "sweep", "jobs/demo.yaml", "--thinking-budget", "off,0,full", "--set", "input.limit=40",
        "--set", f"output.path={tmp_path / 'sweep'}", "--set", "metrics.port=null",
    ]  # fmt: skip
    code, out, said = call(*arguments)
    assert code == 0, said
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["budget", "off", "0", "full"]
    assert "\n\ncheapest within 1% of the best: budget full" in out
    assert "thinking budget off (3 of 3)" in said and "done: 3 budgets" in said
    code, out, said = call(*arguments, "--json", "--quiet")
    assert (code, said) == (0, "")
    document = json.loads(out)
    assert document == json.loads((tmp_path / "sweep/sweep.json").read_text())
    rows = [item["rows"] for item in document["budgets"]]
    assert rows == [{"total": 40, "done": 40, "failed": 0}] * 3

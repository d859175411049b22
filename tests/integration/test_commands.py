"""The commands as a shell sees them: exit codes, stdout for data, stderr for people."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT, Call, Command, Work, sums


def test_submit_status_discard(work: Work, batchrun: Callable[..., Command], call: Call) -> None:
    """The life of jobs/demo.yaml, cut short: submit, with its accuracy for people and in JSON,
    look, submit again, discard."""
    demo = yaml.safe_load((ROOT / "jobs/demo.yaml").read_text())
    demo["input"] |= {"path": str(ROOT / demo["input"]["path"]), "limit": 12}
    demo |= {"output": {"path": str(work.folder / "out")}, "metrics": {"port": 0}}
    job = work.folder / "demo.yaml"
    job.write_text(json.dumps(demo))
    # A Ray of its own, started and stopped.
    code, out, err = batchrun("submit", job, "--json").end(timeout_s=90)
    assert code == 0, err
    told = json.loads(out)
    assert told["rows"]["done"] == 12
    assert "12/12" in err or "rows" in err
    assert "Traceback" not in err
    assert [row["completion"] is not None for row in work.rows()] == [True] * 12
    num_right = sum(row["correct"] is True for row in work.rows())
    scores = told["evaluation"]
    assert (scores["rows"], scores["samples"], scores["correct"]) == (12, 1, num_right)
    assert num_right >= 10 and f"right   {num_right / 12:.1%}" in err

    code, out, err = call("status", work.folder / "out")
    assert (code, err) == (0, "")
    assert "finished" in out and "12 of 12 done" in out
    code, out, err = call("status", job, "--json")
    status = json.loads(out)
    assert (status["state"], status["rows"]) == (
        "finished",
        {"total": 12, "done": 12, "failed": 0, "left": 0, "journaled": 0},
    )

    # Nothing is left to do: no Ray is started for that.
    code, out, err = call("submit", job, "-q", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["rows"] == {
        "total": 12,
        "done": 12,
        "failed": 0,
        "journaled": 0,
        "generated": 0,
    }

    # A plan knows what is done, and how long it turned out to be.
    code, out, err = call("plan", job, "--accelerator", "A10G", "--json")
    plan = json.loads(out)
    assert (code, plan["done_rows"], plan["durations"][0]["seconds"]["high"]) == (0, 12, 0)
    made = [row["reasoning_tokens"] + row["completion_tokens"] for row in work.rows()]
    assert plan["output"]["tokens_per_sample"]["expected"] == pytest.approx(sum(made) / 12)
    code, out, err = call("plan", job, "--accelerator", "A10G", "--set", "generation.seed=7")
    assert code == 0 and "submit will refuse it" in out

    code, out, err = call("discard", work.folder / "out", "--yes")
    assert (code, out) == (0, "")
    assert work.parts() == []
    code, out, err = call("status", work.folder / "out")
    assert (code, out) == (2, "")
    assert "holds no run" in err


def test_run_joins_a_cluster(work: Work, batchrun: Callable[..., Command], cluster: str) -> None:
    """`batchrun run` works inside a cluster that is there, and leaves it running."""
    work.write("a", [*sums(2), None])
    code, out, err = batchrun("run", work.job_file(), "--address", cluster, "--json").end()
    assert (code, json.loads(out)["rows"]) == (
        3,
        {"total": 3, "done": 3, "failed": 1, "journaled": 0, "generated": 3},
    ), err
    assert "error: 1 of 3 rows failed" in err
    import ray

    assert len(ray.nodes()) == 1


def test_no_cluster_is_exit_code_2(work: Work, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens, `run` says so at once and nothing is written."""
    from batchrun.cluster import session

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert session  # the module that asks
    work.write("a", sums(1))
    code, out, err = call("run", work.job_file(), "--address", "127.0.0.1:1")
    assert (code, out) == (2, "")
    assert "no Ray cluster answers at '127.0.0.1:1'" in err
    assert not (work.folder / "out").exists()


@pytest.mark.parametrize("how", ["option", "job", "environment"])
def test_a_cluster_that_does_not_answer_is_named(
    work: Work, call: Call, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """With an address, wherever it stands, a job goes to that cluster and never runs here."""
    work.write("a", sums(1))
    arguments: list[object] = ["submit"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if how == "option":
        arguments += [work.job_file(), "--address", "http://127.0.0.1:1"]
    elif how == "job":
        arguments += [work.job_file(ray={"address": "http://127.0.0.1:1"})]
    else:
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
        arguments += [work.job_file()]
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "no Ray dashboard answers at 'http://127.0.0.1:1'" in err and "--address" in err
    assert not (work.folder / "out").exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"input": {"path": "/nowhere"}}, "input.path: /nowhere does not exist"),
        ({"generation": {"max_tokns": 3}}, "did you mean max_tokens"),
        ({"generation": {"tools": [{"nam": "f"}]}}, "generation.tools[0]: has no name"),
        ({"model": {"quantization": "int4"}}, "not available in this version"),
        ({"input": {"prompt_column": "text"}}, "no column 'text'"),
    ],
)
def test_bad_jobs_are_exit_code_2(
    work: Work, call: Call, section: dict[str, dict[str, object]], said: str
) -> None:
    """A job that cannot run is exit code 2 with file, line and key; nothing is written."""
    work.write("a", sums(1))
    job = work.job_file(**section)
    code, out, err = call("submit", job)
    assert (code, out) == (2, "")
    assert said in err and f"{job}:" in err
    assert "Traceback" not in err
    assert not (work.folder / "out").exists()


def test_discard_asks(work: Work, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --yes and without an answer nothing is deleted."""
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        code, out, err = call("discard", work.folder)
    assert (code, out) == (1, "")
    assert "not confirmed" in err


def test_doctor_looks_at_everything(call: Call, tmp_path: Path) -> None:
    """Each check says ok, missing or failed; a machine that can run is exit code 0."""
    code, out, err = call("doctor", tmp_path / "out", "--json")
    found = json.loads(out)
    assert (code, err, found["ok"]) == (0, "", True)
    names = {check["name"]: check["state"] for check in found["checks"]}
    for name in ("python", "torch", "ray", "embedded model", "object storage"):
        assert names[name] == "ok"
    assert "cuda" in names and "operators" in names
    [licence] = [check for check in found["checks"] if check["name"] == "model licence"]
    assert licence["state"] == "ok"
    for word in ("copy of the agreement", "notice", "outputs", "guardrails", "read the licence"):
        assert word in licence["advice"]
    code, out, err = call("doctor", "ftp://nowhere/x")
    assert code == 1
    assert "FAILED" in out

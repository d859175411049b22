"""What is sent to a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchrun.cli.cluster import job_table
from batchrun.cluster.jobs import ClusterJob, JobState, shipped_job
from batchrun.cluster.opening import check
from batchrun.job import Job, parse_job
from batchrun.jobfile import JobSource, read_job_file
from tests.unit.data.parquet import prompts, write


def job_of(**changes: Any) -> Job:
    """A job over ``in`` of the current folder."""
    raw = {
        "model": {"path": "tiny"},
        "input": {"path": "in", "prompt_column": "prompt"},
        "output": {"path": "out"},
    }
    return parse_job(JobSource.of_mapping({**raw, **changes}))


def shipped(job: Job, folder: Path) -> Job:
    """The job as the cluster reads it."""
    path = folder / "shipped.yaml"
    path.write_text(shipped_job(job), encoding="utf-8")
    return parse_job(read_job_file(str(path), ()))


@pytest.mark.parametrize(
    "text", ["plain", "costs ${HOME} and $${X}", "{{ prompt }} ${", 'é\u2028\\u0041 "quoted"\n']
)
def test_texts_arrive_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Variables were replaced where the job was submitted, and nothing is replaced twice."""
    monkeypatch.chdir(tmp_path)
    job = job_of().model_copy(deep=True)
    job = job.model_copy(update={"input": job.input.model_copy(update={"system": text})})
    assert text == shipped(job, tmp_path).input.system


def test_a_run_is_the_same_here_and_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local paths, the model's too, name the same run from every folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in/a.parquet", prompts(3))
    tiny = Path(__file__).resolve().parents[3] / "batchrun/models/tiny"
    (tmp_path / "model").symlink_to(tiny)
    job = job_of(model={"path": "model"})
    here = check(job, None).run
    there = shipped(job, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert here == check(there, None).run
    assert str(tmp_path / "out") == there.output.path


@pytest.mark.parametrize(
    ("state", "exit_code", "verdict"),
    [
        (JobState.RUNNING, None, "running"),
        (JobState.SUCCEEDED, 0, "succeeded"),
        (JobState.FAILED, 3, "failed (exit 3)"),
        (JobState.FAILED, 75, "interrupted (exit 75)"),
        (JobState.STOPPED, None, "stopped"),
    ],
)
def test_a_run_that_was_interrupted_did_not_fail(
    state: JobState, exit_code: int | None, verdict: str
) -> None:
    """For people a run that was cancelled and drained is called so, whatever Ray calls it."""
    job = ClusterJob("a-1", "a", "", "out", {}, state, "", None, None, exit_code)
    assert verdict == job.verdict
    assert f"a-1  {verdict}  " in job_table([job])

"""What is sent to a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchrun.cluster.jobs import ClusterJobs, shipped_job
from batchrun.cluster.opening import check
from batchrun.errors import ClusterError
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


@pytest.mark.parametrize("address", ["rubbish", "ftp://host", "127.0.0.1:99999", "http://", ":80"])
def test_what_is_no_address_is_named(address: str) -> None:
    """A wrong address is named at once, with one that would do, and nobody is asked."""
    with pytest.raises(ClusterError, match="is no address of a Ray dashboard") as caught:
        ClusterJobs(address)
    assert "--address http://127.0.0.1:8265" in caught.value.hint

"""The jobs that ship with the repository."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import make_questions
from batchrun.engine.constraints import Constraints
from batchrun.engine.tokenizer import Tokenizer
from batchrun.formats import ResponseFormat
from batchrun.job import Job, parse_job
from batchrun.jobfile import read_job_file
from batchrun.preflight import check_job

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.yaml"))


def load_job(name: str, environ: dict[str, str] | None = None) -> Job:
    """A job of the folder jobs/, parsed with all its rules."""
    return parse_job(read_job_file(ROOT / "jobs" / name, (), environ or {}))


@pytest.mark.parametrize("name", JOBS)
def test_job_is_valid(name: str) -> None:
    """Every job in jobs/ is accepted with no environment variable set, named after its file."""
    assert load_job(name).name == Path(name).stem


@pytest.mark.parametrize("name", [name for name in JOBS if name != "demo.yaml"])
def test_job_for_the_real_model_takes_its_bucket_from_the_environment(name: str) -> None:
    """The jobs for the 9B model run on A10G and read and write one bucket that a person names."""
    job = load_job(name, {"BUCKET": "acme", "S3_ENDPOINT": "http://127.0.0.1:9000"})
    paths = [job.model.path, job.input.path, job.output.path]
    assert [str(path).split("/")[2] for path in paths] == ["acme"] * 3
    assert job.input.storage_options == {"endpoint_url": "http://127.0.0.1:9000"}
    assert job.output.storage_options == {"endpoint_url": "http://127.0.0.1:9000"}
    assert job.resources.accelerator_type == "A10G"


def test_jobs_show_the_ways_to_ask() -> None:
    """One job each asks by prompt column, by messages and by template; one does not reason."""
    jobs = {name: load_job(name) for name in JOBS}
    assert jobs["mathematics.yaml"].input.prompt_column == "problem"
    assert jobs["code.yaml"].input.messages_column == "messages"
    assert "{{ text }}" in (jobs["summarise.yaml"].input.template or "")
    thinking = {name: job.generation.reasoning for name, job in jobs.items()}
    assert thinking == {name: name != "classify.yaml" for name in JOBS}
    assert jobs["mathematics.yaml"].generation.max_thinking_tokens == 4096
    assert (jobs["extract.yaml"].generation.response_format or {})["type"] == "json_schema"


def test_schema_of_the_extraction_can_be_bound() -> None:
    """The response format of jobs/extract.yaml compiles, with reasoning as the job has it."""
    written = load_job("extract.yaml").generation.response_format
    tokenizer = Tokenizer.load(ROOT / "batchrun/models/tiny")
    constraints = Constraints(tokenizer, tokenizer.vocab_size)
    assert constraints.error(ResponseFormat.parse(written), thinking=True) is None


def test_demonstration_runs_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """jobs/demo.yaml passes every check of a run, from the root of the repository."""
    monkeypatch.chdir(ROOT)
    source = read_job_file("jobs/demo.yaml", [f"output.path={tmp_path}/out"], {})
    assert list(check_job(parse_job(source))) == []


def test_questions_are_what_the_script_makes() -> None:
    """jobs/data/questions.parquet is the output of scripts/make_questions.py, 240 rows, seed 7."""
    table = pq.read_table(ROOT / "jobs/data/questions.parquet")
    assert table.equals(make_questions.make_table(240, 7))
    assert len(set(table["id"].to_pylist())) == 240

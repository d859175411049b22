"""Whatever a job file holds, the answer is a job or a list of problems: never a traceback."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchrun.errors import JobError
from batchrun.job import Job, check_source
from batchrun.jobfile import JobSource, read_job_file

VALID: dict[str, Any] = {
    "model": {"path": "tiny"},
    "input": {"path": "in", "prompt_column": "p", "storage_options": {"anon": True}},
    "output": {"path": "out"},
    "generation": {"max_tokens": 10},
}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["auto", "64", "true", "s3://b/x", "in/**", "a" * 300, "\x1b[31m"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = sorted(
    {(section,) for section in Job.model_fields}
    | {
        (section, key)
        for section, field in Job.model_fields.items()
        for key in getattr(field.annotation, "model_fields", ())
    }
    | {("input", "storage_options", "endpoint_url"), ("resources", "workers", "min"), ("x", "y")}
)


@settings(max_examples=400, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=4))
def test_any_value_anywhere(changes: list[tuple[tuple[str, ...], object]]) -> None:
    """Any value at any key gives a job, or problems that each have a message and a way out."""
    raw = copy.deepcopy(VALID)
    for key, value in changes:
        section: Any = raw
        for part in key[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[key[-1]] = value
    before = copy.deepcopy(raw)
    reading = check_source(JobSource.of_mapping(raw))
    assert raw == before, "the source is not changed"
    assert reading.job is not None
    assert bool(reading.problems) or reading.job == Job.model_validate(
        {**reading.job.model_dump(), "name": reading.job.name}
    )
    for problem in reading.problems:
        assert problem.message and problem.hint
        assert str(problem).isprintable()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=60) | st.text(alphabet="ab:-[]{}#&*!|>'\"%@`$\t\n ", max_size=60))
def test_any_text(tmp_path: Path, data: bytes | str) -> None:
    """Any bytes give a source or a JobError with problems."""
    path = tmp_path / "job.yaml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    try:
        source = read_job_file(path, (), {})
    except JobError as error:
        assert error.problems
        return
    assert check_source(source).problems


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abc.=[]{}:,'\"$ \n\t*&!", max_size=20))
def test_any_override(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Any text after ``--set`` is applied, or is a problem."""
    path = tmp_path_factory.getbasetemp() / "valid.yaml"
    if not path.exists():
        path.write_text("model: {path: tiny}\n")
    source = read_job_file(path, (text,), {})
    assert source.problems or "=" in text

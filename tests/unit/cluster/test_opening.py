"""What is known of a checkpoint before a run opens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.cluster.opening import CheckedJob, read_license
from batchrun.data.store import Store
from batchrun.job import parse_job
from batchrun.jobfile import JobSource

CARD = "---\nlicense: other\nlicense_name: nvidia-open-model-license\n---\n# A model\n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"README.md": CARD}, "nvidia-open-model-license"),
        ({"README.md": "---\nlicense: 'mit'\n---\n"}, "mit"),
        ({"README.md": "# A model\n", "LICENSE": "Apache License\nVersion 2.0\n"}, "Apache-2.0"),
        ({"LICENSE.txt": "\n  MIT License\n"}, "MIT"),
        ({"LICENSE.md": "\nOur own terms\nmore\n"}, "Our own terms"),
        ({"config.json": json.dumps({"license": "x-1.0"}), "README.md": CARD}, "x-1.0"),
    ],
)
def test_the_license_of_a_checkpoint(
    tmp_path: Path, files: dict[str, str], found: str | None
) -> None:
    """The config says it, else the model card (its proper name first), else a license file."""
    for name, text in {"config.json": "{}", **files}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_license(tmp_path) == found


@pytest.mark.parametrize("model_license", [None, "Apache-2.0"])
@pytest.mark.parametrize("scored", [False, True])
def test_what_parts_look_like(tmp_path: Path, model_license: str | None, scored: bool) -> None:
    """Metadata names the license only where there is one, and scores make a column."""
    raw: dict[str, object] = {
        "model": {"path": "tiny"},
        "input": {"path": "in", "prompt_column": "q"},
        "output": {"path": str(tmp_path)},
    }
    if scored:
        raw["evaluate"] = {"answer_column": "a", "scorer": "exact"}
    job = parse_job(JobSource.of_mapping(raw))
    checked = CheckedJob(job, Store.open(str(tmp_path)), job.semantic(), model_license)
    found = checked.part_format
    assert found.metadata.get("batchrun.model_license") == model_license
    assert set(found.metadata) - {"batchrun.model_license"} == {
        "batchrun.version", "batchrun.job", "batchrun.model",
    }  # fmt: skip
    assert found.correct is scored


@pytest.mark.parametrize(
    ("generation", "overrides", "has_calls"),
    [({}, [], False), ({"tools": [{"name": "f"}]}, [], True), ({}, ["tools"], True)],
)
def test_tools_make_a_column(
    tmp_path: Path, generation: dict[str, object], overrides: list[str], has_calls: bool
) -> None:
    """Tools of the job or of its rows give the output ``tool_calls``; other tools, another run."""
    raw: dict[str, object] = {
        "model": {"path": "tiny"},
        "input": {"path": "in", "prompt_column": "q", "overrides": overrides},
        "output": {"path": str(tmp_path)},
        "generation": generation,
    }
    job = parse_job(JobSource.of_mapping(raw))
    checked = CheckedJob(job, Store.open(str(tmp_path)), job.semantic(), None)
    assert checked.part_format.tool_calls is has_calls
    runs = {checked.run}
    for tool in ({"name": "g", "strict": True}, {"strict": True, "name": "g"}):  # as in the prompt
        other = parse_job(JobSource.of_mapping({**raw, "generation": {"tools": [tool]}}))
        runs.add(replace(checked, semantic=other.semantic()).run)
    assert len(runs) == 3

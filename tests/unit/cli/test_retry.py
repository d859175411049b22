"""What `batchrun retry` is told, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchrun.cli import main
from batchrun.cluster.rerun import recorded_job
from batchrun.data.layout import run_folder
from batchrun.data.store import Store
from batchrun.job import parse_job
from batchrun.jobfile import JobSource
from batchrun.logs import REDACTED


def ended(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as end:
        main(["retry", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ("timeout,worker_loss", "there is no error 'worker_loss', did you mean worker_lost?"),
        (" , ", "names no error"),
    ],
)
def test_unknown_errors_are_refused(
    errors: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all kinds that there are; nothing is read for that."""
    assert ended("/nowhere", "--errors", errors) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "invalid_prompt, too_long, template, timeout, worker_lost, engine" in told


def test_an_output_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and what is missing."""
    assert ended(str(tmp_path)) == 2
    assert "holds no run of batchrun" in capsys.readouterr().err


def test_a_job_is_read_from_its_run_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are taken as they are, masked options are left to the environment, the output is where
    it was found, and --set comes on top."""
    monkeypatch.setenv("NAME", "no variable of a recorded job")
    raw = {
        "model": {"path": "tiny"},
        "input": {
            "path": "in",
            "template": "{{ a }} costs ${NAME}",
            "storage_options": {"endpoint_url": "http://localhost:1"},
        },
        "output": {"path": "elsewhere"},
        "ray": {"runtime_env": {"env_vars": {"LEVEL": "3"}}},
    }
    job = parse_job(JobSource.of_mapping(raw))
    store = Store.open(str(tmp_path))
    semantic = {**job.semantic(), "checkpoint": "c"}
    masked: dict[str, Any] = job.redacted()
    masked["input"]["storage_options"]["note"] = REDACTED
    masked["ray"]["runtime_env"]["env_vars"]["NOTE"] = f"Bearer {REDACTED}"
    record = json.dumps({"semantic": semantic, "job": masked})
    store.put(f"{run_folder('run')}/job.json", record.encode())
    source, model_path = recorded_job(str(tmp_path), ["resources.workers=3"])
    found = parse_job(source)
    assert (found.semantic(), model_path) == (job.semantic(), "tiny")
    assert found.input.storage_options == {"endpoint_url": "http://localhost:1"}
    assert found.ray.runtime_env == {"env_vars": {"LEVEL": "3"}}
    assert (found.output.path, found.resources.workers) == (str(tmp_path), 3)

"""The scripts, as far as they can be tried without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import show_answers
from bench import prefix, structured

ROOT = Path(__file__).resolve().parents[2]
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that holds what a clone holds of the scripts, and no virtual environment."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    return tmp_path


def run_script(script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script from the root folder of the machine, with a clean environment."""
    return subprocess.run(
        ["bash", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={"PATH": os.environ["PATH"], **environment},
    )


def write_program(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_at_errors(script: Path) -> None:
    """Bash can read each script, and each but the sourced one stops at the first error."""
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if script.name != "venv.sh":
        assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["demo.sh", "test.sh", "check.sh", "install_gpu.sh", "ops_check.sh"]
)
def test_missing_python_is_said(clone: Path, name: str) -> None:
    """Without Python 3.11 or newer a script says so, with a hint, and makes nothing."""
    done = run_script(clone / "scripts" / name, PYTHON="/nonexistent/python3")
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python 3.11 or newer is needed; found none")
    assert "\nhint: " in done.stderr
    assert not (clone / ".venv").exists()


def test_old_python_is_said(clone: Path) -> None:
    """An older Python is named with its version."""
    old = write_program(clone / "bin/python3", 'case "$2" in *exit*) exit 1;; esac; echo 3.9.2\n')
    done = run_script(clone / "scripts/demo.sh", PYTHON=str(old))
    assert done.returncode == 1
    assert "found 3.9.2" in done.stderr


def test_missing_ensurepip_is_said(clone: Path) -> None:
    """Where the system splits venv off its Python, a script names the package to install."""
    half = write_program(
        clone / "bin/python3",
        f'case "$*" in *ensurepip*) exit 1;; esac; exec "{sys.executable}" "$@"\n',
    )
    done = run_script(clone / "scripts/test.sh", PYTHON=str(half))
    assert done.returncode == 1
    assert "modules venv and ensurepip are missing" in done.stderr
    assert "apt-get install python3-venv" in done.stderr
    assert not (clone / ".venv").exists()


def write_output(folder: Path, rows: list[dict[str, object]]) -> None:
    """A run's output with the columns that show_answers reads."""
    schema = pa.schema(
        [(n, pa.string()) for n in ("id", "prompt", "answer", "completion", "reasoning", "error")]
        + [("finish_reason", pa.string()), ("thinking_budget_hit", pa.bool_())]
        + [("correct", pa.bool_())]
        + [(n, pa.int32()) for n in ("reasoning_tokens", "completion_tokens")]
    )
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "part-000000-00000000.parquet")


def test_answers_are_shown_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """show_answers prints questions with traces, marks wrong and failed rows, and the accuracy."""
    common = {"finish_reason": "stop", "thinking_budget_hit": False, "reasoning_tokens": 9}
    write_output(
        tmp_path / "out",
        [
            {"id": "a", "prompt": "1+2+3", "answer": "6", "completion": "6",
             "reasoning": "1+2=3\n+3=6\n", "completion_tokens": 2, "correct": True, **common},
            {"id": "b", "prompt": "2+2", "answer": "4", "completion": "5",
             "reasoning": "2+2=", "completion_tokens": 2, "correct": False, **common,
             "thinking_budget_hit": True},
            {"id": "c", "prompt": "", "answer": "4", "error": "invalid_prompt: empty",
             "correct": False},
        ],
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["show_answers", str(tmp_path / "out"), "--count", "3"])
    show_answers.main()
    shown = capsys.readouterr().out
    assert "reasoning  1+2=3\n             +3=6\n  answer     6   (right)" in shown
    assert "cut: the thinking budget was used up" in shown
    assert "answer     5   (wrong, it is 4)" in shown
    assert "error      invalid_prompt: empty" in shown
    assert shown.splitlines()[-1] == (
        "accuracy: 1 of 3 right (33.3%); 18 reasoning and 4 completion tokens, "
        "1 thinking budget hits, 1 failed rows"
    )


def test_answers_of_no_run_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """show_answers of a folder that is not there says so."""
    monkeypatch.setattr(sys, "argv", ["show_answers", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="is not a folder"):
        show_answers.main()


def test_the_prefix_benchmark_compares_two_engines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the ratio with its conditions; that every token is the same is part of it."""
    arguments = ["--rows", "9", "--shared", "100", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["prefix.py", *arguments])
    prefix.main()
    out = capsys.readouterr().out
    assert "9 rows" in out and "tiny, cpu" in out
    assert "every token is the same" in out.splitlines()[-1]


def test_the_benchmark_of_response_formats_prints_ratios(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It compares each kind of format with free rows, whose ratio is 1 by definition."""
    arguments = ["--batch", "4", "--rounds", "1", "--tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["structured.py", *arguments])
    structured.main()
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(rows) == ["free", "json_schema", "regex"]
    assert rows["free"].endswith("1.00 of free")

"""``batchrun plan``: what is printed, where, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchrun.cli import main


def run(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call."""
    result = CliRunner().invoke(main, args, prog_name="batchrun")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``job.yaml`` over three rows, one of which is empty."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"q": ["3+4?", "5+6?", ""]}), "rows.parquet")
    Path("job.yaml").write_text(
        "model: {path: tiny}\n"
        "input:\n  path: rows.parquet\n  prompt_column: q\n"
        "generation: {max_tokens: 64}\n"
        "output: {path: out}\n"
        "resources: {workers: 2, price_per_gpu_hour: 1.5}\n"
    )
    return tmp_path


def test_a_plan_for_people(here: Path) -> None:
    """Each figure stands on stdout with a line below it that says what it is made of."""
    code, out, err = run("plan", "job.yaml", "--accelerator", "A10G")
    assert code == 0
    lines = out.splitlines()
    assert lines[2] == "input       3 rows in 1 file, " + lines[2].rpartition(", ")[2]
    heads = [line.split("  ")[0] for line in lines if line and not line.startswith(" ")]
    for head in ("shards", "sequences", "requests", "no prompt", "a worker", "workers"):
        assert head in heads, out
    for head in ("input", "prompts", "outputs", "decode", "prefill", "start-up", "too long"):
        at = next(i for i, line in enumerate(lines) if line.startswith(head))
        assert lines[at + 1].startswith(" " * 12), out
    assert "no prompt   1 rows: invalid_prompt 1" in lines
    assert "of 2 workers 1 find rows" in out
    assert "price_per_gpu_hour 1.5" in out
    assert "nothing was written" in err
    assert not Path("out").exists()


def test_a_plan_for_machines(here: Path) -> None:
    """``--json`` puts one document on stdout and nothing on stderr."""
    code, out, err = run("plan", "job.yaml", "--accelerator", "L4", "--json", "--exact")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert plan["accelerator"]["name"] == "L4"
    assert plan["prompts"]["failing_rows"] == {"invalid_prompt": 1}
    assert [one["workers"] for one in plan["durations"]] == [1, 2]
    assert sum(row["size_bytes"] for row in plan["memory"]["table"]) == int(22.03 * 2**30)


def test_problems_as_validate_has_them(here: Path) -> None:
    """Problems of the job end with exit code 2 and their lines; so does an unknown accelerator."""
    code, out, err = run("plan", "job.yaml", "--set", "input.prompt_column=qq")
    assert (code, out) == (2, "")
    assert "input.prompt_column" in err and "did you mean 'q'" in err
    code, _, err = run("plan", "job.yaml", "--set", "generation.top_p=3", "--set", "model.path=x")
    assert code == 2 and "generation.top_p" in err and "model.path" in err
    code, _, err = run("plan", "job.yaml", "--accelerator", "A10H")
    assert code == 2 and "did you mean A10" in err and "L40S" in err

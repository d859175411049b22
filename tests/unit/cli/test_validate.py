"""``batchrun validate`` and ``batchrun schema``: what is printed, where, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchrun.cli import main
from batchrun.cluster.opening import check
from batchrun.job import json_schema, parse_job
from batchrun.jobfile import read_job_file


def run(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call."""
    result = CliRunner().invoke(main, args, prog_name="batchrun")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``job.yaml`` over three rows."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"q": ["1", "2", "3"]}), "rows.parquet")
    Path("job.yaml").write_text(
        "model: {path: tiny}\n"
        "input:\n  path: rows.parquet\n  prompt_column: q\n"
        "output: {path: out}\n"
    )
    return tmp_path


def test_a_valid_job(here: Path) -> None:
    """Exit 0, what the job will work on is on stderr, stdout is empty, nothing is written."""
    code, out, err = run("validate", "job.yaml")
    assert (code, out) == (0, "")
    first, model, rows, output = err.splitlines()
    assert first == "job.yaml is valid"
    assert model.startswith("  model   tiny: ") and model.endswith(", up to 4,096 tokens")
    assert rows == "  input   3 rows in 1 file"
    assert output == "  output  out: writable"
    assert not Path("out").exists()


def test_facts_for_machines(here: Path) -> None:
    """``--json`` puts one document on stdout and nothing on stderr."""
    code, out, err = run("validate", "job.yaml", "--json", "--set", "name=nightly")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["valid"] is True and facts["problems"] == []
    assert facts["name"] == "nightly"
    assert facts["input"]["rows"] == 3 and facts["input"]["files"] == 1
    assert facts["model"]["parameters"] > 100_000


def test_every_problem_of_file_and_surroundings(here: Path) -> None:
    """Problems of the file and of what it names come in one list in the order of the file."""
    text = Path("job.yaml").read_text().replace("prompt_column: q", "prompt_column: qq")
    Path("job.yaml").write_text(text + "generation:\n  top_p: 3\n  max_tokns: 5\n")
    code, out, err = run("validate", "job.yaml")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"job.yaml:4: input.prompt_column: {here}/rows.parquet has no column 'qq'; "
        "did you mean 'q'?",
        "job.yaml:7: generation.top_p: must be a number above 0 and at most 1, not 3; "
        "the default is 0.95",
        "job.yaml:8: generation.max_tokns: no such key; did you mean max_tokens?",
        "error: the job has 3 problems; nothing was written",
    ]


@pytest.mark.parametrize("held", ["part-000000-00000000.parquet", "run"])
def test_an_output_that_is_held(here: Path, held: str) -> None:
    """Another job's run, or a part of nobody's, is a problem here as it is at submit."""
    Path("out").mkdir()
    if held == "run":
        record = Path("out/_batchrun/0123456789abcdef/job.json")
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"semantic": {"generation": {"temperature": 5}}}))
        said = "holds the run of another job; what changed: "
        hint = "--keep-finished"
    else:
        Path("out", held).write_bytes(b"foreign")
        said = f"already holds {held}, which no run of batchrun wrote"
        hint = "choose an empty folder"
    code, out, err = run("validate", "job.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("job.yaml:5: output.path: ")
    assert said in err and hint in err
    code, out, _ = run("validate", "job.yaml", "--json")
    assert (code, json.loads(out)["problems"][0]["key"]) == (2, "output.path")


def test_a_run_that_is_begun(here: Path) -> None:
    """A foreign part beside the run's own, and a finished file that changed, are problems here as
    they are at submit; nothing is written for that."""
    job = parse_job(read_job_file("job.yaml", ()))
    checked = check(job, None)
    opened = checked.open()
    assert run("validate", "job.yaml")[0] == 0
    Path("out/part-000001-00000000.parquet").write_bytes(b"foreign")
    code, _, err = run("validate", "job.yaml")
    assert code == 2
    assert err.startswith("job.yaml:5: output.path: out holds part-000001-00000000.parquet, which ")
    Path("out/part-000001-00000000.parquet").unlink()
    record = Path(f"out/_batchrun/{checked.run}/parts/{opened.shards[0].number:06d}.json")
    record.parent.mkdir(exist_ok=True)
    record.write_text("{}")
    pq.write_table(pa.table({"q": ["1", "2"]}), "rows.parquet")
    before = sorted(Path("out").rglob("*"))
    code, _, err = run("validate", "job.yaml")
    assert code == 2
    assert err.startswith(f"job.yaml:3: input.path: {here}/rows.parquet changed after it was fin")
    assert before == sorted(Path("out").rglob("*"))


def test_a_response_format(here: Path) -> None:
    """What is wrong inside a schema, or shows only when it is compiled, is said at its line."""
    text = Path("job.yaml").read_text()
    schema = "  response_format:\n    type: json_schema\n    schema:\n      "
    for keyword, said in (
        ("minimun: 1", "job.yaml:10: generation.response_format.schema.minimun: is not a keyword"),
        ("type: int", "job.yaml:9: generation.response_format.schema: cannot be used: Invalid ty"),
    ):
        Path("job.yaml").write_text(f"{text}generation:\n{schema}{keyword}\n")
        code, out, err = run("validate", "job.yaml")
        assert (code, out) == (2, "")
        assert err.startswith(said)


def test_problems_for_machines(here: Path) -> None:
    """With ``--json`` the problems are on stdout in parts; the exit code stays 2."""
    code, out, _ = run("validate", "job.yaml", "--json", "--set", "generation.n=0")
    assert code == 2
    assert json.loads(out) == {
        "valid": False,
        "problems": [
            {
                "location": "--set",
                "key": "generation.n",
                "message": "must be a whole number of at least 1, not 0",
                "hint": "the default is 1",
            }
        ],
    }


def test_a_file_that_is_not_there(here: Path) -> None:
    """A missing job file is exit 2 with the file that may be meant."""
    assert run("validate", "jop.yaml") == (
        2,
        "",
        "jop.yaml: no such file; did you mean job.yaml?\n"
        "error: the job has 1 problem; nothing was written\n",
    )


def test_schema() -> None:
    """``batchrun schema`` prints the JSON Schema and nothing else."""
    code, out, err = run("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == json_schema()

"""What is wrong with a job's surroundings is found before a run starts: all of it, with places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import StorageError
from batchrun.job import check_source
from batchrun.jobfile import read_job_file
from batchrun.preflight import Inspection, inspect_job

if TYPE_CHECKING:
    from tests.conftest import S3Server

TINY = Path(__file__).parents[2] / "batchrun" / "models" / "tiny"


class Desk:
    """A folder with an input of two files, and a job over it that is in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "in").mkdir()
        self.write("a", {"q": ["1", "2"], "n": [1, 2]})
        self.write("b", {"q": ["3"], "n": [3]})
        (folder / "job.yaml").write_text(
            "model:\n"  # 1
            "  path: tiny\n"  # 2
            "input:\n"  # 3
            f"  path: {folder}/in\n"  # 4
            "  prompt_column: q\n"  # 5
            "  columns: [n]\n"  # 6
            "output:\n"  # 7
            f"  path: {folder}/out\n"  # 8
        )

    def write(self, name: str, columns: dict[str, list[object]]) -> None:
        """One file of the input."""
        pq.write_table(pa.table(columns), self.folder / "in" / f"{name}.parquet")

    def inspect(self, *overrides: str) -> Inspection:
        """What is found of the job with these keys changed."""
        source = read_job_file(self.folder / "job.yaml", overrides, {})
        reading = check_source(source)
        assert reading.job is not None
        return inspect_job(reading.job, source, reading.bad)

    def said(self, *overrides: str) -> list[str]:
        """The problems as lines, without the folder's name."""
        problems = self.inspect(*overrides).problems
        return [str(problem).replace(f"{self.folder}/", "") for problem in problems]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A job that is in order."""
    return Desk(tmp_path)


def test_a_job_that_is_in_order(desk: Desk) -> None:
    """Nothing is found, the facts are right, and nothing is left behind."""
    inspection = desk.inspect()
    assert inspection.problems == ()
    facts = inspection.facts
    assert (facts.num_files, facts.num_rows) == (2, 3)
    assert facts.num_parameters > 100_000
    assert facts.max_model_len == 4096
    assert sorted(path.name for path in desk.folder.iterdir()) == ["in", "job.yaml"]


def test_all_problems_at_once(desk: Desk) -> None:
    """Input, columns, template, checkpoint and output are all looked at, whatever else is wrong."""
    desk.write("b", {"q": ["3"]})
    (desk.folder / "blocked").write_text("a file")
    lines = desk.said(
        "input.id_column=nmae",
        "input.overrides=[seed]",
        "model.path=no/such/model",
        f"output.path={desk.folder}/blocked",
    )
    heads = [line.partition(";")[0].partition(" (")[0] for line in lines]
    assert heads[:3] == [
        "--set: input.id_column: in/a.parquet has no column 'nmae'",
        "--set: input.overrides[0]: in/a.parquet has no column 'seed'",
        "job.yaml:6: input.columns[0]: in/b.parquet has no column 'n'",
    ]
    assert heads[3].startswith("--set: model.path: ") and "no/such/model" in heads[3]
    assert heads[4].startswith("--set: output.path: ") and "blocked" in heads[4]
    assert len(heads) == 5


def test_bad_files_of_the_input(desk: Desk) -> None:
    """Every file that is no Parquet file is named; so is a place where there is none."""
    (desk.folder / "in" / "c.parquet").write_bytes(b"")
    (desk.folder / "in" / "d.parquet").write_bytes(b"not parquet at all")
    whole = (desk.folder / "in" / "a.parquet").read_bytes()
    (desk.folder / "in" / "e.parquet").write_bytes(whole[: len(whole) // 2])
    lines = desk.said()
    assert len(lines) == 3
    for line, name in zip(lines, ("c", "d", "e"), strict=True):
        assert line.startswith(f"job.yaml:4: input.path: in/{name}.parquet ")
    [missing] = desk.said(f"input.path={desk.folder}/on")
    assert missing == "--set: input.path: on does not exist; check the path"
    [nothing] = desk.said(f"input.path={desk.folder}/in/*.csv")
    assert nothing == "--set: input.path: no file matches in/*.csv; check the pattern"


def test_many_bad_files_are_counted(desk: Desk) -> None:
    """Of very many bad files the first twenty are named and the rest are counted."""
    for index in range(25):
        (desk.folder / "in" / f"x{index:02}.parquet").write_bytes(b"")
    lines = desk.said()
    assert len(lines) == 21
    assert lines[-1] == "job.yaml:4: input.path: 5 more files cannot be used; mend them too"


def test_columns_of_a_wrong_type(desk: Desk) -> None:
    """A column that cannot be a prompt, and types that do not go together, are found."""
    [number] = desk.said("input.prompt_column=n")
    assert number.startswith("--set: input.prompt_column: ") and "'n'" in number
    desk.write("b", {"q": ["3"], "n": [[1]]})
    [mixed] = desk.said()
    assert mixed.startswith("job.yaml:6: input.columns[0]: column 'n' is list<")
    assert "in/b.parquet" in mixed and "in/a.parquet" in mixed


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ q }} {{ m }}", "in/a.parquet has no column 'm'; its columns are 'q', 'n'"),
        ("{{ q ", "line 1: unexpected end of template, expected 'end of print statement'."),
        ("{{ q | sumarize }}", "line 1: No filter named 'sumarize'."),
    ],
)
def test_templates(desk: Desk, template: str, said: str) -> None:
    """Syntax errors and undefined columns of a template are job errors, not error rows."""
    lines = desk.said("input.prompt_column=null", f"input.template={template}")
    assert [line.startswith(f"--set: input.template: {said}") for line in lines] == [True]


def test_wrong_keys_do_not_hide_the_surroundings(desk: Desk) -> None:
    """With a bad value in the file the rest is still checked, but for what needs that value."""
    assert desk.said("generation.top_p=5", "input.columns=[x]") == [
        "--set: input.columns[0]: in/a.parquet has no column 'x'; its columns are 'q', 'n'"
    ]
    assert desk.said("input.path=5", "model.path=", "output.path=[x]") == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None deletes."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer.json: the checkpoint has no tokenizer"),
        ("model.safetensors", "holds no weights"),
    ],
)
def test_a_checkpoint_with_a_file_missing(
    desk: Desk, checkpoint: Path, damage: str, said: str
) -> None:
    """Each file that a checkpoint needs is missed by name."""
    (checkpoint / damage).unlink()
    [line] = desk.said(f"model.path={checkpoint}")
    assert line.startswith("--set: model.path: ") and said in line


def test_damaged_checkpoints(desk: Desk, checkpoint: Path) -> None:
    """Another architecture, cut weights, no chat template: found without loading anything."""
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-100])
    [line] = desk.said(f"model.path={checkpoint}")
    assert "model.safetensors is cut off" in line
    (checkpoint / "model.safetensors").write_bytes(weights)
    edit(checkpoint / "tokenizer_config.json", chat_template=None)
    for template in checkpoint.glob("*.jinja"):
        template.unlink()
    [line] = desk.said(f"model.path={checkpoint}")
    assert "has no chat template" in line
    edit(checkpoint / "config.json", model_type="llama")
    lines = desk.said(f"model.path={checkpoint}")
    assert "llama" in lines[0] and len(lines) == 2


def test_lengths(desk: Desk) -> None:
    """A length beyond the checkpoint's, and one without room for a prompt, are refused."""
    assert desk.said("model.max_model_len=5000") == [
        "--set: model.max_model_len: is 5000, more than the checkpoint's 4096; "
        "write at most 4096, or null"
    ]
    assert desk.said("generation.max_tokens=4096") == [
        "--set: generation.max_tokens: is 4096, which leaves no room for a prompt in the "
        "checkpoint's 4096 tokens; lower it"
    ]
    assert desk.inspect("model.max_model_len=2048").facts.max_model_len == 2048


def test_object_storage(desk: Desk, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input, checkpoint and output in S3 are checked there; weights are not downloaded."""
    monkeypatch.setenv("BATCHRUN_CACHE", str(desk.folder / "cache"))
    from batchrun.data.store import Store

    store = Store.open(s3_server.url, s3_server.storage_options)
    store.put("in/a.parquet", (desk.folder / "in" / "a.parquet").read_bytes())
    for path in TINY.iterdir():
        if path.is_file():
            store.put(f"model/{path.name}", path.read_bytes())
    before = [item.path for item in store.list()]
    options = json.dumps(s3_server.storage_options)
    settings = (
        f"model.path={s3_server.url}/model",
        f"input.path={s3_server.url}/in",
        f"input.storage_options={options}",
        f"output.path={s3_server.url}/out",
        f"output.storage_options={options}",
    )
    inspection = desk.inspect(*settings)
    assert inspection.problems == ()
    assert inspection.facts.num_rows == 2
    assert inspection.facts.max_model_len == 4096
    assert [item.path for item in store.list()] == before
    assert not list((desk.folder / "cache").rglob("*.safetensors"))
    lines = desk.said(*settings[:-2], "output.path=s3://no-such-bucket-here/out", settings[-1])
    assert [line.partition(";")[0] for line in lines] == [
        "--set: output.path: the bucket of s3://no-such-bucket-here/out does not exist"
    ]


def test_storage_that_cannot_be_reached(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that is down is no mistake of the job: exit 75, unless something is wrong as well."""

    def down(*args: object) -> None:
        raise StorageError("output: s3://b cannot be reached (timeout)", "try again")

    monkeypatch.setattr("batchrun.preflight.Store.open", down)
    with pytest.raises(StorageError) as caught:
        desk.inspect()
    assert caught.value.exit_code == 75
    lines = desk.said("input.columns=[x]")
    assert len(lines) == 2
    assert lines[1] == "job.yaml:8: output.path: s3://b cannot be reached (timeout); try again"


EVALUATE = "evaluate={answer_column: a, scorer: number}"


def test_expected_answers_are_looked_at(desk: Desk) -> None:
    """The column is there in all files, of a usable type, and of one that the scorer can use."""
    assert desk.said("evaluate={answer_column: n, scorer: number}") == []
    [missing] = desk.said("evaluate={answer_column: m, scorer: number}")
    assert missing.startswith("--set: evaluate.answer_column: in/a.parquet has no column 'm'")
    desk.write("a", {"q": ["1"], "n": [1], "a": [b"x"]})
    desk.write("b", {"q": ["1"], "n": [1], "a": [b"x"]})
    [unusable] = desk.said(EVALUATE)
    assert "evaluate.answer_column: the answer column 'a' is binary; expected answers" in unusable
    for name in "ab":
        desk.write(name, {"q": ["1"], "n": [1], "a": [[True]]})
    [switch] = desk.said(EVALUATE)
    assert "bool" in switch and "which the scorer number cannot compare" in switch
    assert desk.said("evaluate={answer_column: a, scorer: exact}") == []


def test_a_missing_library_is_found_before_the_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scorer math without math-verify is a problem of the job that names the command."""
    asked = "evaluate={answer_column: n, scorer: math}"
    assert desk.said(asked) == []
    monkeypatch.setattr("batchrun.evaluate.importlib.util.find_spec", lambda name: None)
    assert desk.said(asked) == [
        "--set: evaluate.scorer: is math, but the library math-verify is not installed; "
        "pip install math-verify"
    ]


def test_a_template_that_takes_no_tools(desk: Desk, tmp_path: Path) -> None:
    """Tools for a checkpoint whose chat template would drop them are a job error."""
    checkpoint = tmp_path / "tools-checkpoint"
    shutil.copytree(TINY, checkpoint)
    edit(checkpoint / "tokenizer_config.json", chat_template="{{ messages[-1].content }}")
    [line] = desk.said(f"model.path={checkpoint}", "generation.tools=[{name: f}]")
    assert "generation.tools: the checkpoint's chat template has no place for tools" in line


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            "{type: regex, pattern: '('}",
            "generation.response_format.pattern: cannot be used: unclosed group; mend the pattern",
        ),
        (
            "{type: json_schema, schema: {type: integer, minimum: 2, maximum: 1}}",
            "generation.response_format.schema: cannot be used: Unsatisfiable schema: minimum (2) "
            "is greater than maximum (1); mend the schema",
        ),
    ],
)
def test_a_response_format_is_compiled(desk: Desk, written: str, said: str) -> None:
    """A format that the checkpoint's tokenizer cannot bind to is found before anything runs."""
    path = desk.folder / "job.yaml"
    path.write_text(f"{path.read_text()}generation:\n  response_format: {written}\n")
    assert desk.said() == [f"job.yaml:10: {said}"]


def test_a_response_format_is_compiled_as_rows_will_need_it(desk: Desk) -> None:
    """One that begins with white space fails with reasoning only, be it by an override."""
    pattern = "generation.response_format={type: regex, pattern: ' a'}"
    assert desk.said(pattern, "generation.reasoning=false") == []
    [problem] = desk.said(pattern)
    assert "response_format.pattern: cannot be used: no completion after </think>" in problem
    desk.write("a", {"q": ["1"], "n": [1], "reasoning": [True]})
    desk.write("b", {"q": ["1"], "n": [1], "reasoning": [False]})
    overrides = "input.overrides=[reasoning]"
    assert len(desk.said(pattern, "generation.reasoning=false", overrides)) == 1


def test_a_response_format_with_a_slip_is_not_compiled(desk: Desk) -> None:
    """What the rules of the job file said of it is not said again, and nothing breaks."""
    written = "{type: json_schema, schema: {type: object, propertys: {}}}"
    assert desk.said(f"generation.response_format={written}") == []
    assert desk.said("generation.response_format={type: choice, choices: []}") == []

"""The jobs in jobs/eval/: valid as they stand, and right from a row to a part."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.data.checkpoints import find_checkpoint
from batchrun.data.inputs import list_input
from batchrun.data.schema import InputSchema
from batchrun.data.shards import plan_shards
from batchrun.data.writer import PartFile, PartFormat
from batchrun.engine.engine import Engine
from batchrun.engine.options import EngineOptions
from batchrun.job import Job, parse_job
from batchrun.jobfile import read_job_file
from batchrun.pipeline import Pipeline
from batchrun.planner.plan import plan_job
from batchrun.preflight import check_job
from batchrun.prompts import PromptBuilder, input_columns
from batchrun.records import Lease, Part, Row
from batchrun.rows import Rows

FOLDER = Path(__file__).resolve().parents[2] / "jobs" / "eval"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
JOBS = sorted(path.stem for path in FOLDER.glob("*.yaml"))

PUBLISHED = {
    "aime25": 72.1,
    "math500": 97.8,
    "gpqa": 64.0,
    "livecodebench": 71.1,
    "bfcl_v3": 66.9,
    "ifeval": 90.3,
    "hle": 6.5,
    "ruler128k": 78.9,
}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
ROWS: dict[str, dict[str, Sequence[object]]] = {
    "aime25": {"id": ["1", "2"], "problem": ["3+4?", "5+6?"], "answer": [7, 11]},
    "math500": {"id": ["1", "2"], "problem": ["3+4?", "5+6?"], "answer": ["7", r"\frac{22}{2}"]},
    "gpqa": {
        "id": ["1", "2"],
        "question": ["3+4?", "5+6?"],
        "options": [["7", "8", "9", "10"], ["10", "11", "12", "13"]],
        "answer": ["A", "B"],
    },
    "livecodebench": {
        "question_id": ["1", "2"],
        "question": ["Add two numbers.", "Sort."],
        "starter_code": ["", "class Solution:\n    def sort(self):"],
    },
    "ifeval": {
        "key": [1, 2],
        "prompt": ["Say 7 in lower case.", "What is 3+4?"],
        "instruction_id_list": [["case"], []],
        "kwargs": [[{"n": 1}], []],
    },
    "ruler128k": {
        "id": ["1", "2"],
        "task": ["niah_single_1", "vt"],
        "input": ["One 7 in the hay. Which?", "x=3+4. x?"],
        "outputs": [["7"], ["7", "x"]],
        "max_tokens": [5, 9],
    },
    "bfcl_v3": {
        "id": ["1", "2"],
        "category": ["simple", "irrelevance"],
        "messages": [json.dumps([{"role": "user", "content": text}]) for text in ("3+4?", "Hi")],
        "tools": [json.dumps([ADD]), "[]"],
    },
    "hle": {
        "id": ["1", "2"],
        "question": ["3+4?", "5+6?"],
        "answer": ["7", "eleven"],
        "answer_type": ["exactMatch"] * 2,
    },
}


def load(name: str, *overrides: str) -> Job:
    """A job of the folder with these keys changed."""
    return parse_job(read_job_file(FOLDER / f"{name}.yaml", overrides, {"BUCKET": "acme"}))


def row(name: str, place: int = 0) -> Row:
    """A made-up row as the prompts see it."""
    return Row(place, place, "r", {column: values[place] for column, values in ROWS[name].items()})


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The embedded model."""
    return Engine.load(find_checkpoint("tiny"), EngineOptions(max_sequences=16))


def test_there_is_a_job_for_each_benchmark() -> None:
    """Eight jobs, each in the README with its published figure."""
    assert sorted(PUBLISHED) == JOBS
    table = re.findall(r"^\| `([a-z0-9_]+)\.yaml` \| ([0-9.]+) \|", README, re.MULTILINE)
    assert {name: float(figure) for name, figure in table} == PUBLISHED


@pytest.mark.parametrize("name", JOBS)
def test_a_job_keeps_the_protocol(name: str) -> None:
    """Sampling, lengths and samples as the README says; one bucket, A10G."""
    job = load(name)
    assert job.name == name
    paths = [job.model.path, job.input.path, job.output.path]
    assert [str(path).split("/")[2] for path in paths] == ["acme"] * 3
    assert job.resources.accelerator_type == "A10G"
    generation, is_ruler = job.generation, name == "ruler128k"
    sampling = (generation.reasoning, generation.temperature, generation.top_p)
    assert sampling == ((False, 0, 1.0) if is_ruler else (True, 0.6, 0.95))
    assert generation.max_tokens == (128 if is_ruler else 32768)
    assert job.model.max_model_len == {"ruler128k": 131072, "bfcl_v3": 49152}.get(name, 36864)
    assert generation.max_thinking_tokens is None
    assert is_ruler or generation.answer_reserve == 0


@pytest.mark.parametrize("name", JOBS)
def test_the_readme_says_what_a_job_reads_and_scores(name: str) -> None:
    """Columns, samples and scorer of the README's table are those of the job."""
    [line] = re.findall(rf"^\| `{name}\.yaml` \|.*$", README, re.MULTILINE)
    _, _, _, _, columns, samples, scored, _, _ = line.split("|")
    job = load(name)
    assert sorted(re.findall(r"`(\w+)`", columns)) == sorted(input_columns(job).all)
    assert int(samples) == job.generation.n
    found = re.findall(r"`(\w+)`", scored)[:1]
    assert found == ([job.evaluate.scorer] if job.evaluate is not None else [])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_over_made_up_rows(name: str, engine: Engine, tmp_path: Path) -> None:
    """With tiny each job passes all checks of a run, its prompts are planned as they are, and every
    row is answered and scored."""
    rows = ROWS[name]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(dict(rows)), tmp_path / "in/rows.parquet")
    source = read_job_file(
        FOLDER / f"{name}.yaml",
        [
            "model.path=tiny",
            "model.max_model_len=4096",
            f"input.path={tmp_path}/in",
            f"output.path={tmp_path}/out",
            "generation.max_tokens=12",
        ],
        {},
    )
    job = parse_job(source)
    assert list(check_job(job, source)) == []
    plan = plan_job(job, source)
    assert (plan.target.name, plan.census.runnable_rows) == ("A10G", 2)
    table = run(job, engine, tmp_path).to_pydict()
    n = job.generation.n
    assert plan.census.total.value == sum(table["prompt_tokens"]) / n
    assert table["error"] == [None] * 2 * n
    assert table["sample"] == [*range(n)] * 2
    assert table["id"] == [
        str(value) for value in rows[job.input.id_column or ""] for _ in range(n)
    ]
    for column in job.input.columns:
        assert table[column] == [value for value in rows[column] for _ in range(n)]
    tokens = [
        sum(pair)
        for pair in zip(table["reasoning_tokens"], table["completion_tokens"], strict=True)
    ]
    limits = [limit for limit in rows.get("max_tokens", (12, 12)) for _ in range(n)]
    for spent, limit, reason in zip(tokens, limits, table["finish_reason"], strict=True):
        assert 0 < spent <= limit  # type: ignore[operator]
        assert (spent == limit) or reason == "stop"
    # Without a reserve nothing is cut short: a trace that fills max_tokens has no answer.
    assert not any(table["thinking_budget_hit"])
    if job.evaluate is not None:
        assert set(table["correct"]) <= {True, False}
    assert ("correct" in table) == (job.evaluate is not None)
    assert ("tool_calls" in table) == (name == "bfcl_v3")


def run(job: Job, engine: Engine, folder: Path) -> pa.Table:
    """The job's part, made without Ray."""
    files = list_input(str(folder / "in"))
    schema = InputSchema.of(files, input_columns(job))
    carried = schema.columns.carried
    [shard] = plan_shards(files, carried=carried, max_tokens=12, n=job.generation.n)
    published: list[pa.Table] = []

    def publish(part: PartFile, lease: Lease) -> Part:
        published.append(pq.read_table(part.path))
        counts = part.counts
        return Part(0, "part", lease.attempt, part.size_bytes, part.sha256, part.num_rows, counts)

    part_format = PartFormat(
        "run",
        n=job.generation.n,
        correct=job.evaluate is not None,
        tool_calls=job.has_tools,
    )
    pipeline = Pipeline(job, engine, publish, schema, part_format)
    pipeline.start(Lease(shard, 1, "attempt", Rows.all(shard.num_rows)))
    while not pipeline.work(0.5).idle:
        pass
    pipeline.close()
    [table] = published
    return table


def asked(name: str, place: int = 0) -> str:
    """The user's message of a made-up row, without the white space that chat templates strip."""
    prompt = PromptBuilder(load(name)).build(row(name, place))
    return prompt.messages[-1].content.strip()  # type: ignore[union-attr]


def test_prompts_read_well() -> None:
    """Options have letters, starter code its block, and no template leaves anything behind."""
    assert asked("gpqa", 1).endswith("\n\n5+6?\n\nA) 10\nB) 11\nC) 12\nD) 13")
    assert "inside \\boxed{}.\n\n3+4?" in asked("aime25")
    assert asked("livecodebench").endswith(
        "Add two numbers.\n\nRead the input from standard input, and print the answer to standard "
        "output."
    )
    assert asked("livecodebench", 1).endswith(
        "Sort.\n\nBegin with this code:\n\n```python\nclass Solution:\n    def sort(self):\n```"
    )
    assert asked("hle").endswith('begins with "Answer:".\n\n3+4?')


def test_right_answers_would_be_right() -> None:
    """What the prompts ask for is what the scorers take."""
    from batchrun.evaluate import ScoreSpec, score

    for name, said, wrong in [
        ("aime25", "So \\boxed{7}.", "\\boxed{8}"),
        ("math500", "So $\\boxed{7}$.", "\\boxed{8}"),
        ("gpqa", "So \\boxed{A}.", "\\boxed{B}"),
    ]:
        evaluate = load(name).evaluate
        assert evaluate is not None
        spec = ScoreSpec(evaluate.scorer, choices=evaluate.choices)
        [answer, *_] = ROWS[name]["answer"]
        assert score(spec, said, answer) is True
        assert score(spec, wrong, answer) is False


def test_functions_of_a_row_reach_its_prompt(engine: Engine) -> None:
    """BFCL's rows have their own functions, or none."""
    builder = PromptBuilder(load("bfcl_v3"))
    assert engine.chat is not None
    texts = []
    for place in range(2):
        prompt = builder.build(row("bfcl_v3", place))
        encoded = engine.chat.encode(
            prompt.messages,  # type: ignore[union-attr]
            reasoning=True,
            tools=prompt.tools,  # type: ignore[union-attr]
        )
        texts.append(encoded.text)
    assert ["AVAILABLE_TOOLS" in text for text in texts] == [True, False]
    assert json.dumps(ADD) in texts[0]


def test_rows_are_of_the_layout() -> None:
    """The made-up rows have the columns that the README names, and no other."""
    layout: Mapping[str, set[str]] = {name: set(columns) for name, columns in ROWS.items()}
    for name in JOBS:
        assert layout[name] == set(input_columns(load(name)).all)

"""Whole runs on a local Ray, in this process: what a run writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.cli.runner import summary_text
from batchrun.coordinator import OutcomeKind
from batchrun.data.lock import RunLock
from batchrun.data.status import discard, read_status
from batchrun.data.store import Store
from batchrun.errors import (
    CheckpointError,
    ClusterError,
    InputError,
    JobError,
    OutputError,
    OutputHeldError,
)

from .conftest import WarmRuns, Work, answer_of, sums

pytestmark = pytest.mark.usefixtures("cluster")


def test_rows_in_are_rows_out(work: Work) -> None:
    """Every row of three files is in the output once, in order, answered, with its columns."""
    for number in range(3):
        texts = sums(20, start=1 + 20 * number)
        work.write(f"{number}", texts, weight=pa.array(range(20), pa.int16()))
    summary = batchrun.run(work.raw(input={"columns": ["weight", "prompt"]}))
    assert (summary.exit_code, summary.outcome) == (0, OutcomeKind.SUCCESS)
    assert (summary.total_rows, summary.counts.rows, summary.failed_rows) == (60, 60, 0)
    table = ds.dataset(work.folder / "out").to_table()
    assert table.column_names == [
        "id",
        "sample",
        "weight",
        "prompt",
        "completion",
        "reasoning",
        "finish_reason",
        "prompt_tokens",
        "reasoning_tokens",
        "completion_tokens",
        "thinking_budget_hit",
        "error",
    ]
    assert table.schema.field("weight").type == pa.int16()
    assert table.column("prompt").to_pylist() == sums(60)
    ids = [f"{number}.parquet:{row}" for number in range(3) for row in range(20)]
    assert table.column("id").to_pylist() == ids
    right = sum(row["completion"] == answer_of(str(row["prompt"])) for row in work.rows())
    assert right >= 57
    success = json.loads((work.folder / "out" / "_SUCCESS").read_text())
    assert (success["rows"], success["failed_rows"], success["parts"]) == (60, 0, 3)


def test_a_system_prompt_is_computed_once(work: Work, warm: WarmRuns) -> None:
    """The end of the run says what that saved; the answers are those of a deterministic run, in
    which every row computes all of its prompt."""
    work.write("a", sums(40))
    given = {"system": "Answer the question, and show how you came to the answer. " * 3}
    summary = warm(work.raw(input=given))
    num_tokens = sum(int(str(row["prompt_tokens"])) for row in work.rows())
    assert num_tokens / 2 < summary.prefix_tokens < num_tokens
    assert f"{summary.prefix_tokens:,} tokens of prompts were not comp" in summary_text(summary)
    assert summary.to_json()["prefix_tokens"] == summary.prefix_tokens
    alone = warm(work.raw("alone", input=given), deterministic=True)
    assert alone.prefix_tokens == 0
    assert "were not computed again" not in summary_text(alone)
    assert work.rows("alone") == work.rows()


def test_parts_say_where_they_come_from(work: Work, warm: WarmRuns) -> None:
    """The schema metadata names version, job, model and the model's licence."""
    work.write("a", sums(2))
    warm(work.raw())
    [part] = work.parts()
    metadata = pq.read_schema(work.folder / "out" / part).metadata
    assert metadata[b"batchrun.version"] == batchrun.__version__.encode()
    assert metadata[b"batchrun.model"] == b"tiny"
    assert metadata[b"batchrun.model_license"] == b"Apache-2.0"
    assert json.loads(metadata[b"batchrun.job"])["generation"]["max_tokens"] == 64


def test_bad_rows_end_in_the_output_and_in_exit_code_3(work: Work, warm: WarmRuns) -> None:
    """Failed rows stand in the output; more than max_failed_rows of them is exit code 3."""
    work.write("a", ["What is 2+3?", None, "  ", "What is 4+4?"])
    summary = warm(work.raw())
    assert (summary.exit_code, summary.failed_rows) == (3, 2)
    assert not (work.folder / "out" / "_SUCCESS").exists()
    rows = work.rows()
    assert [row["completion"] for row in rows] == ["5", None, None, "8"]
    assert str(rows[1]["error"]).startswith("invalid_prompt: ")
    # Within the tolerance the same run is a success, and nothing is generated again.
    again = warm(work.raw(errors={"max_failed_rows": 0.5}))
    assert (again.exit_code, again.failed_rows, again.generated_rows) == (0, 2, 0)
    assert json.loads((work.folder / "out" / "_SUCCESS").read_text())["failed_rows"] == 2


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory, warm: WarmRuns) -> Work:
    """A finished run over one file of four rows."""
    work = Work(tmp_path_factory.mktemp("finished"))
    work.write("b", sums(4))
    assert warm(work.raw()).exit_code == 0
    return work


@pytest.fixture
def finished(finished_once: Work, tmp_path: Path) -> Work:
    """A copy of it, in another place."""
    shutil.copytree(finished_once.folder, tmp_path / "copy")
    return Work(tmp_path / "copy")


def test_finished_run_is_left_alone(finished: Work) -> None:
    """A second submit of a finished run changes no byte of the dataset and ends with 0."""
    out = finished.folder / "out"
    seen = {path: path.read_bytes() for path in out.glob("*") if path.is_file()}
    assert batchrun.run(finished.raw()).generated_rows == 0
    assert {path: path.read_bytes() for path in out.glob("*") if path.is_file()} == seen
    assert len(seen) == 2


def test_new_files_run_alone(finished: Work, warm: WarmRuns) -> None:
    """A grown folder: the new file is added, the parts that were there stay as they are."""
    out = finished.folder / "out"
    before = {name: (out / name).read_bytes() for name in finished.parts()}
    finished.write("a", sums(5, start=100))
    summary = warm(finished.raw())
    assert (summary.total_rows, summary.generated_rows) == (9, 5)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert len(finished.parts()) == 2
    assert json.loads((out / "_SUCCESS").read_text())["rows"] == 9


def test_changed_job_is_refused(finished: Work) -> None:
    """Another temperature for the same output is exit code 2, saying what changed."""
    before = finished.rows()
    with pytest.raises(OutputError, match=r"generation.temperature: 0\S* -> 1\.0") as caught:
        batchrun.run(finished.raw(generation={"temperature": 1.0}))
    assert caught.value.exit_code == 2
    assert "batchrun discard" in caught.value.hint
    assert finished.rows() == before
    assert discard(Store.open(str(finished.folder / "out"))) > 0
    assert list((finished.folder / "out").rglob("*.parquet")) == []


def test_changed_finished_input_is_refused(finished: Work) -> None:
    """Other bytes in a file that is finished are exit code 2, naming the file."""
    finished.write("b", sums(3))
    with pytest.raises(InputError, match=r"b\.parquet") as caught:
        batchrun.run(finished.raw())
    assert caught.value.exit_code == 2
    assert len(finished.rows()) == 4


def test_damaged_shard_fails_and_the_rest_is_done(work: Work, warm: WarmRuns) -> None:
    """A corrupt page fails its shard (exit code 3), the others are published; mended, it runs."""
    work.write("b", sums(3))
    path = work.folder / "in" / "a.parquet"
    table = pa.table({"prompt": sums(2000)})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 400 + whole[404:])
    summary = warm(work.raw())
    assert (summary.exit_code, summary.outcome) == (3, OutcomeKind.TOO_MANY_FAILURES)
    [(name, why)] = summary.failed_shards.items()
    assert "a.parquet" in name and "damaged" in why
    assert [row["id"] for row in work.rows()] == [f"b.parquet:{index}" for index in range(3)]
    status = read_status(Store.open(str(work.folder / "out")))
    assert (status.succeeded, len(status.failed_shards)) == (False, 1)


def test_no_rows_are_a_success(work: Work, warm: WarmRuns) -> None:
    """An input of 0 rows gives an empty part and exit code 0."""
    work.write("a", [])
    summary = warm(work.raw())
    assert (summary.exit_code, summary.total_rows) == (0, 0)
    assert ds.dataset(work.folder / "out").to_table().num_rows == 0


def test_bad_jobs_write_nothing(work: Work) -> None:
    """What can be known beforehand is exit code 2 with every problem, and no output."""
    work.write("a", sums(1))
    with pytest.raises(JobError) as caught:
        batchrun.run(work.raw(model={"path": "/nowhere"}, input={"prompt_column": "question"}))
    assert {problem.key for problem in caught.value.problems} == {
        "model.path",
        "input.prompt_column",
    }
    with pytest.raises(ClusterError, match=r"A100.*0 GPUs") as refused:
        batchrun.run(work.raw(resources={"accelerator_type": "A100"}))
    assert refused.value.exit_code == 2
    assert not (work.folder / "out").exists()


def test_held_output_is_exit_code_4(work: Work) -> None:
    """A live run holds its output: another one names the holder and ends with 4."""
    work.write("a", sums(1))
    with (
        RunLock(Store.open(str(work.folder / "out")), "some-run", beat_s=0.2),
        pytest.raises(OutputHeldError, match="process ") as caught,
    ):
        batchrun.run(work.raw())
    assert caught.value.exit_code == 4
    assert work.parts() == []


def test_several_workers_give_the_same_texts(work: Work, warm: WarmRuns) -> None:
    """With --deterministic, two workers give the bytes that one gives, drawn at random."""
    for number in range(4):
        work.write(f"{number}", sums(3, start=1 + 3 * number))
    drawn = {"temperature": 3.0, "top_p": 1.0, "max_tokens": 16, "n": 2}
    warm(work.raw("one", generation=drawn), deterministic=True)
    raw = work.raw("two", generation=drawn, resources={"workers": 2, "max_sequences": 3})
    warm(raw, deterministic=True)
    assert work.rows("one") == work.rows("two")
    assert len({str(row["reasoning"]) for row in work.rows("one")}) > 12


def test_what_only_a_worker_finds_ends_the_run(work: Work, warm: WarmRuns) -> None:
    """A model that memory cannot hold is said as it is, with exit code 2, and not retried."""
    from batchrun.data.checkpoints import find_checkpoint

    work.write("a", sums(1))
    model = work.folder / "model"
    shutil.copytree(find_checkpoint("tiny"), model)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 2**31 - 1
    (model / "config.json").write_text(json.dumps(config))
    raw = work.raw(model={"path": str(model), "max_model_len": 2**31 - 2})
    with pytest.raises(CheckpointError, match="memory") as caught:
        warm(raw)
    assert caught.value.exit_code == 2


def test_s3_end_to_end(work: Work, s3_server: object, warm: WarmRuns) -> None:
    """Input, checkpoint and output in S3: the same rows as from disk."""
    import s3fs

    from batchrun.data.checkpoints import find_checkpoint

    options = s3_server.storage_options  # type: ignore[attr-defined]
    url = s3_server.url  # type: ignore[attr-defined]
    fs = s3fs.S3FileSystem(**options)
    for number in range(2):
        path = work.write(f"{number}", sums(5, start=1 + 5 * number))
        fs.put(str(path), f"{url}/in/{number}.parquet")
    fs.put(str(find_checkpoint("tiny")), f"{url}/model", recursive=True)
    place = {"path": f"{url}/in/", "storage_options": options}
    there = {"path": f"{url}/out", "storage_options": options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHRUN_CACHE", str(work.folder / "cache"))
        raw = work.raw("out", input=place, output=there, model={"path": f"{url}/model"})
        summary = warm(raw)
        assert summary.exit_code == 0
        assert warm(raw).generated_rows == 0
    warm(work.raw("local"))
    parts = [f"s3://{name}" for name in fs.ls(f"{url}/out") if name.endswith(".parquet")]
    tables = [pq.read_table(part, filesystem=fs) for part in sorted(p[5:] for p in parts)]
    assert pa.concat_tables(tables).to_pylist() == work.rows("local")
    status = read_status(Store.open(f"{url}/out", options))
    assert (status.succeeded, status.counts.rows) == (True, 10)

"""Parts: whole, in input order, of the contract's columns, or not at all."""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.data import writer as writer_module
from batchrun.data.inputs import InputColumns
from batchrun.data.reader import ShardReader
from batchrun.data.spool import Spool
from batchrun.data.writer import PartFormat, PartWriter
from batchrun.errors import BatchrunError, StorageError
from batchrun.records import RESERVED_COLUMNS, Completion, Counts, FinishReason, Row, ToolCall
from batchrun.scores import Scores, Verdict
from tests.unit.data.parquet import planned, prompts, write

COLUMNS = InputColumns(prompt="prompt", carried=("n", "prompt"))


def completion(row: Row, sample: int = 0, **changes: object) -> Completion:
    """A finished sample."""
    values: dict[str, object] = {
        "ordinal": row.ordinal,
        "sample": sample,
        "id": row.id,
        "completion": f"answer {row.ordinal}.{sample}",
        "reasoning": "because",
        "finish_reason": FinishReason.STOP,
        "prompt_tokens": 3,
        "reasoning_tokens": 2,
        "completion_tokens": 1,
        **changes,
    }
    return Completion(**values)  # type: ignore[arg-type]


def open_shard(folder: Path, rows: int, columns: InputColumns = COLUMNS) -> ShardReader:
    """A reader of a shard of so many rows."""
    write(folder / "in/a.parquet", {**prompts(rows), "n": pa.array(range(rows), pa.int16())})
    (shard,), schema, _ = planned(folder / "in", columns)
    return ShardReader(shard, schema)


def test_the_columns_are_those_of_the_contract(tmp_path: Path) -> None:
    """Names, order and types, with the carried columns as in the input, and the metadata."""
    part_format = PartFormat("run", logprobs=True, metadata={"batchrun.version": "1"})
    with open_shard(tmp_path, 2) as reader, PartWriter(reader, part_format) as writer:
        for row in reader:
            writer.add(completion(row, logprobs=(-0.5, None)))
        table = pq.read_table(writer.finish().path)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id", "string"),
        ("sample", "int32"),
        ("n", "int16"),
        ("prompt", "string"),
        ("completion", "string"),
        ("reasoning", "string"),
        ("finish_reason", "string"),
        ("prompt_tokens", "int32"),
        ("reasoning_tokens", "int32"),
        ("completion_tokens", "int32"),
        ("thinking_budget_hit", "bool"),
        ("error", "string"),
        ("logprobs", "list<element: float>"),
    ]
    assert table.schema.metadata == {b"batchrun.version": b"1", b"batchrun.run": b"run"}
    assert table.to_pylist()[1] == {
        "id": "a.parquet:1",
        "sample": 0,
        "n": 1,
        "prompt": "prompt 1",
        "completion": "answer 1.0",
        "reasoning": "because",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "reasoning_tokens": 2,
        "completion_tokens": 1,
        "thinking_budget_hit": False,
        "error": None,
        "logprobs": [-0.5, None],
    }
    assert set(table.schema.names) - {"n", "prompt"} < set(RESERVED_COLUMNS)


def test_any_order_in_gives_input_order_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples come as they finish and stand in the order of the input, n each, once."""
    monkeypatch.setattr(writer_module, "_FLUSH_ROWS", 50)
    with open_shard(tmp_path, 200) as reader, PartWriter(reader, PartFormat("r", n=3)) as writer:
        samples = [completion(row, sample) for row in reader for sample in range(3)]
        random.Random(0).shuffle(samples)
        for item in samples:
            writer.add(item)
        part = writer.finish()
        file = pq.ParquetFile(part.path)
        table = file.read()
    assert file.metadata.num_row_groups > 3
    expected = list(itertools.product(range(200), range(3)))
    assert expected == list(zip(table["n"].to_pylist(), table["sample"].to_pylist(), strict=True))
    assert [f"answer {row}.{sample}" for row, sample in expected] == table["completion"].to_pylist()
    assert [f"prompt {row}" for row, _ in expected] == table["prompt"].to_pylist()


def test_rows_are_written_as_soon_as_they_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds what waits for a row before it, and no more than a row group."""
    monkeypatch.setattr(writer_module, "_FLUSH_ROWS", 10)
    with open_shard(tmp_path, 100) as reader, PartWriter(reader, PartFormat("r")) as writer:
        rows = list(reader)
        for row in rows[1:50]:
            writer.add(completion(row))
        assert (writer._num_written, writer.num_missing) == (0, 51)
        writer.add(completion(rows[0]))
        assert (writer._num_written, writer.num_missing, len(writer._waiting)) == (50, 50, 0)


class Looked(dict[tuple[int, int], Completion]):
    """A journal that counts what was looked up."""

    num_lookups = 0

    def __getitem__(self, key: tuple[int, int]) -> Completion:
        self.num_lookups += 1
        return super().__getitem__(key)


def test_journaled_samples_stand_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of journaled and new samples is the part of the same samples all new."""
    monkeypatch.setattr(writer_module, "_FLUSH_ROWS", 10)
    parts = []
    for journal_every in (1, 3, 1000):
        with open_shard(tmp_path, 50) as reader:
            rows = list(reader)
            samples = [completion(row, sample) for row in rows for sample in range(2)]
            kept = samples[::journal_every] if journal_every < 1000 else []
            journal = Looked({(item.ordinal, item.sample): item for item in kept})
            part_format = PartFormat("r", n=2)
            with PartWriter(reader, part_format, journaled=journal) as writer:
                random.Random(1).shuffle(samples)
                for item in samples:
                    if (item.ordinal, item.sample) in journal:
                        writer.add_journaled(item.ordinal, item.sample)
                    else:
                        writer.add(item)
                part = writer.finish()
                parts.append((part.sha256, part.counts))
    assert parts[0] == parts[1] == parts[2]


def test_a_journaled_sample_is_looked_up_when_its_turn_comes(tmp_path: Path) -> None:
    """A slow first row does not bring all that is journaled behind it into memory."""
    with open_shard(tmp_path, 50) as reader:
        rows = list(reader)
        journal = Looked({(row.ordinal, 0): completion(row) for row in rows[1:]})
        with PartWriter(reader, PartFormat("r"), journaled=journal) as writer:
            for row in rows[1:]:
                writer.add_journaled(row.ordinal, 0)
            assert (journal.num_lookups, writer.num_missing) == (0, 1)
            writer.add(completion(rows[0]))
            assert (journal.num_lookups, writer.num_missing) == (49, 0)
            with pytest.raises(BatchrunError, match="added twice"):
                writer.add_journaled(1, 0)
            with pytest.raises(BatchrunError, match="not in the journal"):
                writer.add_journaled(0, 0)


@pytest.mark.parametrize("tools", [False, True])
def test_samples_that_came_back_with_nothing_are_counted(tmp_path: Path, tools: bool) -> None:
    """Neither an error nor a tool call is nothing; an empty text is."""
    with open_shard(tmp_path, 4) as reader:
        rows = list(reader)
        with PartWriter(reader, PartFormat("r", tool_calls=tools)) as writer:
            writer.add(completion(rows[0], completion=""))
            writer.add(completion(rows[1]))
            calls = (ToolCall("f", "{}"),) if tools else None
            writer.add(replace(completion(rows[2], completion=""), tool_calls=calls))
            failed = replace(completion(rows[3]), completion=None, error="engine: broken")
            writer.add(replace(failed, finish_reason=FinishReason.ERROR))
            assert writer.finish().counts.empty == (1 if tools else 2)


def test_long_texts_are_flushed_by_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows of much text are written before many rows are there."""
    monkeypatch.setattr(writer_module, "_FLUSH_BYTES", 1000)
    with open_shard(tmp_path, 3) as reader, PartWriter(reader, PartFormat("r")) as writer:
        writer.add(completion(next(reader), completion="x" * 1001))
        assert writer._num_written == 1


def test_a_missing_row_is_never_lost(tmp_path: Path) -> None:
    """Finishing without every sample of every row raises and gives no file."""
    with open_shard(tmp_path, 3) as reader, PartWriter(reader, PartFormat("r", n=2)) as writer:
        first, second, third = reader
        for row, sample in ((first, 0), (first, 1), (third, 0), (third, 1), (second, 1)):
            writer.add(completion(row, sample))
        assert (writer.num_missing, writer.is_complete) == (1, False)
        with pytest.raises(BatchrunError, match="1 rows are missing"):
            writer.finish()
        writer.add(completion(second, 0))
        assert writer.finish().num_rows == 6


def test_a_sample_is_taken_once(tmp_path: Path) -> None:
    """Twice the same, or one that is not of the part, is an error and changes nothing."""
    with open_shard(tmp_path, 2) as reader, PartWriter(reader, PartFormat("r")) as writer:
        first, second = reader
        writer.add(completion(first))
        with pytest.raises(BatchrunError, match="added twice"):
            writer.add(completion(first))
        for wrong in ({"sample": 1}, {"ordinal": 2}, {"ordinal": -1}):
            with pytest.raises(BatchrunError, match="not of this part"):
                writer.add(completion(second, **wrong))  # type: ignore[arg-type]
        writer.add(completion(second))
        assert writer.finish().num_rows == 2


def test_the_sums_are_those_of_the_rows(tmp_path: Path) -> None:
    """Rows, failed rows (once, however many samples failed) and tokens."""
    with open_shard(tmp_path, 2) as reader, PartWriter(reader, PartFormat("r", n=2)) as writer:
        first, second = reader
        failed = {
            "completion": None,
            "reasoning": None,
            "finish_reason": FinishReason.ERROR,
            "error": "timeout: x",
        }
        writer.add(completion(first, 0, thinking_budget_hit=True))
        writer.add(completion(first, 1))
        writer.add(completion(second, 0, **failed))
        writer.add(completion(second, 1, **failed))
        part = writer.finish()
        assert Counts(2, 1, 12, 8, 4, 1) == part.counts
        data = part.path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest(), 4) == (
            part.size_bytes,
            part.sha256,
            part.num_rows,
        )
        assert pq.read_table(part.path)["completion"].null_count == 2


def test_no_rows_give_a_part_of_no_rows(tmp_path: Path) -> None:
    """A file of 0 rows has its part, with all columns."""
    with open_shard(tmp_path, 0) as reader, PartWriter(reader, PartFormat("r")) as writer:
        assert writer.is_complete
        table = pq.read_table(writer.finish().path)
    assert (table.num_rows, table.num_columns) == (0, 12)


def test_nothing_carried(tmp_path: Path) -> None:
    """Without carried columns the parts have our own alone."""
    columns = InputColumns(prompt="prompt")
    with open_shard(tmp_path, 2, columns) as reader:
        with PartWriter(reader, PartFormat("r", n=2)) as writer:
            for row in reader:
                for sample in range(2):
                    writer.add(completion(row, sample))
            assert pq.read_table(writer.finish().path).shape == (4, 10)


def test_every_character_arrives(tmp_path: Path) -> None:
    """Every plane, NUL and line ends byte for byte; half a surrogate pair becomes U+FFFD."""
    text = "".join(chr((plane << 16) + 0xE9) for plane in range(17)) + "\0\r\n\u2028</s>"
    with open_shard(tmp_path, 2) as reader, PartWriter(reader, PartFormat("r")) as writer:
        first, second = reader
        writer.add(completion(first, completion=text, reasoning=text))
        writer.add(completion(second, completion="a\ud800b", error="x\udfff"))
        table = pq.read_table(writer.finish().path)
    assert [text, "a\ufffdb"] == table["completion"].to_pylist()
    assert [text, "because"] == table["reasoning"].to_pylist()
    assert table["error"].to_pylist() == [None, "x\ufffd"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int8(), pa.string()),
        pa.large_string(),
        pa.string_view(),
        pa.list_(pa.struct([("a", pa.string()), ("b", pa.int8())])),
        pa.map_(pa.string(), pa.int32()),
        pa.timestamp("ns", "UTC"),
        pa.decimal128(20, 3),
        pa.float16(),
        pa.null(),
        pa.binary(3),
    ],
    ids=str,
)
def test_carried_columns_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    """What Parquet holds is carried with its type and values, for each sample again."""
    column = pa.array([None] * 3, kind) if kind == pa.null() else sample_values(kind)
    path = write(tmp_path / "in/a.parquet", {"prompt": ["x"] * 3, "c": column}, row_group_size=2)
    columns = InputColumns(prompt="prompt", carried=("c",))
    (shard,), schema, _ = planned(tmp_path / "in", columns)
    with ShardReader(shard, schema) as reader:
        with PartWriter(reader, PartFormat("r", n=2)) as writer:
            for row in reader:
                for sample in range(2):
                    writer.add(completion(row, sample))
            carried = pq.read_table(writer.finish().path)["c"]
    source = pq.read_table(path)["c"]
    assert source.type == carried.type
    expected = [value.as_py() for value in source for _ in range(2)]
    assert expected == [value.as_py() for value in carried]


def sample_values(kind: pa.DataType) -> pa.Array:
    """Three values of a type, one of them null."""
    if pa.types.is_nested(kind):
        items = (
            [[("k", 1)], [], None] if pa.types.is_map(kind) else [[{"a": "x", "b": 1}], [], None]
        )
        return pa.array(items, kind)
    if pa.types.is_timestamp(kind):
        return pa.array([10**18, 0, None], kind)
    if pa.types.is_decimal(kind):
        return pa.array(["1.5", "-2", None]).cast(kind)
    if pa.types.is_floating(kind):
        return pa.array([1.5, 2.0, None], pa.float32()).cast(kind)
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([b"abc", b"\xff\0\1", None], kind)
    return pa.array(["a", "b", None]).cast(kind)


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    """When work on a shard ends badly, the half part goes with it."""
    folder = tmp_path / "spool"
    with open_shard(tmp_path, 2) as reader:
        with pytest.raises(KeyError), PartWriter(reader, PartFormat("r"), folder) as writer:
            writer.add(completion(next(reader)))
            raise KeyError
    assert list(folder.iterdir()) == []


def test_the_spool_is_private_and_dead_ones_are_removed(tmp_path: Path) -> None:
    """Half parts of killed processes are deleted by the next one, living ones stay."""
    living = Spool(tmp_path)
    dead = Spool(tmp_path)
    (dead.path / "part.parquet").write_bytes(b"half")
    import os

    os.close(dead._lock)  # what the kernel does when a process is killed
    Spool(tmp_path).remove()
    assert [living.path] == list(tmp_path.iterdir())
    assert living.path.stat().st_mode & 0o777 == 0o700
    living.remove()


def test_verdicts_are_the_last_column(tmp_path: Path) -> None:
    """``correct`` is there with ``evaluate`` alone, null without an expected answer, and summed."""
    part_format = PartFormat("r", n=2, logprobs=True, correct=True)
    with open_shard(tmp_path, 3) as reader, PartWriter(reader, part_format) as writer:
        verdicts = [(True, True), (False, True), (None, None)]
        for row, pair in zip(reader, verdicts, strict=True):
            for sample, correct in enumerate(pair):
                answer = f"answer {correct}"
                writer.add(completion(row, sample, verdict=Verdict(correct, answer)))
        part = writer.finish()
        table = pq.read_table(part.path)
    assert table.schema.names[-2:] == ["logprobs", "correct"]
    assert table.schema.field("correct").type == pa.bool_()
    assert table["correct"].to_pylist() == [True, True, False, True, None, None]
    # A tie is the first sample's: the second row's majority is wrong.
    assert part.counts.scores == Scores((0, 1, 1), majority_correct=1)


def test_tool_calls_are_a_list_of_structs(tmp_path: Path) -> None:
    """``tool_calls`` is there with tools alone, before logprobs, null where a sample has none;
    samples that began a call that is none are counted."""
    part_format = PartFormat("r", logprobs=True, tool_calls=True)
    calls = (ToolCall("f", '{"x": "é"}'), ToolCall("g", "{}"))
    with open_shard(tmp_path, 3) as reader, PartWriter(reader, part_format) as writer:
        rows = list(reader)
        writer.add(replace(completion(rows[0], 0), completion="", tool_calls=calls))
        writer.add(replace(completion(rows[1], 0), completion="x <TOOLCALL>[", tool_calls=None))
        writer.add(completion(rows[2], 0))
        part = writer.finish()
        table = pq.read_table(part.path)
    assert table.schema.names[-3:] == ["error", "tool_calls", "logprobs"]
    pair = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    assert table.schema.field("tool_calls").type == pa.list_(pa.field("element", pair))
    written = [{"name": "f", "arguments": '{"x": "é"}'}, {"name": "g", "arguments": "{}"}]
    assert table["tool_calls"].to_pylist() == [written, None, None]
    assert part.counts.malformed_tool_calls == 1


def test_a_part_that_cannot_be_begun_is_an_error_of_storage(tmp_path: Path) -> None:
    """A local disk without room ends the run and says what to do; no row is to blame for it."""
    (tmp_path / "full").touch()
    with open_shard(tmp_path, 2) as reader:
        with pytest.raises(StorageError, match="local disk cannot hold the part") as caught:
            PartWriter(reader, PartFormat("run"), folder=tmp_path / "full")
    assert "TMPDIR" in caught.value.hint

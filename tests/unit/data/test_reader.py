"""Streaming rows out of a shard."""

from __future__ import annotations

import datetime
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.data import reader as reader_module
from batchrun.data.inputs import InputColumns
from batchrun.data.reader import ShardReader
from batchrun.data.store import Store
from batchrun.errors import BatchrunError, ShardError, StorageError
from batchrun.records import ErrorKind
from tests.conftest import S3Server
from tests.unit.data.parquet import invalid_utf8, planned, prompts, read_all, write

PROMPT = InputColumns(prompt="prompt")


def test_rows_come_in_order_with_their_ids(tmp_path: Path) -> None:
    """Ordinals, indices, default ids and values are those of the file."""
    write(tmp_path / "sub/a.parquet", prompts(1000), row_group_size=300)
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    rows, _ = read_all(shard, schema)
    assert list(range(1000)) == [row.ordinal for row in rows] == [row.index for row in rows]
    assert [f"sub/a.parquet:{number}" for number in range(1000)] == [row.id for row in rows]
    assert [{"prompt": f"prompt {number}"} for number in range(1000)] == [
        row.values for row in rows
    ]
    assert {None} == {row.error for row in rows}


def test_shards_of_a_file_give_its_rows_once(tmp_path: Path) -> None:
    """Ranges of row groups and ranges within a row group add up to the file."""
    data = {**prompts(500), "n": list(range(500))}
    write(tmp_path / "a.parquet", data, row_group_size=170)
    columns = InputColumns(prompt="prompt", carried=("n",))
    shards, schema, _ = planned(tmp_path, columns, max_tokens=100, max_part_bytes=20_000)
    assert len(shards) > 5
    found, carried = [], []
    for shard in shards:
        rows, table = read_all(shard, schema)
        assert [row.ordinal for row in rows] == list(range(shard.num_rows))
        found += [(row.index, row.values["prompt"]) for row in rows]
        carried += table.column("n").to_pylist()
    assert [(number, f"prompt {number}") for number in range(500)] == found
    assert list(range(500)) == carried


def test_the_limit_cuts_within_a_row_group(tmp_path: Path) -> None:
    """No row beyond the limit is read."""
    write(tmp_path / "a.parquet", prompts(100), row_group_size=30)
    (shard,), schema, _ = planned(tmp_path, PROMPT, limit=45)
    assert len(read_all(shard, schema)[0]) == 45


@pytest.mark.parametrize(
    ("rows", "options"),
    [(0, {}), (1, {"row_group_size": 1}), (300, {"row_group_size": 1})],
)
def test_odd_row_groups_simply_work(tmp_path: Path, rows: int, options: dict[str, int]) -> None:
    """0 rows, and row groups of one row."""
    table = pa.table({"prompt": pa.array([f"p{n}" for n in range(rows)], pa.string())})
    pq.write_table(table, tmp_path / "a.parquet", **options)
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    assert [f"p{n}" for n in range(rows)] == [
        row.values["prompt"] for row in read_all(shard, schema)[0]
    ]


def test_empty_row_groups_among_others_simply_work(tmp_path: Path) -> None:
    """Row groups of no rows are passed over."""
    kind = pa.schema([("prompt", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", kind) as writer:
        for values in ([], ["a"], [], [], ["b", "c"], []):
            writer.write_table(pa.table({"prompt": pa.array(values, pa.string())}))
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    assert len(shard.row_groups) == 6
    assert [row.values["prompt"] for row in read_all(shard, schema)[0]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
def test_text_of_every_kind_is_read_and_carried(tmp_path: Path, kind: pa.DataType) -> None:
    """The same Python text, and the carried column keeps the type that pyarrow reads."""
    values = ["a", None, "", "日本語", "a"]
    path = write(tmp_path / "a.parquet", {"prompt": pa.array(values).cast(kind)}, row_group_size=2)
    kind = pq.read_schema(path).field("prompt").type
    columns = InputColumns(prompt="prompt", carried=("prompt",))
    (shard,), schema, _ = planned(tmp_path, columns)
    rows, carried = read_all(shard, schema)
    assert values == [row.values["prompt"] for row in rows]
    assert (kind, values) == (carried.schema.field(0).type, carried.column(0).to_pylist())


def test_files_of_different_types_are_carried_in_one(tmp_path: Path) -> None:
    """Integer widths and kinds of text differ between files; the parts do not."""
    kinds = [
        (pa.int8(), pa.string()),
        (pa.int64(), pa.dictionary(pa.int32(), pa.string())),
        (pa.uint16(), pa.string_view()),
        (pa.null(), pa.null()),
    ]
    for number, (integer, text) in enumerate(kinds):
        data = {
            "prompt": ["x"],
            "n": pa.array([None if integer == pa.null() else number], integer),
            "t": pa.array([None if text == pa.null() else "t"]).cast(text),
        }
        write(tmp_path / f"{number}.parquet", data)
    columns = InputColumns(prompt="prompt", carried=("t", "n"))
    shards, schema, _ = planned(tmp_path, columns)
    tables = [read_all(shard, schema)[1] for shard in shards]
    assert {schema.carried} == {table.schema for table in tables}
    assert [("t", pa.string()), ("n", pa.int64())] == [
        (field.name, field.type) for field in schema.carried
    ]
    assert pa.concat_tables(tables).column("n").to_pylist() == [0, 1, 2, None]


def test_every_unicode_plane_is_kept(tmp_path: Path) -> None:
    """One character of every plane, NUL, line ends and special-token strings: byte for byte."""
    texts = [chr((plane << 16) + 0x0E9) for plane in range(17)]
    texts += [
        "\0",
        "\r\n\u2028\x85",
        "<think></s>[INST]",
        "{{ 7*7 }}{% x %}",
        "\ufffd\ufeff",
        "e\u0301",
    ]
    write(tmp_path / "a.parquet", {"prompt": texts})
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    assert texts == [row.values["prompt"] for row in read_all(shard, schema)[0]]


def test_a_record_that_is_not_utf8_is_an_error_row_among_good_ones(tmp_path: Path) -> None:
    """Broken bytes and lone surrogates: that row alone has an error, and is still carried."""
    column = invalid_utf8([b"good", b"\xff\xfe", b"\xed\xa0\x80", None, "ü".encode()])
    write(tmp_path / "a.parquet", {"prompt": column, "n": [0, 1, 2, 3, 4]})
    columns = InputColumns(prompt="prompt", carried=("prompt", "n"))
    (shard,), schema, _ = planned(tmp_path, columns)
    rows, carried = read_all(shard, schema)
    assert [row.error and row.error.kind for row in rows] == [
        None,
        ErrorKind.INVALID_PROMPT,
        ErrorKind.INVALID_PROMPT,
        None,
        None,
    ]
    assert rows[1].error is not None
    assert rows[1].error.message == "column 'prompt' is not valid UTF-8"
    assert [row.values["prompt"] for row in rows] == ["good", None, None, None, "ü"]
    assert carried.column("prompt").to_pylist() == ["good", "\ufffd\ufffd", "\ufffd" * 3, None, "ü"]


def test_nested_text_that_is_not_utf8_is_an_error_row(tmp_path: Path) -> None:
    """The same inside messages."""
    content = invalid_utf8([b"\xff", b"fine"])
    turns = pa.StructArray.from_arrays([pa.array(["user", "user"]), content], ["role", "content"])
    column = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), turns)
    write(tmp_path / "a.parquet", {"m": column})
    (shard,), schema, _ = planned(tmp_path, InputColumns(messages="m"))
    rows, _ = read_all(shard, schema)
    assert rows[0].error is not None and rows[1].error is None
    assert rows[1].values["m"] == [{"role": "user", "content": "fine"}]


def test_ids_of_a_column(tmp_path: Path) -> None:
    """Text as it is, integers in decimal; duplicates stay, null gets the default id."""
    write(tmp_path / "a.parquet", {"prompt": ["x"] * 4, "t": ["a", "a", None, "é"]})
    (shard,), schema, _ = planned(tmp_path, InputColumns(id="t", prompt="prompt"))
    assert [row.id for row in read_all(shard, schema)[0]] == ["a", "a", "a.parquet:2", "é"]
    ids = pa.array([1, 2**64 - 1, None, 1], pa.uint64())
    write(tmp_path / "a.parquet", {"prompt": ["x"] * 4, "t": ids})
    (shard,), schema, _ = planned(tmp_path, InputColumns(id="t", prompt="prompt"))
    assert ["1", str(2**64 - 1), "a.parquet:2", "1"] == [
        row.id for row in read_all(shard, schema)[0]
    ]


def test_values_of_other_types(tmp_path: Path) -> None:
    """Templates and overrides see Python values; one that Python cannot say is that row's error."""
    moment = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
    times = pa.array([int(moment.timestamp()) * 10**6, 2**62], pa.timestamp("us", "UTC"))
    data = {"time": times, "n": [1, 2], "b": [True, None], "l": [["x"], []]}
    write(tmp_path / "a.parquet", data)
    columns = InputColumns(template=("time", "l"), overrides=("n", "b"))
    (shard,), schema, _ = planned(tmp_path, columns)
    rows, _ = read_all(shard, schema)
    assert {"time": moment, "l": ["x"], "n": 1, "b": True} == rows[0].values
    assert rows[1].error is not None and "column 'time' cannot be read" in rows[1].error.message


def test_columns_that_are_not_used_are_not_read(tmp_path: Path) -> None:
    """A corrupt column that nobody asked for does no harm; no column at all works too."""
    path = write(
        tmp_path / "a.parquet",
        {**prompts(50), "junk": [os.urandom(40).hex() for _ in range(50)]},
        compression="none",
        use_dictionary=False,
    )
    spoil(path, "junk")
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    assert len(read_all(shard, schema)[0]) == 50
    (shard,), schema, _ = planned(tmp_path, InputColumns())
    assert len(read_all(shard, schema)[0]) == 50


def spoil(path: Path, column: str) -> None:
    """Overwrite the header of the column's first page."""
    metadata = pq.read_metadata(path).row_group(0)
    place = [metadata.column(n).path_in_schema for n in range(metadata.num_columns)].index(column)
    offset = metadata.column(place).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 24] = b"\xff" * 24
    path.write_bytes(data)


def test_a_corrupt_page_is_a_shard_error_naming_the_file(tmp_path: Path) -> None:
    """Bytes that went bad inside the file fail the shard, not the process."""
    spoil(write(tmp_path / "a.parquet", prompts(50), use_dictionary=False), "prompt")
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    with pytest.raises(ShardError, match=r"^/.*/a\.parquet is damaged"):
        read_all(shard, schema)


def test_pages_spoiled_anywhere_never_raise_anything_else(tmp_path: Path) -> None:
    """Turned bytes anywhere in the data give rows or a ShardError, never another exception."""
    path = write(tmp_path / "a.parquet", {**prompts(200), "n": list(range(200))})
    good = path.read_bytes()
    (shard,), schema, _ = planned(tmp_path, InputColumns(prompt="prompt", carried=("n",)))
    outcomes = set()
    for place in range(4, len(good) - 900, 61):
        turned = bytearray(good)
        turned[place] ^= 0xFF
        path.write_bytes(turned)
        os.utime(path, ns=(0, int(shard.fingerprint.partition("-")[2])))
        try:
            outcomes.add(len(read_all(shard, schema)[0]))
        except ShardError:
            outcomes.add(-1)
    assert -1 in outcomes and outcomes <= {-1, 200}


def test_a_file_that_changed_before_reading_is_a_shard_error(tmp_path: Path) -> None:
    """What was planned is what is read, or nothing."""
    path = write(tmp_path / "a.parquet", prompts(50))
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    write(path, prompts(51))
    with pytest.raises(ShardError, match="changed after the run was planned"):
        read_all(shard, schema)
    path.unlink()
    with pytest.raises(ShardError, match="is gone"):
        read_all(shard, schema)


def test_a_file_that_changes_while_it_is_read_is_a_shard_error(tmp_path: Path) -> None:
    """The last row is not given out as if all were well."""
    path = write(tmp_path / "a.parquet", prompts(2000))
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    with ShardReader(shard, schema) as reader:
        next(reader)
        os.utime(path, ns=(0, 1))
        with pytest.raises(ShardError, match="changed"):
            list(reader)


def test_an_object_replaced_while_it_is_read_is_a_shard_error(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On S3 every ranged read asks for the planned version."""
    monkeypatch.setattr(reader_module, "_BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(reader_module, "_MAX_PRE_BUFFER_BYTES", 0)
    store = Store.open(f"{s3_server.url}/in", s3_server.storage_options)
    texts = [os.urandom(500).hex() for _ in range(2000)]
    path = write(tmp_path / "x.parquet", {"prompt": texts}, use_dictionary=False)
    store.put("x.parquet", path.read_bytes())
    options = s3_server.storage_options
    (shard,), schema, _ = planned(f"{s3_server.url}/in", PROMPT, storage_options=options)
    rows, _ = read_all(shard, schema, options)
    assert texts == [row.values["prompt"] for row in rows]
    with ShardReader(shard, schema, options) as reader:
        next(reader)
        store.put("x.parquet", write(path, {"prompt": texts[::-1]}).read_bytes())
        with pytest.raises(ShardError, match="changed"):
            list(reader)


def test_no_more_is_fetched_ahead_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of many small row groups is fetched a few of them at a time, its own columns only."""
    texts = [os.urandom(50).hex() for _ in range(10_000)]
    data = {"prompt": texts, "other": [text[::-1] * 5 for text in texts]}
    path = write(tmp_path / "a.parquet", data, row_group_size=500, use_dictionary=False)
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    group = pq.ParquetFile(path).metadata.row_group(0).column(0).total_compressed_size
    monkeypatch.setattr(reader_module, "_MAX_PRE_BUFFER_BYTES", int(3.5 * group))
    spans: list[tuple[int, int]] = []
    read = reader_module._GuardedFile.read

    def counted(self: reader_module._GuardedFile, size: int = -1) -> bytes:
        start = self.tell()
        data = read(self, size)
        spans.append((start, len(data)))
        return data

    monkeypatch.setattr(reader_module._GuardedFile, "read", counted)
    with ShardReader(shard, schema) as reader:
        found = [next(reader)]
        reader._next.result()
        big = [size for _, size in spans if size > group // 2]
        assert len(big) == 3 and sum(big) < 4 * group
        found += list(reader)
    assert texts == [row.values["prompt"] for row in found]
    assert sum(size for _, size in spans) < 25 * group, "the other column was never fetched"


def test_lost_storage_is_not_blamed_on_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that breaks under Arrow's reader is a StorageError."""
    write(tmp_path / "a.parquet", prompts(5))
    (shard,), schema, _ = planned(tmp_path, PROMPT)

    class Broken:
        def __init__(self) -> None:
            self.source = (tmp_path / "a.parquet").open("rb")
            self.reads = 0

        def read(self, size: int) -> bytes:
            self.reads += 1
            if self.reads > 3:
                raise ConnectionResetError("gone")
            return self.source.read(size)

        def __getattr__(self, name: str) -> object:
            return getattr(self.source, name)

    monkeypatch.setattr(reader_module, "open_ranged", lambda *_, **__: Broken())
    with pytest.raises(StorageError, match="cannot be reached"):
        read_all(shard, schema)


def test_a_footer_that_lies_about_rows_is_a_shard_error(tmp_path: Path) -> None:
    """Fewer rows than planned are never taken for all of them."""
    import dataclasses

    write(tmp_path / "a.parquet", prompts(5))
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    with pytest.raises(ShardError, match="gave 5 rows where its footer says 9"):
        read_all(dataclasses.replace(shard, num_rows=9), schema)


def test_reading_is_bounded_and_ahead_by_one_batch(tmp_path: Path) -> None:
    """A row group of many rows is not decoded at once, and closing stops in the middle."""
    write(tmp_path / "a.parquet", {**prompts(5000), "n": list(range(5000))})
    columns = InputColumns(prompt="prompt", carried=("n",))
    (shard,), schema, _ = planned(tmp_path, columns)
    with ShardReader(shard, schema) as reader:
        for _ in range(300):
            next(reader)
        assert sum(batch.num_rows for batch in reader._carried) == 512
        assert list(range(300)) == reader.take_carried(300).column("n").to_pylist()
        with pytest.raises(BatchrunError, match="were not read"):
            reader.take_carried(1000)
    assert list(reader) == []


def test_a_parquet_bomb_stays_small(tmp_path: Path) -> None:
    """A file of kilobytes whose dictionary unfolds to gigabytes is read in small batches."""
    column = pa.DictionaryArray.from_arrays(
        pa.array([0] * 1_000_000, pa.int32()), pa.array(["x" * 4096])
    )
    write(tmp_path / "a.parquet", {"prompt": column.cast(pa.dictionary(pa.int32(), pa.string()))})
    (shard, *_), schema, _ = planned(tmp_path, PROMPT)
    with ShardReader(shard, schema) as reader:
        before = pa.total_allocated_bytes()
        assert next(reader).values["prompt"] == "x" * 4096
        assert pa.total_allocated_bytes() - before < 64 << 20


def test_expected_answers_come_with_their_rows(tmp_path: Path) -> None:
    """Each row has its answer as a Python value; one that is no text is none, and no error."""
    write(tmp_path / "a.parquet", {"prompt": ["x", "y"], "a": invalid_utf8([b"ok", b"\xff"])})
    (shard,), schema, _ = planned(tmp_path, InputColumns(prompt="prompt", answer="a"))
    rows, _ = read_all(shard, schema)
    assert [(row.answer, row.error) for row in rows] == [("ok", None), (None, None)]
    assert [row.values for row in rows] == [{"prompt": "x"}, {"prompt": "y"}]


def test_expected_answers_of_every_type(tmp_path: Path) -> None:
    """Numbers, decimals, booleans and lists are what they are in the file."""
    values = [[1, None], [Decimal("1.50")] * 2, [True, False], [["a", "b"], []], [0.5, None]]
    for number, pair in enumerate(values):
        folder = tmp_path / str(number)
        write(folder / "a.parquet", {"prompt": ["x", "y"], "a": pair})
        (shard,), schema, _ = planned(folder, InputColumns(prompt="prompt", answer="a"))
        assert [row.answer for row in read_all(shard, schema)[0]] == pair


def test_memory_is_counted_while_another_thread_takes_it(tmp_path: Path) -> None:
    """A part that is finished beside the engine takes carried rows while the pipeline asks how
    many bytes are held."""
    columns = InputColumns(prompt="prompt", carried=("n",))
    data = {**prompts(2000), "n": list(range(2000))}
    write(tmp_path / "a.parquet", data, row_group_size=10)
    (shard,), schema, _ = planned(tmp_path, columns)
    interval = sys.getswitchinterval()
    with ShardReader(shard, schema) as reader, ThreadPoolExecutor(1) as pool:
        assert 2000 == len(list(reader))
        sys.setswitchinterval(1e-6)
        try:
            taking = pool.submit(lambda: [reader.take_carried(1) for _ in range(2000)])
            held = [reader.held_bytes]
            while not taking.done():
                held.append(reader.held_bytes)
        finally:
            sys.setswitchinterval(interval)
    assert list(range(2000)) == [table.column("n")[0].as_py() for table in taking.result()]
    assert sorted(held, reverse=True) == held
    assert 0 == reader.held_bytes

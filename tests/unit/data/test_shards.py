"""Cutting the input into shards."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.data.footers import InputFile, RowGroup
from batchrun.data.shards import plan_shards


def file(*groups: tuple[int, int], name: str = "a.parquet") -> InputFile:
    """A file with these (rows, bytes of column c) row groups."""
    return InputFile(
        path=name,
        uri=f"/in/{name}",
        size_bytes=1000,
        fingerprint="f",
        row_groups=tuple(RowGroup(rows, (size, 10**12)) for rows, size in groups),
        schema=pa.schema([("c", pa.string()), ("other", pa.string())]),
    )


def cut(*files: InputFile, **options: object) -> list[tuple[object, ...]]:
    """(path, row groups, first row, rows) of each shard; 8 bytes a row without carried bytes."""
    arguments = {"carried": ("c",), "max_tokens": 2, "max_part_bytes": 100, **options}
    shards = plan_shards(files, **arguments)  # type: ignore[arg-type]
    assert list(range(len(shards))) == [shard.number for shard in shards]
    return [(item.path, item.row_groups, item.first_row, item.num_rows) for item in shards]


def test_a_small_file_is_one_shard() -> None:
    """All its row groups together."""
    assert cut(file((3, 5), (3, 5), (3, 5))) == [("a.parquet", (0, 1, 2), 0, 9)]


def test_a_big_file_is_cut_between_row_groups() -> None:
    """As many whole row groups as keep the estimated part within its size."""
    groups = [(5, 10)] * 5  # 50 bytes each
    assert cut(file(*groups)) == [
        ("a.parquet", (0, 1), 0, 10),
        ("a.parquet", (2, 3), 10, 10),
        ("a.parquet", (4,), 20, 5),
    ]


def test_carried_bytes_and_samples_count() -> None:
    """Columns that are not carried do not count; each sample carries the columns again."""
    groups = [(1, 42), (1, 42)]  # 50 bytes each
    assert len(cut(file(*groups))) == 1
    assert len(cut(file(*groups), n=2)) == 2
    assert len(cut(file(*groups), n=2, carried=())) == 1


def test_a_row_group_that_is_too_big_is_cut_into_rows() -> None:
    """A writer that puts millions of rows into one row group does no harm."""
    assert cut(file((2, 0), (30, 0), (1, 0))) == [
        ("a.parquet", (0,), 0, 2),
        ("a.parquet", (1,), 2, 10),
        ("a.parquet", (1,), 12, 10),
        ("a.parquet", (1,), 22, 10),
        ("a.parquet", (2,), 32, 1),
    ]


def test_a_row_that_is_too_big_is_a_shard() -> None:
    """One row is never cut."""
    assert cut(file((1, 10**9))) == [("a.parquet", (0,), 0, 1)]


def test_files_of_no_rows_are_shards_of_no_rows() -> None:
    """So that every file has its part."""
    assert cut(file(), file((0, 0), name="b.parquet"), file((1, 0), name="c.parquet")) == [
        ("a.parquet", (), 0, 0),
        ("b.parquet", (0,), 0, 0),
        ("c.parquet", (0,), 0, 1),
    ]


def test_the_limit_ends_the_plan() -> None:
    """The first N rows and not one more."""
    files = [file((3, 0)), file((3, 0), name="b.parquet"), file((3, 0), name="c.parquet")]
    assert cut(*files, limit=5) == [("a.parquet", (0,), 0, 3), ("b.parquet", (0,), 0, 2)]
    assert cut(*files, limit=3) == [("a.parquet", (0,), 0, 3)]


def test_numbers_go_on_where_the_plan_ended() -> None:
    """Shards that are added to a plan take the next numbers."""
    shards = plan_shards([file((1, 0))], max_tokens=1, first_number=7)
    assert [shard.number for shard in shards] == [7]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 200)), max_size=8),
    st.integers(1, 3),
    st.none() | st.integers(1, 60),
)
def test_shards_cover_every_row_once(
    groups: list[tuple[int, int]], n: int, limit: int | None
) -> None:
    """Whatever the row groups, shards follow one another without a gap up to the end."""
    source = file(*groups)
    row = 0
    for _, row_groups, first_row, num_rows in cut(source, n=n, limit=limit):
        assert row == first_row
        row += num_rows  # type: ignore[operator]
        starts = [sum(rows for rows, _ in groups[:number]) for number in row_groups]  # type: ignore[attr-defined]
        if num_rows:
            assert starts[0] <= first_row  # type: ignore[operator]
    assert row == (source.num_rows if limit is None else min(limit, source.num_rows))

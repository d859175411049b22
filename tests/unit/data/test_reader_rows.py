"""Reading some rows of a shard: those and no others, and not the row groups without them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.data.inputs import InputColumns
from batchrun.data.reader import ShardReader
from batchrun.errors import ShardError
from batchrun.rows import Rows
from tests.unit.data.parquet import planned, prompts, write

PROMPT = InputColumns(prompt="prompt", carried=("n",))


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 1)],
        [(499, 500)],
        [(0, 500)],
        [(168, 172), (3, 4), (300, 301), (339, 341)],
        [(0, 170), (340, 500)],
        [(n, n + 1) for n in range(0, 500, 7)],
        [],
    ],
)
def test_only_those_rows_come(tmp_path: Path, ranges: list[tuple[int, int]]) -> None:
    """With their ordinals and values, in order, across row groups; no carried column is kept."""
    write(tmp_path / "a.parquet", {**prompts(500), "n": list(range(500))}, row_group_size=170)
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    rows = Rows.of_ranges(ranges)
    with ShardReader(shard, schema, rows=rows) as reader:
        found = list(reader)
        assert reader.held_bytes == 0
    assert [row.ordinal for row in found] == list(rows)
    assert [row.values["prompt"] for row in found] == [f"prompt {number}" for number in rows]
    assert [row.id for row in found] == [f"a.parquet:{number}" for number in rows]


def test_rows_of_a_shard_that_begins_within_a_row_group(tmp_path: Path) -> None:
    """Ordinals count from the shard's first row, wherever in the file that is."""
    write(tmp_path / "a.parquet", {**prompts(500), "n": list(range(500))}, row_group_size=170)
    shards, schema, _ = planned(tmp_path, PROMPT, max_tokens=100, max_part_bytes=20_000)
    for shard in shards:
        wanted = Rows.of_ranges([(1, 2), (shard.num_rows - 1, shard.num_rows)])
        with ShardReader(shard, schema, rows=wanted) as reader:
            found = [(row.ordinal, row.index) for row in reader]
        assert found == [(ordinal, shard.first_row + ordinal) for ordinal in wanted]


def test_row_groups_without_wanted_rows_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease of the last rows does not pay for the first ones."""
    write(tmp_path / "a.parquet", {**prompts(500), "n": list(range(500))}, row_group_size=100)
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    read: list[list[int]] = []
    batches = pq.ParquetFile.iter_batches

    def noted(self: pq.ParquetFile, *args: object, **more: object) -> object:
        read.append(more["row_groups"])  # type: ignore[arg-type]
        return batches(self, *args, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    with ShardReader(shard, schema, rows=Rows.of_ranges([(150, 160), (480, 490)])) as reader:
        assert len(list(reader)) == 20
    assert read == [[1, 4]]


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    """Also by who reads only some of it."""
    write(tmp_path / "a.parquet", {**prompts(50), "n": list(range(50))})
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    write(tmp_path / "a.parquet", {**prompts(60), "n": list(range(60))})
    with (
        pytest.raises(ShardError, match="changed"),
        ShardReader(shard, schema, rows=Rows.of([3])) as reader,
    ):
        list(reader)


def test_nobody_has_to_wait_for_rows_that_are_on_their_way(tmp_path: Path) -> None:
    """What is still to come is said; once it has come, the next row is there at once."""
    write(tmp_path / "a.parquet", {**prompts(600), "n": list(range(600))})
    (shard,), schema, _ = planned(tmp_path, PROMPT)
    with ShardReader(shard, schema) as reader:
        for ordinal in range(600):
            if (coming := reader.coming) is not None:
                coming.result()
            assert reader.coming is None
            assert next(reader).ordinal == ordinal
        assert list(reader) == [] and reader.coming is None

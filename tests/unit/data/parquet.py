"""Small Parquet files for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.data.inputs import InputColumns, InputFile, InputSchema, list_input, plan_shards
from batchrun.data.reader import ShardReader
from batchrun.records import Shard


def write(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    """Write a file; values are lists or Arrow arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **options)
    return path


def prompts(count: int) -> dict[str, list[str]]:
    """One prompt column of so many rows."""
    return {"prompt": [f"prompt {number}" for number in range(count)]}


def invalid_utf8(values: Sequence[bytes | None], kind: pa.DataType | None = None) -> pa.Array:
    """Bytes that claim to be text, as a careless writer leaves them."""
    data = pa.array(values, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(data), data.buffers())
    return text if kind is None else text.cast(kind, safe=False)


def planned(
    path: Path | str,
    columns: InputColumns,
    *,
    limit: int | None = None,
    max_part_bytes: int = 256 << 20,
    max_tokens: int = 16,
    storage_options: Mapping[str, object] | None = None,
) -> tuple[list[Shard], InputSchema, list[InputFile]]:
    """The shards and the schema of an input."""
    files = list_input(str(path), storage_options)
    shards = plan_shards(
        files,
        carried=columns.carried,
        max_tokens=max_tokens,
        limit=limit,
        max_part_bytes=max_part_bytes,
    )
    return shards, InputSchema.of(files, columns), files


def read_all(shard: Shard, schema: InputSchema, options: Any = None) -> tuple[list[Any], Any]:
    """All rows of a shard and its carried columns."""
    with ShardReader(shard, schema, options) as reader:
        rows = list(reader)
        return rows, reader.take_carried(len(rows)) if schema.columns.carried else None

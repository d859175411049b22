"""Reading Parquet footers: what a file holds, and whether it is a Parquet file at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.data.border import Role, border
from batchrun.errors import InputError

# A footer is not trusted: it may say that it needs gigabytes.
_MAX_FOOTER_BYTES = 64 << 20
_MAX_THRIFT_ITEMS = 20_000_000
_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group by its footer. ``column_bytes`` are decoded bytes of each top-level column, in
    the order of the file's schema."""

    num_rows: int
    column_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input, with its footer read.

    ``path`` is relative to the input and stands in row ids, ``uri`` says where to read,
    ``fingerprint`` pins the bytes.
    """

    path: str
    uri: str
    size_bytes: int
    fingerprint: str
    row_groups: tuple[RowGroup, ...]
    schema: pa.Schema

    @property
    def num_rows(self) -> int:
        """Rows in the whole file."""
        return sum(group.num_rows for group in self.row_groups)


def open_parquet(source: BinaryIO, name: str) -> pq.ParquetFile:
    """``source`` as a Parquet file, with limits on what its footer may ask for.

    Raises :class:`~batchrun.errors.InputError` naming ``name`` and what is wrong: empty, not
    Parquet, encrypted, truncated, damaged. Errors of storage pass through.
    """
    size = source.seek(0, os.SEEK_END)
    if size == 0:
        raise InputError(f"input: {name} is empty (0 bytes)", "remove it or write it again")
    source.seek(0)
    head = source.read(4)
    source.seek(max(0, size - 8))
    tail = source.read(8)
    if head == b"PARE" or tail[4:] == b"PARE":
        raise InputError(f"input: {name} is an encrypted Parquet file", "write it without")
    if head != _MAGIC:
        raise InputError(f"input: {name} is not a Parquet file", "name Parquet files only")
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or footer_bytes + 12 > size:
        raise InputError(
            f"input: {name} is a truncated Parquet file: its footer is missing or cut off",
            "copy it again",
        )
    if footer_bytes > _MAX_FOOTER_BYTES:
        raise InputError(f"input: the footer of {name} has {footer_bytes} bytes, which is too big")
    source.seek(0)
    try:
        return pq.ParquetFile(
            source,
            pre_buffer=False,
            buffer_size=1 << 20,
            thrift_string_size_limit=_MAX_FOOTER_BYTES,
            thrift_container_size_limit=_MAX_THRIFT_ITEMS,
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"input: the footer of {name} is damaged ({_short(error)})", "write the file again"
        ) from error


def ahead_of(parquet: pq.ParquetFile, source: Any) -> pq.ParquetFile:
    """The same file as ``parquet``, which fetches at once all that is asked of it together."""
    return pq.ParquetFile(
        source,
        metadata=parquet.metadata,
        pre_buffer=True,
        buffer_size=0,
        thrift_string_size_limit=_MAX_FOOTER_BYTES,
        thrift_container_size_limit=_MAX_THRIFT_ITEMS,
    )


def open_ranged(fs: Any, location: str, *, block_bytes: int) -> BinaryIO:
    """The file at ``location``, reading ranges of at least ``block_bytes`` ahead.

    Object storage is asked for what is read and little more: fsspec's own default fetches tens
    of megabytes for a footer.
    """
    return cast(BinaryIO, fs.open(location, "rb", block_size=block_bytes, cache_type="readahead"))


def read_footer(fs: Any, path: str, uri: str, name: str, info: Mapping[str, Any]) -> InputFile:
    """The file at ``path`` of the filesystem, with its footer; ``info`` has size, fingerprint.

    Raises :class:`~batchrun.errors.InputError` for a file that cannot be used.
    """
    block_bytes = 1 << 16
    with (
        border(Role.INPUT, uri, early=True),
        open_ranged(fs, path, block_bytes=block_bytes) as source,
    ):
        parquet = open_parquet(source, uri)
        groups = _row_groups(parquet)
        return InputFile(
            path=name,
            uri=uri,
            size_bytes=int(info["size"]),
            fingerprint=str(info["fingerprint"]),
            row_groups=groups,
            schema=parquet.schema_arrow.remove_metadata(),
        )


def _row_groups(parquet: pq.ParquetFile) -> tuple[RowGroup, ...]:
    metadata = parquet.metadata
    names = list(parquet.schema_arrow.names)
    places = {name: place for place, name in enumerate(names)}
    leaves: list[int] = []
    for index in range(metadata.num_columns):
        leaf = parquet.schema.column(index).path
        leaves.append(places.get(leaf, places.get(leaf.partition(".")[0], 0)))
    groups: list[RowGroup] = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        sizes = [0] * len(names)
        for index, place in enumerate(leaves):
            sizes[place] += max(0, group.column(index).total_uncompressed_size)
        groups.append(RowGroup(group.num_rows, tuple(sizes)))
    return tuple(groups)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

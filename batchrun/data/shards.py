"""Planning: from files to shards whose parts stay small enough for one upload. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from batchrun.data.footers import InputFile, RowGroup
from batchrun.records import Shard

MAX_PART_BYTES = 256 << 20
_BYTES_PER_TOKEN = 4


def plan_shards(
    files: Sequence[InputFile],
    *,
    carried: Sequence[str] = (),
    max_tokens: int,
    n: int = 1,
    limit: int | None = None,
    first_number: int = 0,
    max_part_bytes: int = MAX_PART_BYTES,
) -> list[Shard]:
    """The shards of ``files`` in order, numbered from ``first_number``.

    A shard is a file, or as many whole row groups of it as keep the estimated part (carried
    bytes and 4 bytes a token, for each of ``n`` samples) within ``max_part_bytes``. A row group
    that is too big by itself is cut into ranges of rows. ``limit`` ends the plan after so many
    rows. A file of 0 rows is a shard of 0 rows.
    """
    shards: list[Shard] = []
    left = limit
    for file in files:
        if left is not None and left <= 0:
            break
        places = [file.schema.names.index(name) for name in carried if name in file.schema.names]
        for groups, first_row, num_rows in _ranges(
            file.row_groups, places, max_tokens * _BYTES_PER_TOKEN, n, max_part_bytes
        ):
            if left is not None and left <= 0:
                break
            rows = num_rows if left is None else min(num_rows, left)
            shards.append(
                Shard(
                    number=first_number + len(shards),
                    path=file.path,
                    uri=file.uri,
                    size_bytes=file.size_bytes,
                    fingerprint=file.fingerprint,
                    row_groups=groups,
                    first_row=first_row,
                    num_rows=rows,
                )
            )
            if left is not None:
                left -= rows
    return shards


def _ranges(
    groups: Sequence[RowGroup],
    carried: Sequence[int],
    text_bytes: int,
    n: int,
    max_part_bytes: int,
) -> list[tuple[tuple[int, ...], int, int]]:
    """(row groups, first row, rows) of each shard of one file."""
    ranges: list[tuple[tuple[int, ...], int, int]] = []
    open_groups: list[int] = []
    open_rows = open_bytes = row = 0
    start = 0
    for number, group in enumerate(groups):
        carried_bytes = sum(group.column_bytes[place] for place in carried)
        size = n * (carried_bytes + text_bytes * group.num_rows)
        if open_groups and open_bytes + size > max_part_bytes:
            ranges.append((tuple(open_groups), start, open_rows))
            open_groups, open_rows, open_bytes, start = [], 0, 0, row
        if size > max_part_bytes and group.num_rows > 1:
            pieces = min(group.num_rows, -(-size // max_part_bytes))
            for piece in range(pieces):
                begin = group.num_rows * piece // pieces
                end = group.num_rows * (piece + 1) // pieces
                ranges.append(((number,), row + begin, end - begin))
            row += group.num_rows
            start = row
            continue
        open_groups.append(number)
        open_rows += group.num_rows
        open_bytes += size
        row += group.num_rows
    if open_groups or not ranges:
        ranges.append((tuple(open_groups), start, open_rows))
    return ranges

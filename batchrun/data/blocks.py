"""Objects made of lines in compressed, checksummed blocks: what is damaged costs its block only.

::

    object  = header line (JSON, readable by people) newline block*
    block   = marker  raw bytes, compressed bytes: uint32 little-endian  checksum  compressed lines

A checksum covers the header too, so a block never counts for another object than its own. Sizes
are checked before anything is decompressed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import pyarrow as pa

_MARKER = b"\x93BRB\r\n\x1a\x01"
_SIZES = struct.Struct("<II")
_DIGEST_BYTES = 16
_HEAD_BYTES = len(_MARKER) + _SIZES.size + _DIGEST_BYTES
_BLOCK_BYTES = 256 << 10  # of lines, before compression
MAX_LINE_BYTES = 32 << 20
"""The longest line: what a reader takes of memory for one block."""
_MAX_HEADER_BYTES = 4 << 10


def to_bytes(header: Mapping[str, object], lines: Iterable[bytes]) -> bytes:
    """An object of these lines, which hold no newline and at most :data:`MAX_LINE_BYTES` each.

    Raises ValueError for a longer line or a header of more than 4 KiB.
    """
    first = json.dumps(header, sort_keys=True).encode() + b"\n"
    if len(first) > _MAX_HEADER_BYTES:
        raise ValueError(f"the header has {len(first)} bytes")
    pieces = [first]
    waiting: list[bytes] = []
    num_bytes = 0
    for line in lines:
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"a line has {len(line)} bytes")
        if waiting and num_bytes + len(line) + 1 > _BLOCK_BYTES:
            pieces.append(_block(first, waiting))
            waiting, num_bytes = [], 0
        waiting.append(line)
        num_bytes += len(line) + 1
    if waiting:
        pieces.append(_block(first, waiting))
    return b"".join(pieces)


def read_header(data: bytes) -> Mapping[str, object] | None:
    """The header of an object, or None for one that has none."""
    end = data.find(b"\n", 0, _MAX_HEADER_BYTES)
    try:
        header = json.loads(data[: max(0, end)])
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def read_lines(data: bytes) -> Iterator[bytes | None]:
    """The lines of an object in order, with None where a damaged block, or several, stood."""
    place = data.find(b"\n", 0, _MAX_HEADER_BYTES) + 1
    first = data[:place]
    while place < len(data):
        block = _read_block(first, data, place)
        if block is None:
            yield None
            # The next place that looks like a block; if it is none, its checksum says so.
            place = data.find(_MARKER, place + 1)
            if place < 0:
                return
            continue
        lines, place = block
        yield from lines


def _block(first: bytes, lines: list[bytes]) -> bytes:
    raw = b"\n".join(lines)
    packed = cast(bytes, pa.compress(raw, codec="zstd", asbytes=True))
    sizes = _SIZES.pack(len(raw), len(packed))
    return b"".join((_MARKER, sizes, _digest(first, sizes, packed), packed))


def _read_block(first: bytes, data: bytes, place: int) -> tuple[list[bytes], int] | None:
    """The lines of the block at ``place`` and where it ends; None if there is no sound block."""
    head = data[place : place + _HEAD_BYTES]
    if len(head) < _HEAD_BYTES or not head.startswith(_MARKER):
        return None
    sizes = head[len(_MARKER) : len(_MARKER) + _SIZES.size]
    raw_bytes, packed_bytes = _SIZES.unpack(sizes)
    end = place + _HEAD_BYTES + packed_bytes
    if end > len(data) or raw_bytes > MAX_LINE_BYTES:
        return None
    packed = data[place + _HEAD_BYTES : end]
    if _digest(first, sizes, packed) != head[-_DIGEST_BYTES:]:
        return None
    try:
        raw = cast(bytes, pa.decompress(packed, raw_bytes, codec="zstd", asbytes=True))
    except (OSError, pa.ArrowException):
        return None
    return raw.split(b"\n"), end


def _digest(first: bytes, sizes: bytes, packed: bytes) -> bytes:
    digest = hashlib.blake2b(first, digest_size=_DIGEST_BYTES)
    digest.update(sizes)
    digest.update(packed)
    return digest.digest()

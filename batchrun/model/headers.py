"""The headers of safetensors files: what a file holds, and whether all of it is there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from batchrun.errors import CheckpointError

COPY_AGAIN = "copy the checkpoint again"
"""The hint for damaged files."""

ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Sizes of the element types that weights may have; others are quantised or not weights."""

MAX_HEADER_BYTES = 100_000_000
"""The largest header that the safetensors format allows."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file: ``stored_name`` is its name there."""

    file: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        size = ELEMENT_BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by their names there; reads only the header.

    Raises :class:`CheckpointError` when the file cannot be read, is not of that format or was cut
    off.
    """
    try:
        header, data_start = _read_header_json(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}", COPY_AGAIN) from error
    tensors: dict[str, StoredTensor] = {}
    ends: dict[str, int] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(), int(end)]}:
                tensors[name] = StoredTensor(file, name, dtype, tuple(shape))
                ends[name] = end
            case _:
                raise _not_safetensors(file, f"tensor {name} has no proper entry")
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors", COPY_AGAIN)
    last = max(ends, key=ends.__getitem__)
    missing_bytes = data_start + ends[last] - file.stat().st_size
    if missing_bytes > 0:
        raise CheckpointError(
            f"{file} is cut off: {missing_bytes:,} bytes are missing at its end, "
            f"among them those of tensor {last}",
            COPY_AGAIN,
        )
    return tensors


def _read_header_json(file: Path) -> tuple[dict[str, object], int]:
    """The header and where the data begin: 8 bytes of length, so many bytes of JSON, data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_HEADER_BYTES:
            raise _not_safetensors(file, "it does not begin with a header")
        if 8 + length > size:
            raise CheckpointError(f"{file} is cut off inside its header", COPY_AGAIN)
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            raise _not_safetensors(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _not_safetensors(file, "its header is not a JSON object")
    return header, 8 + length


def _not_safetensors(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a safetensors file: {why}", COPY_AGAIN)

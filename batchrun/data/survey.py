"""Looking at a part of the input that says much of all of it: some footers, some rows.

What is drawn is drawn in proportion to its size, evenly along an order by what makes it differ
(systematic sampling), so that a few big files or long rows are never missed, and each thing drawn
stands for a known number of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random

from batchrun.data.border import scheme_of
from batchrun.data.inputs import InputFile, find_input
from batchrun.data.reader import ShardReader
from batchrun.data.schema import InputColumns, InputSchema
from batchrun.errors import BatchrunError, ShardError
from batchrun.records import Row, Shard

MAX_FOOTERS = 512
"""Footers that are read in object storage, unless all are asked for."""
MAX_WINDOW_ROWS = 1024
"""Rows of a window: as many as one stretch of a row group has that is read at a time."""
ROW_BYTES = 64
"""What a row weighs beside the bytes of its columns: every prompt has a frame."""
_READERS = 8


def draw(sizes: Sequence[float], count: int, random: Random) -> dict[int, int]:
    """Draw ``count`` times in proportion to ``sizes``, at even distances along their order.

    Gives how often each place was drawn, for those that were. Of a total of 0, nothing.
    """
    step = sum(sizes) / count
    if step <= 0:
        return {}
    hits: dict[int, int] = {}
    at, reached = random.random() * step, 0.0
    for place, size in enumerate(sizes):
        reached += size
        while at < reached:
            hits[place] = hits.get(place, 0) + 1
            at += step
    return hits


class FooterSurvey:
    """Finds an input as :func:`find_input` does, but of very many files in object storage reads
    only some footers.

    ``exact`` reads all of them; so does a ``limit``, as which rows come first must be known then.
    """

    def __init__(self, *, exact: bool = False, limit: int | None = None, seed: int = 0) -> None:
        self._reads_all = exact or limit is not None
        self._random = Random(seed)
        self._sizes: dict[str, int] = {}
        self._hits: dict[str, int] = {}

    def find(
        self, paths: str | Sequence[str], storage_options: Mapping[str, object]
    ) -> tuple[list[InputFile], list[BatchrunError]]:
        """The usable files among those chosen, and everything that is wrong with the rest."""
        return find_input(paths, storage_options, choose=self._choose)

    def _choose(self, sizes: Mapping[str, int]) -> Iterable[str]:
        self._sizes = dict(sizes)
        is_local = all(scheme_of(uri) == "file" for uri in sizes)
        if self._reads_all or is_local or len(sizes) <= MAX_FOOTERS:
            return list(sizes)
        uris = sorted(sizes, key=lambda uri: (sizes[uri], uri))
        hits = draw([sizes[uri] + 1 for uri in uris], MAX_FOOTERS, self._random)
        self._hits = {uris[place]: count for place, count in hits.items()}
        return [uri for uri in sizes if uri in self._hits]

    @property
    def num_files(self) -> int:
        """All files of the input."""
        return len(self._sizes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    @property
    def is_sampled(self) -> bool:
        """Whether only some footers have been read."""
        return bool(self._hits)

    def weight(self, file: InputFile) -> float:
        """How many files of the input ``file`` stands for."""
        if not self._hits:
            return 1.0
        total = sum(self._sizes.values()) + len(self._sizes)
        num_draws = sum(self._hits.values())
        return self._hits[file.uri] * total / (num_draws * (self._sizes[file.uri] + 1))

    def total(self, files: Sequence[InputFile], values: Sequence[float]) -> Estimate:
        """The sum of a value over all files from that of each file that was looked at."""
        if not self._hits:
            return Estimate(sum(values))
        num_draws = sum(self._hits.values())
        draws = [
            self.weight(file) * value * num_draws / self._hits[file.uri]
            for file, value in zip(files, values, strict=True)
            for _ in range(self._hits[file.uri])
        ]
        return mean_of(draws)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, and how far off it may be: in 95 of 100 samples the truth is within ``error``."""

    value: float
    error: float = 0.0

    @property
    def ratio(self) -> float:
        """The error in relation to the value."""
        return self.error / self.value if self.value else 0.0


def mean_of(draws: Sequence[float]) -> Estimate:
    """The mean of independent estimates of one number; of a single one the error is unknown and
    taken to be as large as the number."""
    count = len(draws)
    if not count:
        return Estimate(0.0)
    mean = sum(draws) / count
    if count == 1:
        return Estimate(mean, mean)
    variance = sum((draw - mean) ** 2 for draw in draws) / (count - 1)
    return Estimate(mean, 2 * float((variance / count) ** 0.5))


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of one row group that are read at a time. ``size`` is what the footer says of their
    prompt columns, in bytes, and :data:`ROW_BYTES` a row; it stands for ``weight`` such windows."""

    file: InputFile
    row_group: int
    first_row: int
    num_rows: int
    size: float
    weight: float = 1.0

    @property
    def shard(self) -> Shard:
        """The rows as the reader wants them."""
        return Shard(
            number=0,
            path=self.file.path,
            uri=self.file.uri,
            size_bytes=self.file.size_bytes,
            fingerprint=self.file.fingerprint,
            row_groups=(self.row_group,),
            first_row=self.first_row,
            num_rows=self.num_rows,
        )


def cut_windows(
    files: Sequence[InputFile],
    columns: InputColumns,
    weights: Sequence[float],
    limit: int | None = None,
) -> list[Window]:
    """All rows of ``files`` (the first ``limit`` of them) as windows, in order."""
    windows: list[Window] = []
    left = limit
    for file, weight in zip(files, weights, strict=True):
        places = [file.schema.get_field_index(name) for name in columns.values]
        begin = 0
        for number, group in enumerate(file.row_groups):
            num_bytes = sum(group.column_bytes[place] for place in places if place >= 0)
            for start in range(0, group.num_rows, MAX_WINDOW_ROWS):
                if left is not None and left <= 0:
                    return windows
                rows = min(MAX_WINDOW_ROWS, group.num_rows - start)
                if left is not None:
                    rows = min(rows, left)
                    left -= rows
                size = rows * (ROW_BYTES + num_bytes / group.num_rows)
                windows.append(Window(file, number, begin + start, rows, size, weight))
            begin += group.num_rows
    return windows


def read_windows(
    windows: Sequence[Window],
    columns: InputColumns,
    storage_options: Mapping[str, object] | None = None,
) -> list[list[Row] | ShardError]:
    """The rows of each window with the columns that prompts are made of, or why it cannot be read.

    Raises StorageError when storage fails.
    """
    if not windows:
        return []
    asked = replace(columns, id=None, carried=(), answer=None)
    files = {window.file.uri: window.file for window in windows}
    schema = InputSchema.of(list(files.values()), asked)

    def read(window: Window) -> list[Row] | ShardError:
        try:
            with ShardReader(window.shard, schema, storage_options) as reader:
                return list(reader)
        except ShardError as error:
            return error

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, windows))

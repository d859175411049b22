"""Streaming one shard's rows out of object storage in bounded memory."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import length_hint
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.data.border import Fault, Role, classify, filesystem, translate
from batchrun.data.footers import ahead_of, open_parquet, open_ranged
from batchrun.data.inputs import fingerprint
from batchrun.data.schema import InputSchema
from batchrun.data.types import as_bytes, convert, decode, is_valid, with_valid_text
from batchrun.errors import BatchrunError, InputError, ShardError
from batchrun.records import ErrorKind, Row, RowError, Shard
from batchrun.rows import Rows

_MAX_BATCH_ROWS = 256
_MAX_BATCH_BYTES = 16 << 20
# So much is fetched ahead in few large requests: the next row groups that fit together. One that is
# bigger is fetched as it is decoded.
_MAX_PRE_BUFFER_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20

_Cut = tuple[int, pa.RecordBatch]  # the ordinal of its first row, and the batch


class ShardReader:
    """An iterator over the rows of one shard, with its carried columns kept for the writer.

    Rows come in input order, each exactly once. Where only some ``rows`` are asked for, only they
    come, row groups without them are not read, and no carried column is kept. The input file is
    pinned: its fingerprint is compared before and after, and object storage is asked for that very
    version. Raises :class:`~batchrun.errors.ShardError`, naming the file, for one that changed or
    is damaged, and StorageError when storage fails.
    """

    def __init__(
        self,
        shard: Shard,
        schema: InputSchema,
        storage_options: Mapping[str, object] | None = None,
        rows: Rows | None = None,
    ) -> None:
        self.shard = shard
        self._keeps_carried = rows is None
        self._wanted = Rows.all(shard.num_rows) if rows is None else rows
        self._schema = schema
        self._carried: deque[pa.RecordBatch] = deque()
        self._rows: Iterator[Row] = iter(())
        self._num_read = 0
        self._at_end = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shard-reader")
        self._fs, self._location = filesystem(shard.uri, storage_options, Role.INPUT)
        self._source: BinaryIO | None = None
        self._batches: Iterator[_Cut] = iter(())
        # Last: the reading thread sets some of the above.
        self._next: Future[_Cut | None] = self._pool.submit(self._first_batch)

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        """The next row. A record that is not valid UTF-8 has its ``error`` set."""
        while True:
            row = next(self._rows, None)
            if row is not None:
                return row
            if self._at_end:
                raise StopIteration
            self._advance()

    @property
    def coming(self) -> Future[_Cut | None] | None:
        """What the next row would have to be waited for; None where it is there, or the end."""
        if self._at_end or length_hint(self._rows) or self._next.done():
            return None
        return self._next

    def take_carried(self, num_rows: int) -> pa.Table:
        """The carried columns of the next ``num_rows`` rows, in input order; each once.

        Only rows that have been read can be taken.
        """
        taken: list[pa.RecordBatch] = []
        missing = num_rows
        while missing > 0 and self._carried:
            batch = self._carried.popleft()
            if batch.num_rows > missing:
                self._carried.appendleft(batch.slice(missing))
                batch = batch.slice(0, missing)
            taken.append(batch)
            missing -= batch.num_rows
        if missing and self._schema.columns.carried:
            raise BatchrunError(f"shard {self.shard.name}: {missing} carried rows were not read")
        return pa.Table.from_batches(taken, self._schema.carried)

    @property
    def held_bytes(self) -> int:
        """Memory of the carried columns that have been read and not been taken.

        May be asked while another thread takes them: a part is finished beside the engine.
        """
        return sum(batch.nbytes for batch in self._carried.copy())

    def close(self) -> None:
        """Stop reading ahead and close the file. May be called twice."""
        self._at_end = True
        self._rows = iter(())
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._source is not None:
            self._source.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self) -> None:
        """Take the batch that was read ahead, and read the one after it ahead."""
        try:
            cut = self._next.result()
            if cut is None:
                self._at_end = True
                self._check_complete()
                return
            self._next = self._pool.submit(lambda: next(self._batches, None))
            first, batch = cut
            self._num_read += batch.num_rows
            self._keep_carried(batch)
        except (ShardError, InputError) as error:
            raise ShardError(str(error).removeprefix("input: "), error.hint) from error
        except BatchrunError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            text = " ".join(str(error).split())[:300]
            raise ShardError(f"{self.shard.uri} is damaged ({text})", "replace it") from error
        self._rows = iter(self._read_rows(batch, first))

    def _first_batch(self) -> _Cut | None:
        """Open the pinned file and read the first batch; runs on the reading thread."""
        self._check_pin()
        if not self._wanted:
            return None
        source = open_ranged(self._fs, self._location, block_bytes=_BLOCK_BYTES)
        self._source = source
        guarded = _GuardedFile(source, self.shard.uri)
        parquet = open_parquet(guarded, self.shard.uri)  # type: ignore[arg-type]
        self._batches = self._cut(parquet, guarded)
        return next(self._batches, None)

    def _fetches(
        self, parquet: pq.ParquetFile, groups: list[int]
    ) -> Iterator[tuple[list[int], bool]]:
        """Row groups to fetch together, in order, and whether they fit in the memory for that."""
        columns = set(self._schema.columns.all)
        leaves = [
            index
            for index in range(parquet.metadata.num_columns)
            if parquet.schema.column(index).path.partition(".")[0] in columns
            or parquet.schema.column(index).path in columns
        ]
        together: list[int] = []
        num_bytes = 0
        for number in groups:
            group = parquet.metadata.row_group(number)
            size = sum(max(0, group.column(index).total_compressed_size) for index in leaves)
            if together and num_bytes + size > _MAX_PRE_BUFFER_BYTES:
                yield together, num_bytes <= _MAX_PRE_BUFFER_BYTES
                together, num_bytes = [], 0
            together.append(number)
            num_bytes += size
        if together:
            yield together, num_bytes <= _MAX_PRE_BUFFER_BYTES

    def _cut(self, parquet: pq.ParquetFile, source: _GuardedFile) -> Iterator[_Cut]:
        """Batches of exactly the wanted rows in the types of the run, each with the ordinal of its
        first row."""
        metadata = parquet.metadata
        groups = self.shard.row_groups
        before = sum(metadata.row_group(number).num_rows for number in range(groups[0]))
        begin = before - self.shard.first_row  # as an ordinal, so negative where rows are skipped
        wanted = self._wanted.ranges
        read: list[int] = []
        places: list[tuple[int, int]] = []  # of the groups that are read: first ordinal, rows
        for number in groups:
            num_rows = metadata.row_group(number).num_rows
            if any(first < begin + num_rows and end > begin for first, end in wanted):
                read.append(number)
                places.append((begin, num_rows))
            begin += num_rows
        num_bytes = sum(metadata.row_group(number).total_byte_size for number in read)
        row_bytes = max(1, num_bytes // max(1, sum(num_rows for _, num_rows in places)))
        left = len(self._wanted)
        ordinals = _Ordinals(places)
        size = max(1, min(_MAX_BATCH_ROWS, _MAX_BATCH_BYTES // row_bytes))
        for batch in self._decode(parquet, source, read, size):
            for first, piece in ordinals.split(batch):
                here = Rows.of_ranges([(max(0, first), first + piece.num_rows)]) & self._wanted
                for start, end in here.ranges:
                    yield start, piece.slice(start - first, end - start)
                left -= len(here)
            if left <= 0:
                return

    def _decode(
        self, parquet: pq.ParquetFile, source: _GuardedFile, groups: list[int], batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        """The row groups' batches, of a fetch after the other."""
        for together, fits in self._fetches(parquet, groups):
            yield from (ahead_of(parquet, source) if fits else parquet).iter_batches(
                batch_size=batch_size,
                row_groups=together,
                columns=list(self._schema.columns.all),
                use_threads=False,
            )

    def _keep_carried(self, batch: pa.RecordBatch) -> None:
        schema = self._schema.carried
        if len(schema) and self._keeps_carried:
            columns = [
                convert(with_valid_text(batch.column(field.name)), field.type) for field in schema
            ]
            self._carried.append(pa.RecordBatch.from_arrays(columns, schema=schema))

    def _read_rows(self, batch: pa.RecordBatch, first: int) -> list[Row]:
        """The batch's rows with Python values; ``first`` is the ordinal of its first row."""
        columns = self._schema.columns
        errors: dict[int, RowError] = {}
        values = {name: _python_values(name, batch.column(name), errors) for name in columns.values}
        ids: list[Any] = [None] * batch.num_rows
        if columns.id is not None:
            ids = _python_values(columns.id, batch.column(columns.id), {})
        answers: list[Any] = [None] * batch.num_rows
        if columns.answer is not None:
            # One that cannot be read is none; the row's prompt has nothing to do with it.
            answers = _python_values(columns.answer, batch.column(columns.answer), {})
        rows: list[Row] = []
        for place in range(batch.num_rows):
            index = self.shard.first_row + first + place
            own = ids[place]
            rows.append(
                Row(
                    ordinal=first + place,
                    index=index,
                    # A record whose id is null or no text is still told from the others.
                    id=f"{self.shard.path}:{index}" if own is None else str(own),
                    values={name: column[place] for name, column in values.items()},
                    error=errors.get(place),
                    answer=answers[place],
                )
            )
        return rows

    def _check_pin(self) -> None:
        """Raise unless the input file is still the one that was planned."""
        try:
            now = fingerprint(self._fs, self._location)
        except Exception as error:
            if classify(error) is not Fault.ABSENT:
                raise translate(error, Role.INPUT, self.shard.uri) from error
            raise ShardError(f"{self.shard.uri} is gone", "put the file back") from error
        if now != self.shard.fingerprint:
            raise ShardError(f"{self.shard.uri} changed after the run was planned", _CHANGED_HINT)

    def _check_complete(self) -> None:
        if self._num_read != len(self._wanted):
            raise ShardError(
                f"{self.shard.uri} gave {self._num_read} rows where its footer says "
                f"{len(self._wanted)}",
                "write the file again",
            )
        self._check_pin()


class _Ordinals:
    """Tells the ordinals of batches that come from row groups with gaps between them."""

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        """``places`` are the first ordinal and the number of rows of each group that is read."""
        self._places = deque(places)

    def split(self, batch: pa.RecordBatch) -> Iterator[_Cut]:
        """The next batch in pieces, each of rows that follow one another."""
        start = 0
        while start < batch.num_rows and self._places:
            first, left = self._places.popleft()
            taken = min(left, batch.num_rows - start)
            if taken:
                yield first, batch.slice(start, taken)
            start += taken
            if taken < left:
                self._places.appendleft((first + taken, left - taken))


_CHANGED_HINT = "input files must not change while a run reads them; submit again when they rest"


def _python_values(name: str, column: pa.Array, errors: dict[int, RowError]) -> list[Any]:
    """The column as Python values; rows that have none are None with a reason in ``errors``."""
    if is_valid(column):
        try:
            return list(column.to_pylist())
        except (ValueError, OverflowError, pa.ArrowException):
            pass  # one value of it is beyond what Python can say; the others are read below
    kind = column.type
    raw = convert(column, as_bytes(kind))
    values: list[Any] = []
    for place in range(len(raw)):
        try:
            values.append(decode(raw[place].as_py(), kind))
        except UnicodeDecodeError:
            errors.setdefault(place, _unreadable(f"column {name!r} is not valid UTF-8"))
            values.append(None)
        except (ValueError, OverflowError, pa.ArrowException) as error:
            errors.setdefault(place, _unreadable(f"column {name!r} cannot be read ({error})"))
            values.append(None)
    return values


def _unreadable(message: str) -> RowError:
    return RowError(ErrorKind.INVALID_PROMPT, message)


class _GuardedFile(io.RawIOBase):
    """A file whose errors are already this package's when they come out of Arrow's readers.

    So a lost connection is told from a damaged page.
    """

    def __init__(self, source: BinaryIO, uri: str) -> None:
        super().__init__()
        self._source = source
        self._uri = uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()

    def read(self, size: int = -1) -> bytes:
        try:
            return self._source.read(size)
        except Exception as error:
            if classify(error) in {Fault.EXISTS, Fault.ABSENT}:
                # The version that was pinned is no longer there (If-Match failed).
                raise ShardError(f"{self._uri} changed while it was read", _CHANGED_HINT) from error
            raise translate(error, Role.INPUT, self._uri) from error

"""Writing one shard's part: in input order, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.data.parts import CALLS_COLUMN, MAJORITY_KEY, RUN_KEY, is_empty
from batchrun.data.reader import ShardReader
from batchrun.data.spool import Spool
from batchrun.data.traces import TraceWriter
from batchrun.data.types import repeat
from batchrun.errors import BatchrunError, StorageError
from batchrun.records import Completion, Counts, ToolCall, row_scores
from batchrun.scores import Scores
from batchrun.tools import is_malformed

# A row group is written when this many rows, or this much text, stand ready in order.
_FLUSH_ROWS = 8192
_FLUSH_BYTES = 16 << 20
_TRACE_BYTES_PER_TOKEN = 40  # an id in a tuple, and perhaps its log-probability


@dataclass(frozen=True, slots=True)
class PartFormat:
    """What parts of a run look like, the same for all of them.

    ``run`` is the run's id; ``metadata`` the rest of the schema metadata (``batchrun.version``
    and so on). With ``traces`` the sampled tokens are kept in a file beside each part.
    """

    run: str
    n: int = 1
    logprobs: bool = False
    correct: bool = False
    tool_calls: bool = False
    compression: str = "zstd"
    traces: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)

    def schema(self, carried: pa.Schema) -> pa.Schema:
        """The columns of a part: ours around the carried ones."""
        fields = [
            pa.field("id", pa.string()),
            pa.field("sample", pa.int32()),
            *carried,
            pa.field("completion", pa.string()),
            pa.field("reasoning", pa.string()),
            pa.field("finish_reason", pa.string()),
            pa.field("prompt_tokens", pa.int32()),
            pa.field("reasoning_tokens", pa.int32()),
            pa.field("completion_tokens", pa.int32()),
            pa.field("thinking_budget_hit", pa.bool_()),
            pa.field("error", pa.string()),
        ]
        # Items are named as Parquet names them, so that the file reads back with the same schema.
        if self.tool_calls:
            call = pa.struct([("name", pa.string()), ("arguments", pa.string())])
            fields.append(pa.field(CALLS_COLUMN, pa.list_(pa.field("element", call))))
        if self.logprobs:
            item = pa.field("element", pa.float32())
            fields.append(pa.field("logprobs", pa.list_(item)))
        if self.correct:
            fields.append(pa.field("correct", pa.bool_()))
        return pa.schema(fields, metadata={**self.metadata, RUN_KEY: self.run})

    def count(self, row: Sequence[Completion]) -> Counts:
        """The counts of one row from all its samples, in their order."""
        malformed = 0
        if self.tool_calls:
            malformed = sum(is_malformed(item.completion, item.tool_calls) for item in row)
        return Counts(
            rows=1,
            failed_rows=int(any(item.error is not None for item in row)),
            prompt_tokens=sum(item.prompt_tokens for item in row),
            reasoning_tokens=sum(item.reasoning_tokens for item in row),
            completion_tokens=sum(item.completion_tokens for item in row),
            thinking_budget_hits=sum(item.thinking_budget_hit for item in row),
            scores=row_scores(row) if self.correct else None,
            malformed_tool_calls=malformed,
            empty=sum(is_empty(item.completion, bool(item.tool_calls)) for item in row),
        )


@dataclass(frozen=True, slots=True)
class PartFile:
    """A finished part on local disk, verified and ready to publish."""

    path: Path
    size_bytes: int
    sha256: str
    num_rows: int
    counts: Counts
    traces: Path | None = None


class PartWriter:
    """Takes completions in any order and writes them in input order to a local file.

    Those that a journal holds are only named, and looked up there when their turn has come: however
    many they are, and however long a row before them takes, they need no memory.

    Only :meth:`finish` gives the file away, and only when every sample of every row is in it: an
    exception on the way can never leave a valid file of half the rows where somebody reads it.
    """

    def __init__(
        self,
        reader: ShardReader,
        part_format: PartFormat,
        folder: Path | None = None,
        journaled: Mapping[tuple[int, int], Completion] | None = None,
    ) -> None:
        """``journaled`` are the finished samples of the shard's journal, by (ordinal, sample).

        Raises StorageError when the local disk is full.
        """
        self._reader = reader
        self._journaled = {} if journaled is None else journaled
        self._format = part_format
        self._schema = part_format.schema(reader.take_carried(0).schema)
        # None: it is in the journal.
        self._waiting: dict[int, dict[int, Completion | None]] = {}
        self._ready: list[Completion] = []
        self._ready_bytes = 0
        self._num_ordered = 0  # rows in order so far, ready or written
        self._num_written = 0
        self._counts = Counts()
        try:
            self._spool = Spool(folder)
            self._path = self._spool.path / "part.parquet"
            self._writer = pq.ParquetWriter(
                self._path, self._schema, compression=part_format.compression
            )
            traces = self._spool.path / "traces.parquet"
            self._traces = TraceWriter(traces) if part_format.traces else None
        except OSError as error:
            raise self._disk_error(error) from error

    @property
    def num_missing(self) -> int:
        """Rows of the shard that do not have all their samples yet."""
        return (
            self._reader.shard.num_rows
            - self._num_ordered
            - sum(len(samples) == self._format.n for samples in self._waiting.values())
        )

    @property
    def is_complete(self) -> bool:
        """Whether every sample of every row has been added."""
        return self._num_ordered == self._reader.shard.num_rows

    def add(self, completion: Completion) -> None:
        """Take one sample of one row; each exactly once."""
        self._take(completion.ordinal, completion.sample, completion)

    def add_journaled(self, ordinal: int, sample: int) -> None:
        """Take a sample from the journal; each exactly once, and only of rows that are read."""
        if (ordinal, sample) not in self._journaled:
            raise BatchrunError(f"row {ordinal}, sample {sample} is not in the journal")
        self._take(ordinal, sample, None)

    def _take(self, ordinal: int, sample: int, completion: Completion | None) -> None:
        name = f"row {ordinal}, sample {sample} of {self._reader.shard.name}"
        in_shard = 0 <= ordinal < self._reader.shard.num_rows
        if not in_shard or not 0 <= sample < self._format.n:
            raise BatchrunError(f"{name} is not of this part")
        samples = self._waiting.setdefault(ordinal, {})
        if ordinal < self._num_ordered or sample in samples:
            raise BatchrunError(f"{name} was added twice")
        samples[sample] = completion
        while len(self._waiting.get(self._num_ordered, ())) == self._format.n:
            self._order(self._num_ordered, self._waiting.pop(self._num_ordered))
            if len(self._ready) >= _FLUSH_ROWS or self._ready_bytes >= _FLUSH_BYTES:
                self._flush()

    def finish(self) -> PartFile:
        """Close and verify the file; raises if a row is missing or the file is not right."""
        shard = self._reader.shard
        if not self.is_complete:
            raise BatchrunError(f"shard {shard.name}: {self.num_missing} rows are missing")
        self._flush()
        if self._format.correct:
            scores = self._counts.scores or Scores()
            self._writer.add_key_value_metadata({MAJORITY_KEY: str(scores.majority_correct)})
        try:
            self._writer.close()
            if self._traces is not None:
                self._traces.close()
        except OSError as error:
            raise self._disk_error(error) from error
        num_rows = shard.num_rows * self._format.n
        with pq.ParquetFile(self._path) as written:
            right = written.metadata.num_rows == num_rows and written.schema_arrow.equals(
                self._schema
            )
        if not right:
            raise BatchrunError(f"shard {shard.name}: the part on local disk is not what was put")
        return PartFile(
            path=self._path,
            size_bytes=self._path.stat().st_size,
            sha256=_sha256(self._path),
            num_rows=num_rows,
            counts=self._counts,
            traces=None if self._traces is None else self._traces.path,
        )

    def close(self) -> None:
        """Give up the file and everything in it. May be called twice, and after publishing."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()  # it is deleted anyway
            if self._traces is not None:
                self._traces.close()
        self._spool.remove()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self, ordinal: int, samples: Mapping[int, Completion | None]) -> None:
        row = [
            samples[number] or self._journaled[ordinal, number] for number in range(self._format.n)
        ]
        self._num_ordered += 1
        self._counts += self._format.count(row)
        self._ready.extend(row)
        self._ready_bytes += sum(
            len(sample.completion or "")
            + len(sample.reasoning or "")
            + sum(len(call.arguments) for call in sample.tool_calls or ())
            for sample in row
        )
        if self._traces is not None:
            self._ready_bytes += sum(
                _TRACE_BYTES_PER_TOKEN * (sample.reasoning_tokens + sample.completion_tokens)
                for sample in row
            )

    def _flush(self) -> None:
        if not self._ready:
            return
        rows = self._ready
        carried = self._reader.take_carried(len(rows) // self._format.n)
        own: dict[str, list[object]] = {
            "id": [_text(row.id) for row in rows],
            "sample": [row.sample for row in rows],
            "completion": [_text(row.completion) for row in rows],
            "reasoning": [_text(row.reasoning) for row in rows],
            "finish_reason": [row.finish_reason.value for row in rows],
            "prompt_tokens": [row.prompt_tokens for row in rows],
            "reasoning_tokens": [row.reasoning_tokens for row in rows],
            "completion_tokens": [row.completion_tokens for row in rows],
            "thinking_budget_hit": [row.thinking_budget_hit for row in rows],
            "error": [_text(row.error) for row in rows],
            CALLS_COLUMN: [_calls(row.tool_calls) for row in rows],
            "logprobs": [row.logprobs for row in rows],
            "correct": [row.verdict and row.verdict.correct for row in rows],
        }
        columns = [
            pa.chunked_array([pa.array(own[item.name], type=item.type)])
            if item.name in own
            else repeat(carried.column(item.name), self._format.n)
            for item in self._schema
        ]
        try:
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
            if self._traces is not None:
                self._traces.write(rows)
        except OSError as error:
            raise self._disk_error(error) from error
        self._num_written += len(rows)
        self._ready, self._ready_bytes = [], 0

    def _disk_error(self, error: OSError) -> StorageError:
        return StorageError(
            f"the local disk cannot hold the part of shard {self._reader.shard.name} ({error})",
            "make room in the folder for temporary files (TMPDIR) and submit again to resume",
        )


def _calls(calls: Sequence[ToolCall] | None) -> list[dict[str, str]] | None:
    return None if calls is None else [asdict(call) for call in calls]


def _text(text: str | None) -> str | None:
    """``text`` such as Arrow can hold: no half of a surrogate pair, which is no character."""
    if text is None or text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()

"""The sampled tokens of a run, beside its parts: for other runs of the same rows to take over.

One file a shard, with one row for each sample in the order of the part. It may be lost at any time:
whoever reads it generates again what it does not hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.data.layout import traces_path
from batchrun.data.store import Store
from batchrun.records import Completion, Generated, Shard

_BATCH_ROWS = 256
_SCHEMA = pa.schema(
    [
        pa.field("token_ids", pa.list_(pa.field("element", pa.int32()))),  # null: the row failed
        pa.field("logprobs", pa.list_(pa.field("element", pa.float32()))),
        pa.field("closed_after", pa.int32()),
    ]
)


class TraceWriter:
    """Writes a local file of traces."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="zstd")

    def write(self, completions: Sequence[Completion]) -> None:
        """Append the traces of completions, which come in the order of the part."""
        traces = [item.generated for item in completions]
        columns = {
            "token_ids": [trace and trace.token_ids for trace in traces],
            "logprobs": [trace and trace.logprobs for trace in traces],
            "closed_after": [trace and trace.closed_after for trace in traces],
        }
        self._writer.write_table(pa.table(columns, schema=_SCHEMA))

    def close(self) -> None:
        """End the file. May be called twice."""
        self._writer.close()


def read_traces(store: Store, run: str, shard: Shard, n: int) -> Iterator[Generated | None]:
    """The traces of a shard's samples in the order of its part, n a row.

    None for a sample that has none; ends early where the run kept no traces, or the file is
    damaged. Holds a few hundred at a time.
    """
    path = traces_path(run, shard)
    if store.info(path) is None:
        return
    with store.open_file(path) as source, contextlib.suppress(pa.ArrowException, OSError):
        with pq.ParquetFile(source) as parquet:
            if parquet.metadata.num_rows != shard.num_rows * n:
                return
            for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
                if not batch.schema.equals(_SCHEMA):
                    return
                for ids, logprobs, closed_after in zip(
                    *(column.to_pylist() for column in batch.columns), strict=True
                ):
                    yield (
                        None
                        if ids is None
                        else Generated(
                            tuple(ids), None if logprobs is None else tuple(logprobs), closed_after
                        )
                    )

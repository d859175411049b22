"""Kept tokens: what was written comes back in order; what is damaged is not believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from batchrun.data.layout import traces_path
from batchrun.data.store import Store
from batchrun.data.traces import TraceWriter, read_traces
from batchrun.records import Completion, FinishReason, Generated, Shard

SHARD = Shard(3, "a.parquet", "file:///a.parquet", 100, "f", (0,), 0, 300)
TRACES = [
    None if i % 7 == 6 else Generated(tuple(range(i % 5)), (-0.5,) * (i % 5), i % 3 or None)
    for i in range(600)
]


def write(path: Path, traces: list[Generated | None]) -> None:
    """A file of traces, in pieces."""
    writer = TraceWriter(path)
    completions = [
        Completion(i // 2, i % 2, str(i), "x", None, FinishReason.STOP, generated=trace)
        for i, trace in enumerate(traces)
    ]
    writer.write(completions[:10])
    writer.write(completions[10:])
    writer.close()
    writer.close()


def test_traces_come_back_in_the_order_of_the_part(tmp_path: Path) -> None:
    """Two samples a row, failed ones as None; also under another number of the shard."""
    store = Store.open(str(tmp_path))
    write(tmp_path / "t", TRACES)
    store.put_if_absent(traces_path("r", SHARD), tmp_path / "t", "token")
    assert list(read_traces(store, "r", SHARD, 2)) == TRACES
    assert list(read_traces(store, "r", replace(SHARD, number=9), 2)) == TRACES
    assert list(read_traces(store, "other", SHARD, 2)) == []
    assert list(read_traces(store, "r", replace(SHARD, fingerprint="g"), 2)) == []


def test_a_file_that_is_not_right_ends_early(tmp_path: Path) -> None:
    """Cut, empty, of other rows or of other columns: the reader generates them again."""
    store = Store.open(str(tmp_path))
    path = tmp_path / traces_path("r", SHARD)
    path.parent.mkdir(parents=True)
    write(path, TRACES[:-1])
    assert list(read_traces(store, "r", SHARD, 2)) == []
    write(path, TRACES)
    data = path.read_bytes()
    for damaged in (b"", data[: len(data) // 2], data[:4] + bytes(len(data) - 12) + data[-8:]):
        path.write_bytes(damaged)
        assert list(read_traces(store, "r", SHARD, 2)) == []

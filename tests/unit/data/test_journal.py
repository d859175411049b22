"""A journal gives back what was written, or less; never anything else."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.data import blocks, journal
from batchrun.data.blocks import read_lines, to_bytes
from batchrun.data.entries import read_entry, write_finished, write_running
from batchrun.data.journal import (
    Journal,
    JournalWriter,
    Running,
    delete_journal,
    read_journal,
)
from batchrun.data.layout import journal_folder
from batchrun.data.store import Store
from batchrun.errors import StorageError
from batchrun.records import Completion, FinishReason, Generated, Lease, Shard, ToolCall
from batchrun.rows import Rows
from batchrun.scores import Verdict

RUN = "0123456789abcdef"
N = 2
SHARD = Shard(3, "a.parquet", "/in/a.parquet", 100, "etag", (0,), 0, 6)


def lease(attempt: str = "000001-000001", shard: Shard = SHARD) -> Lease:
    """A lease of the shard under test."""
    return Lease(shard, 1, attempt, Rows.all(shard.num_rows))


def done(ordinal: int, sample: int = 0, text: str | None = None) -> Completion:
    """A finished sample whose text tells which one it is."""
    text = f"row {ordinal}, sample {sample}" if text is None else text
    return Completion(
        ordinal, sample, f"a.parquet:{ordinal}", text, None, FinishReason.STOP, 5, 0, 3
    )


def tail(
    ordinal: int,
    at: int,
    until: int,
    sample: int = 0,
    closed_after: int | None = None,
    logprobs: bool = False,
) -> Running:
    """The tokens [at, until) of a sample that still runs; token i of row r is 100 r + i."""
    token_ids = tuple(100 * ordinal + place for place in range(at, until))
    values = tuple(-float(place) for place in range(at, until)) if logprobs else None
    return Running(ordinal, sample, at, Generated(token_ids, values, closed_after))


texts = st.text(st.characters(), max_size=12)
counts = st.integers(0, 1 << 40)
numbers = st.floats(allow_nan=False)


@st.composite
def samples(draw: st.DrawFn) -> Completion:
    """Any finished sample."""
    error = draw(st.none() | texts)
    token_ids = draw(st.lists(st.integers(0, (1 << 32) - 1), max_size=5))
    logprobs = draw(st.none() | st.just(tuple(draw(numbers) for _ in token_ids)))
    call = st.builds(ToolCall, texts, texts)
    return Completion(
        ordinal=draw(st.integers(0, 5)),
        sample=draw(st.integers(0, 1)),
        id=draw(texts),
        completion=None if error is not None else draw(texts),
        reasoning=None if error is not None else draw(st.none() | texts),
        finish_reason=FinishReason.ERROR if error is not None else FinishReason.STOP,
        prompt_tokens=draw(counts),
        reasoning_tokens=draw(counts),
        completion_tokens=draw(counts),
        thinking_budget_hit=draw(st.booleans()),
        error=error,
        logprobs=draw(st.none() | st.lists(st.none() | numbers, max_size=3).map(tuple)),
        verdict=draw(st.none() | st.builds(Verdict, st.none() | st.booleans(), st.none() | texts)),
        generated=draw(
            st.none()
            | st.just(Generated(tuple(token_ids), logprobs, draw(st.none() | st.integers(0, 9))))
        ),
        tool_calls=draw(st.none() | st.lists(call, max_size=2).map(tuple)),
    )


@given(samples())
def test_every_field_of_a_sample_comes_back(completion: Completion) -> None:
    """Lone surrogates, empty texts, infinities, null columns: what is read is what was written."""
    line = write_finished(completion)
    assert b"\n" not in line
    assert read_entry(line) == completion


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_journal_from_flush_to_merge(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Finished samples and running ones come back, on disk and on S3; deleted, they are gone."""
    store = Store.open(str(tmp_path))
    if kind == "s3":
        server = request.getfixturevalue("s3_server")
        store = Store.open(f"{server.url}/out", server.storage_options)
    writer = JournalWriter(store, RUN, lease())
    writer.flush([done(0), done(0, 1)], [tail(1, 0, 3)])
    writer.flush([], [])
    writer.flush([done(4)], [tail(1, 3, 5), tail(2, 0, 1)])
    names = [item.path.rpartition("/")[2] for item in store.list(journal_folder(RUN, 3))]
    assert names == ["000001-000001-0000.zst", "000001-000001-0001.zst"]
    found = read_journal(store, RUN, SHARD, N)
    assert dict(found.finished) == {(0, 0): done(0), (0, 1): done(0, 1), (4, 0): done(4)}
    assert dict(found.running) == {
        (1, 0): Generated((100, 101, 102, 103, 104)),
        (2, 0): Generated((200,)),
    }
    assert (found.num_damaged, (0, 0) in found.finished, (1, 0) in found.finished) == (
        0,
        True,
        False,
    )
    with pytest.raises(KeyError):
        found.finished[1, 0]
    assert delete_journal(store, RUN, [2, 3]) == 2
    assert read_journal(store, RUN, SHARD, N) == Journal()


def test_the_first_record_of_a_sample_counts(tmp_path: Path) -> None:
    """First means attempt, then number: not the order of the names, nor of arrival."""
    store = Store.open(str(tmp_path))
    JournalWriter(store, RUN, lease("000002-000001")).flush([done(0, text="late"), done(1)])
    first = JournalWriter(store, RUN, lease("000001-000009"))
    for number in range(12):
        first.flush([done(0, text=f"early {number}")])
    found = read_journal(store, RUN, SHARD, N)
    assert {key: item.completion for key, item in found.finished.items()} == {
        (0, 0): "early 0",
        (1, 0): "row 1, sample 0",
    }
    assert list(found.epochs) == [1, 2, 0, 0, 0, 0]


def test_the_longest_chain_of_one_attempt_counts(tmp_path: Path) -> None:
    """Tokens of two attempts are not mixed, and a finished sample runs no more."""
    store = Store.open(str(tmp_path))
    first = JournalWriter(store, RUN, lease("000001-000001"))
    first.flush([], [tail(0, 0, 4, logprobs=True), tail(1, 0, 2), tail(2, 0, 2)])
    second = JournalWriter(store, RUN, lease("000001-000002"))
    second.flush([done(2)], [tail(0, 0, 2), tail(1, 0, 2)])
    second.flush([], [tail(1, 2, 6, closed_after=3), tail(0, 2, 3)])
    found = read_journal(store, RUN, SHARD, N)
    assert dict(found.running) == {
        (0, 0): Generated((0, 1, 2, 3), (-0.0, -1.0, -2.0, -3.0)),
        (1, 0): Generated(tuple(range(100, 106)), None, 3),
    }


def test_what_follows_a_gap_is_not_taken(tmp_path: Path) -> None:
    """A chain ends where an object is missing, also when later ones are there."""
    store = Store.open(str(tmp_path))
    writer = JournalWriter(store, RUN, lease())
    for at in range(0, 8, 2):
        writer.flush([], [tail(0, at, at + 2), tail(1, 0, at + 1)])
    store.delete([f"{journal_folder(RUN, 3)}/000001-000001-0001.zst"])
    found = read_journal(store, RUN, SHARD, N)
    assert found.running[0, 0] == Generated((0, 1))
    assert found.running[1, 0] == Generated(tuple(range(100, 107))), "whole records have no gap"


def test_what_an_attempt_began_anew_takes_the_place_of_what_it_had(tmp_path: Path) -> None:
    """Tokens that the engine failed on are not gone on from, nor mixed with those after them."""
    store = Store.open(str(tmp_path))
    writer = JournalWriter(store, RUN, lease())
    writer.flush([], [tail(0, 0, 4)])
    anew = Running(0, 0, 0, Generated((7, 8)))
    writer.flush([], [anew])
    writer.flush([], [replace(anew, at=2, generated=Generated((9,)))])
    assert dict(read_journal(store, RUN, SHARD, N).running) == {(0, 0): Generated((7, 8, 9))}


def test_a_flush_whose_outcome_is_unknown_is_brought_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one goes under a new number, and what arrived twice counts once."""
    store = Store.open(str(tmp_path))
    writer = JournalWriter(store, RUN, lease())
    put = store.put_if_absent

    def lose_the_answer(*args: object) -> bool:
        put(*args)  # type: ignore[arg-type]
        raise StorageError("away")

    monkeypatch.setattr(store, "put_if_absent", lose_the_answer)
    with pytest.raises(StorageError):
        writer.flush([done(0)], [tail(1, 0, 3)])
    monkeypatch.setattr(store, "put_if_absent", put)
    writer.flush([done(0), done(2)], [tail(1, 0, 5)])
    writer.flush([], [tail(1, 5, 6)])
    found = read_journal(store, RUN, SHARD, N)
    assert list(found.finished) == [(0, 0), (2, 0)]
    assert found.running[1, 0].token_ids == tuple(range(100, 106))
    assert len(store.list(journal_folder(RUN))) == 3


def test_another_object_under_the_name_is_left_alone(tmp_path: Path) -> None:
    """Whoever else wrote under this attempt keeps what is there; ours goes beside it."""
    store = Store.open(str(tmp_path))
    JournalWriter(store, RUN, lease()).flush([done(0)])
    JournalWriter(store, RUN, lease()).flush([done(1)])
    assert list(read_journal(store, RUN, SHARD, N).finished) == [(0, 0), (1, 0)]


@pytest.mark.parametrize(
    "changed",
    [
        replace(SHARD, fingerprint="another"),
        replace(SHARD, num_rows=5),
        replace(SHARD, path="b.parquet"),
    ],
)
def test_a_journal_of_other_rows_is_ignored(tmp_path: Path, changed: Shard) -> None:
    """What was generated for other input bytes is not this shard's, whatever its number."""
    store = Store.open(str(tmp_path))
    JournalWriter(store, RUN, lease(shard=changed)).flush([done(0)])
    found = read_journal(store, RUN, SHARD, N)
    assert (dict(found.finished), found.num_damaged) == ({}, 1)


def test_an_object_counts_under_its_own_name_only(tmp_path: Path) -> None:
    """A copy under another attempt, and files of others, are no part of a journal."""
    store = Store.open(str(tmp_path))
    JournalWriter(store, RUN, lease()).flush([done(0)])
    folder = journal_folder(RUN, 3)
    data = store.read(f"{folder}/000001-000001-0000.zst")
    assert data is not None
    store.put(f"{folder}/000000-000001-0000.zst", data)
    store.put(f"{folder}/notes.txt", b"hello")
    store.put(f"{folder}/000001-000001-0001.zst", b"")
    found = read_journal(store, RUN, SHARD, N)
    assert (list(found.finished), found.num_damaged) == ([(0, 0)], 2)


HOSTILE = [
    b"",
    b"[]",
    b"null",
    b"{}",
    b"\xff",
    b"[" * 100_000,
    b'{"kind":"finished"}',
    b'{"kind":"other"}',
    *(
        json.dumps({**json.loads(write_finished(done(0))), **change}).encode()
        for change in (
            {"ordinal": -1},
            {"ordinal": 6},
            {"ordinal": True},
            {"sample": 2},
            {"sample": 0.0},
            {"id": None},
            {"completion": 7},
            {"completion": None},
            {"error": "engine: broken"},
            {"finish_reason": "because"},
            {"tokens": [1, 2]},
            {"tokens": [1, 2, -3]},
            {"tokens": "123"},
            {"thinking_budget_hit": 1},
            {"logprobs": ["x"]},
            {"tool_calls": [["f"]]},
            {"verdict": ["yes", None]},
            {"generated": {"token_ids": "AAA"}},
            {"generated": {"token_ids": "AAAA"}},
            {"generated": {"token_ids": "AAAAAA==", "logprobs": ""}},
        )
    ),
    *(
        json.dumps({**json.loads(write_running(tail(0, 0, 1))), **change}).encode()
        for change in (
            {"at": -1},
            {"at": None},
            {"generated": {"token_ids": "AAAAAA==", "closed_after": 2}},
            {"generated": []},
        )
    ),
]


def test_records_that_are_none_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A hostile record never becomes a row and never an error; its neighbours stay."""
    store = Store.open(str(tmp_path))
    lines = [line for bad in HOSTILE for line in (write_finished(done(1)), bad)]
    header = {**journal._header(RUN, SHARD), "attempt": "000001-000001", "seq": 0}
    path = f"{journal_folder(RUN, 3)}/000001-000001-0000.zst"
    store.put(path, to_bytes(header, [*lines, write_finished(done(2))]))
    with caplog.at_level(logging.WARNING):
        found = read_journal(store, RUN, SHARD, N)
    assert dict(found.finished) == {(1, 0): done(1), (2, 0): done(2)}
    assert found.num_damaged == len(HOSTILE)
    assert f"damaged in {len(HOSTILE)} places" in caplog.text


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a record or two, so that little data has many."""
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 300)


def check(store: Store, objects: Sequence[tuple[str, bytes]], whole: Journal) -> Journal:
    """The journal of these objects, which must hold nothing but what ``whole`` holds."""
    folder = journal_folder(RUN, 3)
    store.delete([item.path for item in store.list(folder)])
    for name, data in objects:
        store.put(f"{folder}/{name}", data)
    found = read_journal(store, RUN, SHARD, N)
    assert all(whole.finished.get(key) == item for key, item in found.finished.items())
    for key, chain in found.running.items():
        expected = whole.running.get(key)
        if expected is not None:
            assert expected.token_ids[: len(chain.token_ids)] == chain.token_ids
        else:  # its finished record was lost
            assert chain.token_ids == tuple(100 * key[0] + i for i in range(len(chain.token_ids)))
    return found


def example(store: Store) -> list[tuple[str, bytes]]:
    """The objects of a small journal of two attempts."""
    writer = JournalWriter(store, RUN, lease("000001-000001"))
    writer.flush([done(0), done(0, 1)], [tail(1, 0, 3), tail(2, 0, 2, logprobs=True)])
    writer.flush([done(1), done(3, 1)], [tail(2, 2, 4, closed_after=3, logprobs=True)])
    writer = JournalWriter(store, RUN, lease("000001-000002"))
    writer.flush([done(0), done(4)], [tail(2, 0, 3, logprobs=True), tail(5, 0, 9)])
    listed = store.list(journal_folder(RUN, 3))
    return [(item.path.rpartition("/")[2], store.read(item.path) or b"") for item in listed]


def test_a_torn_object_costs_its_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at every byte, a journal never gives a wrong row, and never fewer the longer it is."""
    small_blocks(monkeypatch)
    store = Store.open(str(tmp_path))
    objects = example(store)
    whole = read_journal(store, RUN, SHARD, N)
    assert len(whole.finished) == 5
    for place, (name, data) in enumerate(objects):
        most = 0
        lines: set[int] = set()
        for cut in range(len(data) + 1):
            read = [line for line in read_lines(data[:cut]) if line is not None]
            assert read == list(read_lines(data))[: len(read)]
            assert len(read) >= most
            most = len(read)
            if len(read) in lines and cut % 101:
                continue  # the merge of the same lines
            lines.add(len(read))
            others = [item for number, item in enumerate(objects) if number != place]
            check(store, [*others, (name, data[:cut])], whole)
        assert len(lines) > 2


@settings(max_examples=30)
@given(st.data())
def test_flipped_bits_cost_their_block_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever bits flip, no wrong row comes out; blocks before and behind are read."""
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        store = Store.open(str(tmp_path_factory.mktemp("journal")))
        objects = example(store)
        whole = read_journal(store, RUN, SHARD, N)
        number = data.draw(st.integers(0, len(objects) - 1))
        name, content = objects[number]
        damaged = bytearray(content)
        places = data.draw(
            st.lists(st.integers(0, len(content) * 8 - 1), min_size=1, max_size=3, unique=True)
        )
        for place in places:
            damaged[place // 8] ^= 1 << place % 8
        objects[number] = (name, bytes(damaged))
        found = check(store, objects, whole)
        assert found.num_damaged >= 1
        header_end = content.index(b"\n")
        is_header_whole = bytes(damaged[: header_end + 1]) == content[: header_end + 1]
        if is_header_whole and len(places) == 1:  # several could be one in each block
            lost = [line for line in read_lines(content) if line not in set(read_lines(damaged))]
            assert len(lost) < len(list(read_lines(content))), "a block behind is found again"


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), unique=True),
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.data(),
)
def test_any_split_and_any_repetition_merge_to_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    keys: list[tuple[int, int]],
    steps: list[int],
    data: st.DataObject,
) -> None:
    """However records come in objects, and how often, the journal holds each once."""
    store = Store.open(str(tmp_path_factory.mktemp("journal")))
    records: list[Completion | Running] = [done(*key) for key in keys]
    at = 0
    for step in steps:
        records.append(tail(5, at, at + step, sample=1))
        at += step
    # Tokens come in their order; everything may come again.
    records += data.draw(st.lists(st.sampled_from(records), max_size=5))
    writer = JournalWriter(store, RUN, lease())
    while records:
        size = data.draw(st.integers(1, len(records)))
        group, records = records[:size], records[size:]
        writer.flush(
            [item for item in group if isinstance(item, Completion)],
            [item for item in group if isinstance(item, Running)],
        )
    found = read_journal(store, RUN, SHARD, N)
    assert dict(found.finished) == {key: done(*key) for key in keys}
    expected = {(5, 1): Generated(tuple(range(500, 500 + at)))} if (5, 1) not in keys else {}
    assert (dict(found.running), found.num_damaged) == (expected, 0)


def test_sizes_are_checked_before_anything_is_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bomb is not unpacked, an object that is too big not even read."""
    bomb = to_bytes({}, [b"x" * (1 << 20)])
    assert len(bomb) < 1000
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 1 << 16)
    assert list(read_lines(bomb)) == [None]
    with pytest.raises(ValueError, match="1048576 bytes"):
        to_bytes({}, [b"x" * (1 << 20)])
    store = Store.open(str(tmp_path))
    JournalWriter(store, RUN, lease()).flush([done(0)])
    monkeypatch.setattr(journal, "_MAX_OBJECT_BYTES", 10)
    found = read_journal(store, RUN, SHARD, N)
    assert (len(found.finished), found.num_damaged) == (0, 1)


def test_a_sample_that_is_too_big_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the journal cannot hold is never left out in silence; all else is in it."""
    monkeypatch.setattr(journal, "MAX_LINE_BYTES", 1 << 12)
    store = Store.open(str(tmp_path))
    big = done(1, text="x" * (1 << 12))
    JournalWriter(store, RUN, lease()).flush([done(0), big, done(2)], [tail(3, 0, 2)])
    found = read_journal(store, RUN, SHARD, N)
    assert (list(found.finished), list(found.running)) == ([(0, 0), (2, 0)], [(3, 0)])
    assert "sample 0 of row 1" in caplog.text


def test_a_big_flush_is_several_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one flush brings may be more than an object holds."""
    monkeypatch.setattr(journal, "_MAX_LINES_BYTES", 500)
    store = Store.open(str(tmp_path))
    JournalWriter(store, RUN, lease()).flush([done(number) for number in range(6)])
    assert len(store.list(journal_folder(RUN, 3))) > 1
    assert [key for key, _ in read_journal(store, RUN, SHARD, N).finished] == list(range(6))


def test_a_full_local_disk_is_an_error_of_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the journal cannot be kept on the way, the run stops and says what to do."""
    store = Store.open(str(tmp_path))
    JournalWriter(store, RUN, lease()).flush([done(0)])
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(journal.tempfile, "TemporaryFile", lambda **_: full)
    with pytest.raises(StorageError, match="cannot hold the journal") as caught:
        read_journal(store, RUN, SHARD, N)
    assert "TMPDIR" in caught.value.hint

    def no_room(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal.tempfile, "TemporaryFile", no_room)
    with pytest.raises(StorageError, match="cannot hold the journal"):
        read_journal(store, RUN, SHARD, N)

"""A retried part is the old one or the new one, and the bookkeeping says which."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq
import pytest

from batchrun.data.inputs import list_input
from batchrun.data.journal import JournalWriter, read_journal
from batchrun.data.layout import (
    SUCCESS,
    commit_path,
    journal_folder,
    retries_folder,
    retry_plan_path,
    run_id,
    strikes_folder,
)
from batchrun.data.plan import PlanRule
from batchrun.data.reader import ShardReader
from batchrun.data.resume import OpenedRun, open_retry
from batchrun.data.retry import Retry, apply_staged, begin_retry, read_kept, recover, stage_part
from batchrun.data.status import discard, read_status
from batchrun.data.store import ObjectInfo, Store
from batchrun.data.strikes import write_strike
from batchrun.data.verify import verify_run
from batchrun.data.writer import PartFormat, PartWriter
from batchrun.errors import OutputError, OutputHeldError, StorageError
from batchrun.records import (
    Completion,
    ErrorKind,
    FinishReason,
    Lease,
    Part,
    Row,
    Shard,
    Strike,
    ToolCall,
)
from batchrun.rows import Rows
from tests.unit.data.test_run import COLUMNS, Site
from tests.unit.data.test_writer import completion

N = 2
KINDS = (ErrorKind.TIMEOUT, ErrorKind.WORKER_LOST)


def failed(row: Row, sample: int, kind: str) -> Completion:
    """A sample that ended in an error."""
    done = completion(row, sample, completion=None, reasoning=None, error=f"{kind}: because")
    return replace(done, finish_reason=FinishReason.ERROR)


def first_time(row: Row, sample: int) -> Completion:
    """Row 1 of every shard timed out in one sample, row 2 was too long."""
    if row.ordinal == 1 and sample == 1:
        return failed(row, sample, "timeout")
    if row.ordinal == 2:
        return failed(row, sample, "too_long")
    return completion(row, sample, completion=f"first {row.id}", tool_calls=(ToolCall("f", "{}"),))


def second_time(row: Row, sample: int) -> Completion:
    """Everything goes well."""
    return completion(row, sample, completion=f"second {row.id}")


PART_FORMAT = {"n": N, "tool_calls": True, "logprobs": True}


def publish_first(site: Site, opened: OpenedRun, shard: Shard) -> None:
    """The part of a shard, with its failed rows."""
    part_format = PartFormat(opened.directory.run, **PART_FORMAT)  # type: ignore[arg-type]
    with ShardReader(shard, opened.schema) as reader, PartWriter(reader, part_format) as writer:
        for row in reader:
            for sample in range(N):
                writer.add(first_time(row, sample))
        lease = Lease(shard, 1, "000001-000001", Rows.all(shard.num_rows))
        opened.directory.publish(writer.finish(), lease)


def restage(store: Store, opened: OpenedRun, shard: Shard, retry: Retry, attempt: str) -> Part:
    """What a worker does: the kept rows and the journal, the rest generated, staged."""
    run = opened.directory.run
    retried = retry.rows[shard.number]
    kept = read_kept(store, retry, shard.number, N)
    journal = read_journal(store, run, shard, N, kept)
    part_format = PartFormat(run, **PART_FORMAT)  # type: ignore[arg-type]
    with (
        ShardReader(shard, opened.schema) as reader,
        PartWriter(reader, part_format, journaled=journal.finished) as writer,
    ):
        for row in reader:
            for sample in range(N):
                if (row.ordinal, sample) in journal.finished:
                    writer.add_journaled(row.ordinal, sample)
                else:
                    assert row.ordinal in retried
                    writer.add(second_time(row, sample))
        lease = Lease(shard, 2, attempt, Rows.all(shard.num_rows))
        return stage_part(store, run, retry, writer.finish(), lease, N)


def retry_all(site: Site, store: Store, kinds: Sequence[ErrorKind] = KINDS) -> list[Part]:
    """A whole retry, with ``store`` in place of the site's own."""
    opened = replace(site, store=store).open()
    retry = begin_retry(store, opened.directory.run, opened.parts, kinds, N)
    parts = []
    for shard in opened.shards:
        if shard.number in retry.rows:
            restage(store, opened, shard, retry, "000002-000001")
            parts.append(apply_staged(store, opened.directory.run, shard.number, retry.number))
    opened.directory.finish(
        opened.shards, {}, success=True, known={part.shard: part for part in parts}
    )
    return parts


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Site]:
    """Makes a finished run over two files, with failed rows."""

    def made(store: Store | None = None, name: str = "out") -> Site:
        site = Site(
            tmp_path,
            Store.open(str(tmp_path / name)) if store is None else store,
            rule=PlanRule(COLUMNS, max_tokens=16, n=N),
            semantic={"input": {"id_column": None}, "generation": {"n": N}},
        )
        if not (tmp_path / "in").exists():
            site.input("a.parquet", 3)
            site.input("b.parquet", 4)
        opened = site.open()
        for shard in opened.shards:
            publish_first(site, opened, shard)
        opened.directory.finish(opened.shards, {}, success=True)
        return site

    return made


def bytes_of(site: Site) -> dict[str, str]:
    """Name -> checksum of every part."""
    return {name: hashlib.sha256(site.store.read(name) or b"").hexdigest() for name in site.parts()}


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_retry_replaces_the_failed_samples_alone(
    kind: str, make: Callable[..., Site], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """All others keep every value, counts and manifest follow, and nothing is left behind."""
    store = None
    if kind == "s3":
        server = request.getfixturevalue("s3_server")
        store = Store.open(f"{server.url}/out", server.storage_options)
    site = make(store)
    before = [pq.read_table(site.store.open_file(name)) for name in site.parts()]
    names = site.parts()
    assert read_status(site.store).counts.failed_rows == 4
    retry_all(site, site.store)
    assert site.parts() == names
    for name, old in zip(names, before, strict=True):
        new = pq.read_table(site.store.open_file(name))
        assert new.schema.equals(old.schema, check_metadata=True)
        rows = list(zip(old.to_pylist(), new.to_pylist(), strict=True))
        for place, (was, now) in enumerate(rows):
            if (place // N, place % N) == (1, 1):
                assert now["completion"] == f"second {now['id']}" and now["error"] is None
            else:
                assert was == now
    assert verify_run(site.store).problems == ()
    run = run_id(site.semantic)
    assert read_status(site.store).counts.failed_rows == 2
    success = json.loads(site.store.read(SUCCESS) or b"")
    assert (success["failed_rows"], success["manifest"]) == (
        2,
        f"_batchrun/{run}/manifest-0002.json",
    )
    left = {item.path.rpartition("/")[2] for item in site.store.list(retries_folder(run))}
    assert left == {"plan-0001.json", "000000-0001.json", "000001-0001.json"}
    again = begin_retry(site.store, run, site.open().parts, KINDS, N)
    assert (again.number, again.rows) == (0, {}), "nothing failed so any more"
    other = begin_retry(site.store, run, site.open().parts, [ErrorKind.TOO_LONG], N)
    assert (other.number, other.rows) == (2, {0: Rows.of([2]), 1: Rows.of([2])})
    discard(site.store)
    assert site.store.list() == ()


class Crash(BaseException):
    """The process dies here."""


class CrashingStore(Store):
    """A store that dies at its ``at``-th change, just before or just after it takes effect."""

    def __init__(self, inner: Store, at: int, *, after: bool) -> None:
        super().__init__(inner.url)
        self.inner = inner
        self.at = at
        self.after = after
        self.num_changes = 0

    def _change(self, change: Callable[[], object]) -> object:
        self.num_changes += 1
        if self.num_changes == self.at and not self.after:
            raise Crash
        result = change()
        if self.num_changes == self.at:
            raise Crash
        return result

    def put(self, path: str, data: bytes) -> None:
        self._change(lambda: self.inner.put(path, data))

    def copy(self, source: str, target: str) -> None:
        self._change(lambda: self.inner.copy(source, target))

    def put_if_absent(
        self,
        path: str,
        data: bytes | Path,
        token: str,
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        return bool(self._change(lambda: self.inner.put_if_absent(path, data, token, metadata)))

    def delete(self, paths: Iterable[str]) -> None:
        self._change(lambda: self.inner.delete(paths))

    def list(self, folder: str = "", *, recursive: bool = True) -> tuple[ObjectInfo, ...]:
        return self.inner.list(folder, recursive=recursive)

    def folders(self, folder: str) -> tuple[str, ...]:
        return self.inner.folders(folder)

    def info(self, path: str) -> ObjectInfo | None:
        return self.inner.info(path)

    def read(self, path: str) -> bytes | None:
        return self.inner.read(path)

    def open_file(self, path: str) -> BinaryIO:
        return self.inner.open_file(path)

    def probe(self) -> None:
        self.inner.probe()


@pytest.mark.parametrize("after", [False, True])
def test_a_retry_may_die_at_any_step(make: Callable[..., Site], after: bool) -> None:
    """Each part is then exactly the old or the new one; opening the run makes the bookkeeping
    agree with it, and the same retry comes to the end that an undisturbed one has."""
    whole = make(name="whole")
    old = bytes_of(whole)
    retry_all(whole, whole.store)
    new = bytes_of(whole)
    num_changes = 0
    at = 1
    while at == 1 or at <= num_changes:
        site = make(name=f"crash-{at}")
        store = CrashingStore(site.store, at, after=after)
        if at == 1:
            counting = CrashingStore(make(name="count").store, 0, after=after)
            retry_all(site, counting)
            num_changes = counting.num_changes
            assert num_changes > 10
        with pytest.raises(Crash):
            retry_all(site, store)
        now = bytes_of(site)
        assert all(now[name] in (old[name], new[name]) for name in old)
        for problem in verify_run(site.store).problems:
            assert "a retry was cut off" in problem
        opened = site.open()
        assert {part.name: part.sha256 for part in opened.parts.values()} == bytes_of(site)
        assert verify_run(site.store).problems == ()
        retry_all(site, site.store)
        assert (bytes_of(site), verify_run(site.store).problems) == (new, ())
        assert read_status(site.store).succeeded
        at += 1


def test_a_retry_that_was_cut_off_goes_on_from_the_journal(make: Callable[..., Site]) -> None:
    """What it generated is not generated again, also when a submit has found the run finished in
    between; what was journaled before it began does not count, and neither does the journal for a
    retry of other errors."""
    site = make()
    run = run_id(site.semantic)
    opened = site.open()
    shard = opened.shards[0]
    lease = Lease(shard, 1, "000001-000007", Rows.of([1]), whole=False)
    with ShardReader(shard, opened.schema) as reader:
        rows = list(reader)
    JournalWriter(site.store, run, lease).flush([first_time(rows[1], 1)])
    retry = begin_retry(site.store, run, opened.parts, KINDS, N)
    assert site.store.list(journal_folder(run)) == ()
    mine = completion(rows[1], 1, completion="journaled by the retry")
    JournalWriter(site.store, run, replace(lease, epoch=2)).flush([mine])
    submitted = site.open()
    submitted.directory.finish(submitted.shards, {}, success=True)
    assert begin_retry(site.store, run, opened.parts, tuple(reversed(KINDS)), N) == retry
    restage(site.store, opened, shard, retry, "000003-000001")
    apply_staged(site.store, run, 0, retry.number)
    table = pq.read_table(site.store.open_file(site.parts()[0]))
    assert table["completion"].to_pylist()[2:4] == [
        f"first {rows[1].id}",
        "journaled by the retry",
    ]
    opened.directory.finish(opened.shards, {}, success=True)
    assert site.store.list(journal_folder(run)) == (), "a shard that is retried needs none"
    left = begin_retry(site.store, run, site.open().parts, KINDS, N)
    assert (left.number, list(left.rows)) == (1, [1]), "a shard that is done is done"
    other = begin_retry(site.store, run, site.open().parts, [ErrorKind.TOO_LONG], N)
    assert (other.number, list(other.rows)) == (2, [0, 1])
    assert site.store.list(journal_folder(run)) == ()


def test_a_part_that_is_staged_too_late_changes_nothing(make: Callable[..., Site]) -> None:
    """A worker of a retry that was given up comes when the next one has replaced the part."""
    site = make()
    run = run_id(site.semantic)
    opened = site.open()
    late = begin_retry(site.store, run, opened.parts, KINDS, N)
    retry_all(site, site.store, [ErrorKind.TOO_LONG])
    after = bytes_of(site)
    restage(site.store, opened, opened.shards[0], late, "000001-000009")
    site.open()
    assert bytes_of(site) == after and verify_run(site.store).problems == ()
    assert not [x for x in site.store.list(retries_folder(run)) if x.path.endswith(".parquet")]


def test_a_part_that_is_staged_while_the_next_retry_begins_is_not_forgotten(
    make: Callable[..., Site],
) -> None:
    """A worker of a killed driver comes when the run is open again: the same retry has that part
    still to put in its place. One of other errors gives it up once it is planned, unless it stands
    in its place by then."""
    for is_copied in (False, True):
        site = make(name=f"{is_copied}")
        run = run_id(site.semantic)
        opened = site.open()
        retry = begin_retry(site.store, run, opened.parts, KINDS, N)
        staged = restage(site.store, opened, opened.shards[0], retry, "000001-000009")
        assert begin_retry(site.store, run, opened.parts, KINDS, N).rows == retry.rows
        dying = CrashingStore(site.store, 1, after=True)
        with contextlib.suppress(Crash):
            begin_retry(dying, run, opened.parts, [ErrorKind.TOO_LONG], N)
        is_planned = site.store.info(f"{retries_folder(run)}/plan-0002.json") is not None
        if is_copied:
            site.store.copy(f"{retries_folder(run)}/000000-0001.parquet", staged.name)
        assert (site.open().parts[0] == staged) is (is_copied or not is_planned)
        assert verify_run(site.store).problems == ()


def test_only_what_has_a_part_is_retried(tmp_path: Path) -> None:
    """Of a run that is not finished the other shards are left, new input is none of a retry's
    business, and another job's run is refused with what differs."""
    site = Site(
        tmp_path,
        Store.open(str(tmp_path / "out")),
        rule=PlanRule(COLUMNS, max_tokens=16, n=N),
        semantic={"input": {"id_column": None}, "generation": {"n": N}},
    )
    for name in ("a.parquet", "b.parquet"):
        site.input(name, 3)
    opened = site.open()
    publish_first(site, opened, opened.shards[0])
    opened.directory.mark_failed(opened.shards[1], "it cannot be read")
    site.input("c.parquet", 3)
    files = list_input(str(site.folder / "in"))
    found = open_retry(site.store, site.semantic, files, site.rule, KINDS)
    assert found.retry is not None
    assert (found.shards, found.num_unfinished) == (opened.shards[:1], 1)
    assert (dict(found.retry.rows), found.retry.num_rows) == ({0: Rows.of([1])}, 1)
    assert found.directory.failed() == {1: "it cannot be read"}, "which it says nothing new of"
    other = {**site.semantic, "generation": {"n": 3}}
    with pytest.raises(OutputError, match=r"what differs: generation\.n: 2 -> 3"):
        open_retry(site.store, other, files, site.rule, KINDS)


def test_the_first_staged_part_counts(make: Callable[..., Site]) -> None:
    """Two workers with one shard: one part is staged, whoever reports it, and applied once."""
    site = make()
    run = run_id(site.semantic)
    opened = site.open()
    retry = begin_retry(site.store, run, opened.parts, KINDS, N)
    first = restage(site.store, opened, opened.shards[0], retry, "000002-000001")
    second = restage(site.store, opened, opened.shards[0], retry, "000002-000002")
    assert first == second
    applied = apply_staged(site.store, run, 0, retry.number)
    assert applied == first == apply_staged(site.store, run, 0, retry.number)
    # A third one that was told of the staged part just before that took its place.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site.store, "put_if_absent", lambda *_: False)
        assert restage(site.store, opened, opened.shards[0], retry, "000002-000003") == first
    assert site.open().parts[0] == first
    assert first.counts == replace(opened.parts[0].counts, failed_rows=1)


def test_a_driver_that_lost_its_lock_replaces_nothing_more(make: Callable[..., Site]) -> None:
    """It stood still before it began, or while it copied: meanwhile others have finished that, and
    perhaps a retry of their own."""
    site = make()
    run = run_id(site.semantic)

    def lost() -> None:
        raise OutputHeldError("another run took over", "")

    def lost_while_copying() -> None:
        if len(asked) == 1:
            retry_all(site, site.store, (ErrorKind.TOO_LONG,))
            lost()
        asked.append("kept until then")

    asked: list[str] = []
    opened = site.open()
    retry = begin_retry(site.store, run, opened.parts, KINDS, N)
    staged = restage(site.store, opened, opened.shards[0], retry, "000002-000001")
    before = site.store.list()
    with pytest.raises(OutputHeldError):
        apply_staged(site.store, run, 0, retry.number, lost)
    with pytest.raises(OutputHeldError):
        recover(site.store, run, lost)
    assert site.store.list() == before
    with pytest.raises(OutputHeldError):
        apply_staged(site.store, run, 0, retry.number, lost_while_copying)
    assert verify_run(site.store).problems == ()
    assert site.open().parts[0].sha256 != staged.sha256, "the newest retry stands"


def test_a_worker_that_died_before_the_record_leaves_its_part(make: Callable[..., Site]) -> None:
    """A staged part without a record is described by reading it, and used."""
    site = make()
    run = run_id(site.semantic)
    opened = site.open()
    retry = begin_retry(site.store, run, opened.parts, KINDS, N)
    first = restage(site.store, opened, opened.shards[0], retry, "000002-000001")
    site.store.delete([f"{retries_folder(run)}/000000-0001.json"])
    assert site.open().parts[0].sha256 == opened.parts[0].sha256, "nothing is applied"
    second = restage(site.store, opened, opened.shards[0], retry, "000002-000002")
    assert (second.sha256, second.name, second.counts) == (first.sha256, first.name, first.counts)


def test_a_part_that_somebody_changed_is_not_replaced(make: Callable[..., Site]) -> None:
    """A staged part replaces the one that it was made from, and no other."""
    site = make()
    run = run_id(site.semantic)
    opened = site.open()
    retry = begin_retry(site.store, run, opened.parts, KINDS, N)
    restage(site.store, opened, opened.shards[0], retry, "000002-000001")
    path = f"_batchrun/{run}/parts/000000.json"
    record = json.loads(site.store.read(path) or b"")
    site.store.put(path, json.dumps({**record, "sha256": "0" * 64}).encode())
    with pytest.raises(OutputError, match="not the part that retry 1 began with"):
        apply_staged(site.store, run, 0, retry.number)


def test_rows_that_killed_workers_may_try_again(make: Callable[..., Site]) -> None:
    """A retry of lost rows forgets their strikes; one of other rows does not."""
    site = make()
    run = run_id(site.semantic)
    write_strike(site.store, run, 1, Strike("w-1", {0: Rows.of([1])}))
    begin_retry(site.store, run, site.open().parts, [ErrorKind.TIMEOUT], N)
    assert len(site.store.list(strikes_folder(run))) == 1
    begin_retry(site.store, run, site.open().parts, KINDS, N)
    assert site.store.list(strikes_folder(run)) == ()


def test_a_damaged_retry_is_named(make: Callable[..., Site]) -> None:
    """A plan or a record that cannot be read is an error that says which, not a guess."""
    site = make()
    run = run_id(site.semantic)
    opened = site.open()
    retry = begin_retry(site.store, run, opened.parts, KINDS, N)
    restage(site.store, opened, opened.shards[0], retry, "000002-000001")
    commit = site.store.read(commit_path(run, 0)) or b""
    site.store.put(commit_path(run, 0), b"[]")
    for newest in (1, 2):
        site.store.put(retry_plan_path(run, newest), b"{}")
        with pytest.raises(OutputError, match=r"parts/000000.json is damaged"):
            recover(site.store, run)
    site.store.delete([retry_plan_path(run, 2)])
    site.store.put(commit_path(run, 0), commit)
    site.store.put(f"{retries_folder(run)}/000000-0001.json", b"[]")
    with pytest.raises(OutputError, match=r"000000-0001.json is damaged"):
        site.open()
    site.store.put(f"{retries_folder(run)}/plan-0001.json", b"{}")
    with pytest.raises(OutputError, match=r"plan-0001.json is damaged"):
        begin_retry(site.store, run, opened.parts, KINDS, N)
    with pytest.raises((OutputError, StorageError)):
        site.store.copy("absent", "target")

"""A changed job may go on where another one stopped, and the books say which rows are whose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.data.inputs import InputColumns, list_input
from batchrun.data.jobrecord import find_run
from batchrun.data.layout import SUCCESS, journal_folder, part_name, run_folder, run_id
from batchrun.data.lock import RunLock
from batchrun.data.plan import PlanRule
from batchrun.data.resume import OpenedRun, check_output, open_run
from batchrun.data.retry import begin_retry
from batchrun.data.status import discard, read_status
from batchrun.data.store import Store
from batchrun.data.verify import verify_run
from batchrun.data.writer import PartFormat
from batchrun.errors import InputError, OutputError, StorageError
from batchrun.records import ErrorKind
from tests.unit.data.parquet import prompts, write
from tests.unit.data.test_retry import Crash, CrashingStore
from tests.unit.data.test_run import COLUMNS, Site


def semantic(temperature: float) -> dict[str, object]:
    """What a job's content is made of."""
    return {
        "input": {"id_column": None},
        "generation": {"n": 1, "temperature": temperature},
    }


def keep(site: Site, part_format: PartFormat | None = None) -> OpenedRun:
    """Submit with --keep-finished."""
    files = list_input(str(site.folder / "in"))
    part_format = PartFormat("any", n=site.rule.n) if part_format is None else part_format
    return open_run(
        site.store,
        site.semantic,
        {"job": "resolved"},
        files,
        site.rule,
        keep_finished=part_format,
    )


def half_done(folder: Path, store: Store) -> Site:
    """A run of the first job, of which the first of two shards is finished."""
    site = Site(folder, store, semantic=semantic(0.5), rule=PlanRule(COLUMNS, max_tokens=16))
    site.input("a.parquet", 3)
    site.input("b.parquet", 4)
    site.run(site.open(), [0])
    return site


@pytest.fixture(params=["local", "s3"])
def any_site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    """Half a run, on disk and on S3."""
    if request.param == "local":
        return half_done(tmp_path, Store.open(str(tmp_path / "out")))
    server = request.getfixturevalue("s3_server")
    return half_done(tmp_path, Store.open(f"{server.url}/out", server.storage_options))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Half a run on disk."""
    return half_done(tmp_path, Store.open(str(tmp_path / "out")))


def manifest_of(site: Site) -> list[tuple[str, str]]:
    """Name and run of every part in the manifest that _SUCCESS names."""
    success = json.loads(site.store.read(SUCCESS) or b"")
    manifest = json.loads(site.store.read(success["manifest"]) or b"")
    return [(part["name"], part["run"]) for part in manifest["parts"]]


def test_finished_parts_stay_and_the_rest_runs_anew(any_site: Site) -> None:
    """Bytes of the old job are not touched; plan, manifest, status and verify know both runs."""
    site = any_site
    old, before = run_id(site.semantic), site.parts()
    kept_bytes = site.store.read(before[0])
    site.semantic = semantic(0.7)
    new = run_id(site.semantic)
    with pytest.raises(OutputError, match=r"temperature: 0\.5 -> 0\.7") as refused:
        site.open()
    for way in ("another output", "batchrun discard OUTPUT", "--keep-finished"):
        assert way in refused.value.hint
    check_output(site.store, site.semantic, keep_finished=True)
    opened = keep(site)
    assert find_run(site.store) == new
    assert ([item.number for item in opened.shards], list(opened.parts)) == ([0, 1], [0])
    status = read_status(site.store)
    assert (status.run_id, status.shards_done, status.counts.rows, status.rows_left) == (
        new,
        1,
        3,
        4,
    )
    site.run(opened)
    site.input("c.parquet", 2)
    opened = site.open()
    assert (list(opened.parts), opened.total_rows) == ([0, 1], 9), "resumed as any run is"
    site.run(opened)
    counts = opened.directory.finish(opened.shards, {}, success=True)
    assert counts.rows == 9
    first, second, third = opened.shards
    assert manifest_of(site) == [
        (part_name(old, first), old),
        (part_name(new, second), new),
        (part_name(new, third), new),
    ]
    assert site.store.read(before[0]) == kept_bytes
    assert verify_run(site.store).problems == ()
    assert read_status(site.store).succeeded
    site.semantic = semantic(0.5)
    with pytest.raises(OutputError, match="another job"):
        site.open()
    discard(site.store)
    assert site.store.list() == ()


def test_a_worker_of_the_job_before_publishes_nothing_more(site: Site) -> None:
    """Its part would stand beside that of the new job, with the same rows; what came in time is
    kept."""
    with RunLock(site.store, run_id(site.semantic)) as lock:
        opened = site.open()
        opened.directory.check_stands(lock.epoch)
    site.semantic = semantic(0.7)
    with RunLock(site.store, run_id(site.semantic)):
        keep(site)
    with pytest.raises(StorageError, match="another driver has planned it anew"):
        opened.directory.check_stands(lock.epoch)
    site.semantic = semantic(0.5)
    with RunLock(site.store, run_id(site.semantic)) as again:
        keep(site)
        opened.directory.check_stands(again.epoch)
    assert again.epoch > lock.epoch


def test_jobs_may_take_turns(site: Site) -> None:
    """Back to the first job, and to the second once more: the newest is the one that counts."""
    first, second = semantic(0.5), semantic(0.7)
    a, b = run_id(first), run_id(second)
    owners = [a]
    for number, (name, rows) in enumerate(
        [("c.parquet", 1), ("d.parquet", 2), ("e.parquet", 3)], start=1
    ):
        site.semantic = second if number % 2 else first
        site.input(name, rows)
        opened = keep(site)
        assert find_run(site.store) == run_id(site.semantic)
        assert len(opened.parts) == number
        todo = next(item for item in opened.shards if item.number not in opened.parts)
        site.run(opened, [todo.number])
        owners.append(run_id(site.semantic))
    opened = site.open()
    site.run(opened)
    opened.directory.finish(opened.shards, {}, success=True)
    assert [run for _, run in manifest_of(site)] == [a, b, a, b, b]
    assert owners == [a, b, a, b]
    assert verify_run(site.store).problems == ()
    numbers = [item.number for item in opened.shards]
    assert len(numbers) == len(set(numbers)) == 5
    assert opened.total_rows == 3 + 4 + 1 + 2 + 3


@pytest.mark.parametrize("after", [False, True])
def test_taking_over_may_die_at_any_step(tmp_path: Path, after: bool) -> None:
    """The output then holds one run or the other, whole; doing it again comes to the same end."""
    at = 1
    while True:
        folder = tmp_path / f"crash-{at}"
        site = half_done(folder, Store.open(str(folder / "out")))
        old = site.parts()
        site.semantic = semantic(0.7)
        store = CrashingStore(site.store, at, after=after)
        try:
            keep(replace(site, store=store))
        except Crash:
            pass
        else:
            assert at > 5
            break
        assert site.parts() == old
        in_charge = find_run(site.store)
        assert in_charge in {run_id(semantic(0.5)), run_id(semantic(0.7))}
        resumed = replace(
            site, semantic=semantic(0.5 if in_charge == run_id(semantic(0.5)) else 0.7)
        ).open()
        assert (list(resumed.parts), len(resumed.shards)) == ([0], 2)
        opened = keep(site)
        site.run(opened)
        opened.directory.finish(opened.shards, {}, success=True)
        assert (verify_run(site.store).problems, len(site.parts())) == ((), 2)
        at += 1


def test_other_columns_are_refused(site: Site) -> None:
    """One table has one set of columns: the message says which differ, and nothing is written."""
    site.semantic = semantic(0.7)
    before = site.store.list()
    with pytest.raises(OutputError, match=r"with logprobs: list<element: float>\)"):
        keep(site, PartFormat("any", logprobs=True))
    site.rule = PlanRule(InputColumns(prompt="prompt"), max_tokens=16)
    with pytest.raises(OutputError, match="without prompt: string"):
        keep(site)
    site.rule = PlanRule(COLUMNS, max_tokens=16, n=2)
    with pytest.raises(OutputError, match="do not have 2 samples a row"):
        keep(site)
    assert site.store.list() == before


def test_a_part_of_changed_input_may_stay(site: Site) -> None:
    """With the same job: what is finished stays though its file changed or is gone; a file that
    is not finished runs as it is now."""
    site.run(site.open())
    site.input("a.parquet", 5)
    (site.folder / "in/b.parquet").unlink()
    site.input("c.parquet", 2)
    with pytest.raises(InputError, match="changed after it was finished") as refused:
        site.open()
    assert "--keep-finished" in refused.value.hint
    opened = keep(site)
    assert [(item.number, item.num_rows) for item in opened.shards] == [(0, 3), (1, 4), (2, 2)]
    site.run(opened)
    opened.directory.finish(opened.shards, {}, success=True)
    assert verify_run(site.store).problems == ()


def test_a_file_that_is_finished_in_part_cannot_change(tmp_path: Path) -> None:
    """Its other rows would be of no file: that is refused with the flag too."""
    store = Store.open(str(tmp_path / "out"))
    site = Site(tmp_path, store, semantic=semantic(0.5), rule=PlanRule(COLUMNS, max_tokens=1 << 20))
    write(tmp_path / "in/a.parquet", prompts(400), row_group_size=100)
    opened = site.open()
    assert len(opened.shards) > 1
    site.run(opened, [0])
    write(tmp_path / "in/a.parquet", prompts(500))
    with pytest.raises(InputError, match="changed after it was finished"):
        keep(site)


def test_kept_parts_are_not_retried_and_not_journaled(site: Site) -> None:
    """What the old run left in its journal goes; its failed rows are not the new job's."""
    old = run_id(site.semantic)
    opened = site.open()
    site.store.put(f"{journal_folder(old, 1)}/000001-000001-0000.zst", b"anything")
    site.semantic = semantic(0.7)
    opened = keep(site)
    assert site.store.list(journal_folder(old)) == ()
    parts = {
        number: replace(part, counts=replace(part.counts, failed_rows=1))
        for number, part in opened.parts.items()
    }
    retry = begin_retry(site.store, opened.directory.run, parts, [ErrorKind.TIMEOUT], 1)
    assert retry.rows == {}


def test_a_damaged_record_of_kept_parts_is_named(site: Site) -> None:
    """It is never guessed which parts were kept."""
    site.semantic = semantic(0.7)
    run = keep(site).directory.run
    site.store.put(f"{run_folder(run)}/kept-0001.json", b"{}")
    with pytest.raises(OutputError, match=r"kept-0001\.json is damaged"):
        site.open()

"""The proof that an output is whole, and that every kind of damage is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.data.layout import SUCCESS, commit_path, journal_folder, run_folder, run_id
from batchrun.data.parts import part_from_json, part_to_json
from batchrun.data.plan import PlanRule
from batchrun.data.store import Store
from batchrun.data.verify import verify_run
from batchrun.errors import OutputError
from batchrun.records import Part
from tests.unit.data.test_run import COLUMNS, Site


def finished(folder: Path, store: Store, n: int = 1) -> Site:
    """A run over two files that ended well."""
    site = Site(
        folder,
        store,
        rule=PlanRule(COLUMNS, max_tokens=16, n=n),
        semantic={"input": {"id_column": None}, "generation": {"n": n}},
    )
    site.input("a.parquet", 3)
    site.input("b.parquet", 4)
    opened = site.open()
    site.run(opened)
    opened.directory.finish(opened.shards, {}, success=True)
    return site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A whole output on disk."""
    return finished(tmp_path, Store.open(str(tmp_path / "out")))


@pytest.mark.parametrize("n", [1, 3])
def test_a_whole_output_is_proved(tmp_path: Path, n: int) -> None:
    """Every row is there once a sample, and nothing is found wrong."""
    site = finished(tmp_path, Store.open(str(tmp_path / "out")), n)
    verdict = verify_run(site.store)
    assert (verdict.problems, verdict.num_rows, verdict.num_parts) == ((), 7, 2)
    assert verdict.counts.rows == 7


def test_a_whole_output_on_s3_is_proved(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Object storage alone is enough."""
    server = request.getfixturevalue("s3_server")
    site = finished(tmp_path, Store.open(f"{server.url}/out", server.storage_options))
    assert verify_run(site.store).problems == ()


def rewrite(path: Path, change: Callable[[pq.ParquetFile], object]) -> None:
    """Replace a part by a changed table with the same schema metadata."""
    with pq.ParquetFile(path) as parquet:
        table = change(parquet)
    pq.write_table(table, path)


def recommit(site: Site, number: int) -> None:
    """Make the commit record agree with the bytes that stand there now."""
    import hashlib
    from dataclasses import replace

    path = site.folder / "out" / commit_path(run_id(site.semantic), number)
    part: Part = part_from_json(path.read_bytes())
    data = (site.folder / "out" / part.name).read_bytes()
    part = replace(part, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.write_bytes(part_to_json(part))


def test_missing_parts_records_and_altered_bytes_are_named(site: Site) -> None:
    """A part that is gone, one whose bytes changed, one whose record is gone."""
    out = site.folder / "out"
    first, second = (out / name for name in site.parts())
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    second.write_bytes(data)
    first.unlink()
    problems = verify_run(site.store).problems
    assert f"{first.name}: cannot be read" in problems[0]
    assert problems[1].startswith(f"{second.name}: its bytes are not those that were committed")
    (out / commit_path(run_id(site.semantic), 0)).unlink()
    problems = verify_run(site.store).problems
    assert problems[0] == "shard 000000 (a.parquet): no part"
    assert f"{SUCCESS}: is there although shards have no part" in problems


def test_rows_lost_twice_or_out_of_order_are_named(site: Site) -> None:
    """Even where size and checksum were made to agree, the rows give it away."""
    out = site.folder / "out"
    first, second = (out / name for name in site.parts())
    rewrite(first, lambda parquet: parquet.read().slice(1))
    rewrite(second, lambda parquet: parquet.read().take([1, 0, 2, 3]))
    recommit(site, 0)
    recommit(site, 1)
    problems = verify_run(site.store).problems
    assert f"{first.name}: has 2 rows, 3 expected" in problems
    assert f"{second.name}: row 0 is (b.parquet:1, 0), not (b.parquet:0, 0)" in problems


def test_orphans_are_named(site: Site) -> None:
    """What a reader would take for output, and what no planned shard explains."""
    out = site.folder / "out"
    run = run_id(site.semantic)
    (out / "stray.parquet").write_bytes(b"PAR1")
    (out / run_folder(run) / "parts" / "000009.json").write_bytes(b"{}")
    problems = verify_run(site.store).problems
    assert problems == (
        "stray.parquet: is no part of this run",
        f"{run_folder(run)}/parts/000009.json: is the record of no planned shard",
    )


def test_a_run_of_an_earlier_version_is_proved(site: Site) -> None:
    """Records and a manifest from before parts had scores are as good as new ones."""
    folder = site.folder / "out" / run_folder(run_id(site.semantic))
    for path in (*folder.glob("parts/*.json"), *folder.glob("manifest-*.json")):
        text = path.read_text()
        assert '"scores": null' in text
        path.write_text(re.sub(r',\s*"(scores": null|malformed_tool_calls": 0)', "", text))
    success = site.folder / "out" / SUCCESS
    said = json.loads(success.read_bytes())
    del said["malformed_tool_calls"]
    success.write_text(json.dumps(said))
    assert verify_run(site.store).problems == ()


def test_a_success_that_says_something_else_is_named(site: Site) -> None:
    """The counts of _SUCCESS and the manifest must be those of the parts."""
    path = site.folder / "out" / SUCCESS
    said = json.loads(path.read_bytes())
    path.write_text(json.dumps({**said, "rows": 8}))
    assert verify_run(site.store).problems == (f"{SUCCESS}: its counts are not those of the parts",)
    path.write_text("{}")
    (problem,) = verify_run(site.store).problems
    assert problem.startswith(f"{SUCCESS}: it, or the manifest that it names, is damaged")


def test_a_failed_shard_is_named_with_its_reason(tmp_path: Path) -> None:
    """A run that ended with a shard it could not read is not whole."""
    site = Site(
        tmp_path,
        Store.open(str(tmp_path / "out")),
        semantic={"input": {"id_column": None}, "generation": {"n": 1}},
    )
    site.input("a.parquet", 3)
    opened = site.open()
    opened.directory.mark_failed(opened.shards[0], "corrupt page")
    assert verify_run(site.store).problems == (
        "shard 000000 (a.parquet): no part; it failed: corrupt page",
    )


def test_no_run_is_an_error(tmp_path: Path) -> None:
    """There is nothing to prove about a folder without a run."""
    with pytest.raises(OutputError, match="holds no run of batchrun"):
        verify_run(Store.open(str(tmp_path)))


def test_a_journal_is_no_part(site: Site) -> None:
    """A shard without its part is missing, also when its rows wait in the journal; a journal of
    no shard is named."""
    run = run_id(site.semantic)
    (site.folder / "out" / site.parts()[1]).unlink()
    (site.folder / "out" / commit_path(run, 1)).unlink()
    for number in (0, 1, 7):
        site.store.put(f"{journal_folder(run, number)}/000001-000001-0000.zst", b"anything")
    problems = verify_run(site.store).problems
    assert "shard 000001 (b.parquet): no part; some of its rows wait in the journal" in problems
    assert f"{journal_folder(run)}/000007: is the journal of no planned shard" in problems
    assert not any("000000" in problem for problem in problems)

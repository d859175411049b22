"""A run's bookkeeping: beginning, resuming, growing, publishing, ending."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from batchrun.data.inputs import InputColumns, list_input
from batchrun.data.journal import JournalWriter
from batchrun.data.layout import LOCK, PART_NAME, SUCCESS, part_name, run_id
from batchrun.data.lock import Holder, LockState, RunLock
from batchrun.data.parts import part_from_json, part_to_json
from batchrun.data.plan import PlanRule
from batchrun.data.reader import ShardReader
from batchrun.data.resume import OpenedRun, check_output, open_run
from batchrun.data.run import Progress
from batchrun.data.status import discard, read_status
from batchrun.data.store import Store
from batchrun.data.writer import PartFormat, PartWriter
from batchrun.errors import (
    BatchrunError,
    InputError,
    OutputError,
    OutputHeldError,
    ShardError,
    StorageError,
)
from batchrun.records import Counts, Lease, Part, Shard
from batchrun.rows import Rows
from batchrun.scores import Scores, Verdict
from tests.unit.data.parquet import prompts, write
from tests.unit.data.test_writer import completion

SEMANTIC = {"model": {"path": "tiny"}, "generation": {"temperature": 0.6, "stop": []}}
COLUMNS = InputColumns(prompt="prompt", carried=("prompt",))


@dataclass
class Site:
    """An input folder, an output, and a job over them."""

    folder: Path
    store: Store
    rule: PlanRule = field(default_factory=lambda: PlanRule(COLUMNS, max_tokens=16))
    semantic: dict[str, object] = field(default_factory=lambda: dict(SEMANTIC))
    scored: bool = False
    tools: bool = False

    def input(self, name: str, rows: int = 3) -> Path:
        """Write an input file."""
        return write(self.folder / "in" / name, prompts(rows))

    def open(self) -> OpenedRun:
        """Begin or resume."""
        files = list_input(str(self.folder / "in"))
        return open_run(self.store, self.semantic, {"job": "resolved"}, files, self.rule)

    def run(self, opened: OpenedRun, numbers: Sequence[int] | None = None) -> list[Part]:
        """Run these shards, or all that are left, to their parts."""
        return [
            self.publish(opened, shard)
            for shard in opened.shards
            if (shard.number not in opened.parts if numbers is None else shard.number in numbers)
        ]

    def publish(self, opened: OpenedRun, shard: Shard, attempt: str = "1-1") -> Part:
        """One attempt at a shard."""
        part_format = PartFormat(
            opened.directory.run, n=self.rule.n, correct=self.scored, tool_calls=self.tools
        )
        with ShardReader(shard, opened.schema) as reader, PartWriter(reader, part_format) as writer:
            for row in reader:
                for sample in range(self.rule.n):
                    text = f"{attempt} of {row.id}"
                    # Of two samples the first is right in every other row.
                    verdict = Verdict(sample == 0 and row.ordinal % 2 == 0, f"answer {sample}")
                    done = completion(row, sample, completion=text)
                    writer.add(replace(done, verdict=verdict if self.scored else None))
            return opened.directory.publish(
                writer.finish(), Lease(shard, 1, attempt, Rows.all(shard.num_rows))
            )

    def parts(self) -> list[str]:
        """The names of the published parts."""
        listed = self.store.list(recursive=False)
        return [item.path for item in listed if PART_NAME.fullmatch(item.path)]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An input of two files and an output that does not exist yet."""
    made = Site(tmp_path, Store.open(str(tmp_path / "out")))
    made.input("a.parquet", 3)
    made.input("b.parquet", 4)
    return made


@pytest.fixture(params=["local", "s3"])
def any_site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    """The same with the output on disk and on S3."""
    if request.param == "local":
        store = Store.open(str(tmp_path / "out"))
    else:
        server = request.getfixturevalue("s3_server")
        store = Store.open(f"{server.url}/deep/out", server.storage_options)
    made = Site(tmp_path, store)
    made.input("a.parquet", 3)
    made.input("b.parquet", 4)
    return made


def test_a_run_from_plan_to_success(any_site: Site) -> None:
    """Parts, commit records, manifest and _SUCCESS are where the contract says."""
    site = any_site
    opened = site.open()
    assert (
        [shard.number for shard in opened.shards],
        opened.total_rows,
        opened.parts,
    ) == ([0, 1], 7, {})
    parts = site.run(opened)
    assert site.parts() == [part.name for part in parts]
    counts = opened.directory.finish(opened.shards, {}, success=True)
    assert Counts(7, 0, 21, 14, 7, 0) == counts
    run = run_id(site.semantic)
    folder = f"_batchrun/{run}"
    assert [
        f"{folder}/job.json",
        f"{folder}/manifest-0001.json",
        f"{folder}/parts/000000.json",
        f"{folder}/parts/000001.json",
        f"{folder}/plan-0001.json",
        f"{folder}/plan-0001.parquet",
    ] == [item.path for item in site.store.list("_batchrun")]
    success = json.loads(site.store.read(SUCCESS) or b"")
    assert (run, 7, 0, 2) == (
        success["run_id"],
        success["rows"],
        success["failed_rows"],
        success["parts"],
    )
    manifest = json.loads(site.store.read(f"{folder}/manifest-0001.json") or b"")
    assert [part.sha256 for part in parts] == [item["sha256"] for item in manifest["parts"]]
    plan = json.loads(site.store.read(f"{folder}/plan-0001.json") or b"")
    assert (plan["shards"], plan["rows"]) == (2, 7)


def test_the_output_is_one_dataset(site: Site) -> None:
    """Readers see the published rows alone, in order, and never the bookkeeping."""
    opened = site.open()
    site.run(opened, [1])
    assert ds.dataset(str(site.folder / "out")).count_rows() == 4
    site.run(opened, [0])
    opened.directory.finish(opened.shards, {}, success=True)
    table = ds.dataset(str(site.folder / "out")).to_table()
    assert [f"a.parquet:{n}" for n in range(3)] + [f"b.parquet:{n}" for n in range(4)] == table[
        "id"
    ].to_pylist()


def test_a_run_resumes_with_what_is_left(any_site: Site) -> None:
    """The same shards with the same numbers, and the parts that exist."""
    site = any_site
    first = site.open()
    (part,) = site.run(first, [1])
    second = site.open()
    assert first.shards == second.shards and first.schema == second.schema
    assert {1: part} == second.parts
    site.run(second)
    third = site.open()
    assert {0, 1} == set(third.parts)


def test_submitting_a_finished_run_again_changes_nothing(site: Site) -> None:
    """A cron line may do so every night."""
    opened = site.open()
    site.run(opened)
    opened.directory.finish(opened.shards, {}, success=True)
    before = {item.path: item.fingerprint for item in site.store.list()}
    again = site.open()
    again.directory.finish(again.shards, {}, success=True, known=again.parts)
    assert before == {item.path: item.fingerprint for item in site.store.list()}


def test_a_crash_between_manifest_and_success_is_mended(site: Site) -> None:
    """The next submit writes what is missing."""
    opened = site.open()
    site.run(opened)
    opened.directory.finish(opened.shards, {}, success=True)
    site.store.delete([SUCCESS])
    again = site.open()
    again.directory.finish(again.shards, {}, success=True)
    assert site.store.info(SUCCESS) is not None
    assert sum("manifest-" in item.path for item in site.store.list("_batchrun")) == 1


def test_a_growing_input_appends_to_the_plan(site: Site) -> None:
    """New files get the next numbers wherever they sort, and _SUCCESS goes before their parts."""
    opened = site.open()
    site.run(opened)
    opened.directory.finish(opened.shards, {}, success=True)
    before = site.parts()
    site.input("A-first.parquet", 2)
    grown = site.open()
    assert [(shard.path, shard.number) for shard in grown.shards] == [
        ("a.parquet", 0),
        ("b.parquet", 1),
        ("A-first.parquet", 2),
    ]
    assert site.store.info(SUCCESS) is None
    assert {0, 1} == set(grown.parts)
    site.run(grown)
    grown.directory.finish(grown.shards, {}, success=True)
    assert before == site.parts()[:2] and len(site.parts()) == 3
    assert json.loads(site.store.read(SUCCESS) or b"")["rows"] == 9
    names = [item.path.rpartition("/")[2] for item in site.store.list("_batchrun")]
    assert {"plan-0001.parquet", "plan-0002.parquet", "manifest-0002.json"} < set(names)


def test_a_moved_input_is_the_same_input(site: Site) -> None:
    """The place of the files does not matter, what is in them does."""
    opened = site.open()
    site.run(opened, [0])
    os.rename(site.folder / "in", site.folder / "in2")
    files = list_input(str(site.folder / "in2"))
    again = open_run(site.store, site.semantic, {}, files, site.rule)
    assert [str(site.folder / "in2/a.parquet"), str(site.folder / "in2/b.parquet")] == [
        shard.uri for shard in again.shards
    ]
    site.run(again)
    assert len(site.parts()) == 2


@pytest.mark.parametrize("what", ["changed", "vanished"])
def test_a_finished_file_that_changed_is_refused(site: Site, what: str) -> None:
    """Exit 2, naming the file and the ways on; nothing is written."""
    opened = site.open()
    site.run(opened, [0])
    if what == "changed":
        site.input("a.parquet", 5)
    else:
        (site.folder / "in/a.parquet").unlink()
    before = site.store.list()
    with pytest.raises(InputError, match=r"a\.parquet") as caught:
        site.open()
    assert caught.value.exit_code == 2 and "batchrun discard" in caught.value.hint
    assert before == site.store.list()


def test_an_unfinished_file_may_change_or_vanish(site: Site) -> None:
    """Its shards are void, and the new version is planned under new numbers."""
    opened = site.open()
    site.run(opened, [0])
    site.input("b.parquet", 9)
    again = site.open()
    assert [(shard.number, shard.num_rows) for shard in again.shards] == [(0, 3), (2, 9)]
    (site.folder / "in/b.parquet").unlink()
    assert [shard.number for shard in site.open().shards] == [0]


def test_a_worker_at_input_that_changed_publishes_nothing_more(site: Site) -> None:
    """Its part would stand beside that of the new rows; workers of who planned these may."""
    with RunLock(site.store, run_id(site.semantic)) as lock:
        old = site.open()
        site.input("c.parquet", 1)
        site.open()
        old.directory.check_stands(lock.epoch)
    write(site.folder / "in/b.parquet", prompts(9))
    with RunLock(site.store, run_id(site.semantic)) as lock:
        opened = site.open()
        with pytest.raises(StorageError, match="another driver has planned it anew"):
            old.directory.check_stands(1)
        opened.directory.check_stands(lock.epoch)
    assert lock.epoch == 2
    with RunLock(site.store, run_id(site.semantic)) as lock:
        assert lock.epoch == 3


def test_the_limit_counts_over_a_growing_input(site: Site) -> None:
    """The first N rows of all submits together."""
    site.rule = replace(site.rule, limit=5)
    assert [shard.num_rows for shard in site.open().shards] == [3, 2]
    site.input("c.parquet", 9)
    assert [shard.num_rows for shard in site.open().shards] == [3, 2]


def test_a_later_file_must_fit_the_parts_that_exist(site: Site) -> None:
    """Parts of one run have one schema, for all readers."""
    columns = InputColumns(prompt="prompt", carried=("n",))
    site.rule = PlanRule(columns, max_tokens=16)
    write(site.folder / "in/a.parquet", {**prompts(1), "n": [1]})
    write(site.folder / "in/b.parquet", {**prompts(1), "n": [1]})
    site.open()
    write(site.folder / "in/c.parquet", {**prompts(1), "n": ["x"]})
    with pytest.raises(InputError, match="'n' is string"):
        site.open()


def test_a_changed_job_is_refused_with_the_differences(site: Site) -> None:
    """What changed, from what to what, and the ways on."""
    site.open()
    site.semantic = {"model": {"path": "tiny"}, "generation": {"temperature": 0.7, "n": 2}}
    for attempt in (site.open, lambda: check_output(site.store, site.semantic)):
        with pytest.raises(OutputError, match="another job") as caught:
            attempt()
        for text in (
            "generation.temperature: 0.6 -> 0.7",
            "generation.n: (not set) -> 2",
            "generation.stop: [] -> (not set)",
        ):
            assert text in caught.value.message
        assert "model.path" not in caught.value.message
        assert "batchrun discard" in caught.value.hint


@pytest.mark.parametrize("name", ["part-000000-deadbeef.parquet", "_SUCCESS", "other.parquet"])
def test_an_output_with_foreign_files_is_refused(site: Site, name: str) -> None:
    """Somebody else's table is neither mixed with ours nor touched."""
    site.store.put(name, b"foreign")
    with pytest.raises(OutputError, match=name):
        site.open()
    assert [name] == [item.path for item in site.store.list()]


def test_a_parquet_file_that_is_no_part_is_refused_on_resume(site: Site) -> None:
    """Readers would take its rows for ours."""
    opened = site.open()
    site.store.put("part-000000-deadbeef.parquet", b"x")
    with pytest.raises(OutputError, match="no part of this run"):
        site.open()
    assert opened.shards


def test_files_that_are_no_table_do_no_harm(site: Site) -> None:
    """A note beside the parts is nobody's business."""
    site.store.put("notes.txt", b"x")
    site.store.put("_other/x.parquet", b"x")
    assert len(site.open().shards) == 2


def test_of_two_attempts_the_first_part_stands(any_site: Site) -> None:
    """A late attempt is told what is there; the bytes never change."""
    site = any_site
    opened = site.open()
    shard = opened.shards[0]
    first = site.publish(opened, shard, "1-1")
    before = site.store.read(first.name)
    assert first == site.publish(opened, shard, "2-1")
    assert before == site.store.read(first.name)
    assert len(site.parts()) == 1


def test_a_part_whose_worker_died_before_the_record_is_taken_over(any_site: Site) -> None:
    """The record is made again from the part, with the same sums."""
    site = any_site
    site.rule = replace(site.rule, n=2)
    opened = site.open()
    (part,) = site.run(opened, [1])
    site.store.delete([f"_batchrun/{opened.directory.run}/parts/000001.json"])
    assert {1: replace(part, attempt="")} == site.open().parts
    assert {1: replace(part, attempt="")} == site.open().parts


def test_journaled_rows_of_a_stopped_run_are_done(any_site: Site) -> None:
    """`status` counts from storage alone what waits for the next submit: whole rows, once."""
    site = any_site
    site.semantic = {"generation": {"n": 2}}
    site.rule, site.scored = replace(site.rule, n=2), True
    opened = site.open()
    site.run(opened, [0])
    with ShardReader(opened.shards[1], opened.schema) as reader:
        rows = list(reader)
    samples = [
        replace(completion(row, sample), verdict=Verdict(sample == 0))
        for row in rows[:3]
        for sample in range(2)
    ]
    for number, shard in enumerate(opened.shards):
        lease = Lease(shard, 1, "000001-000001", Rows.all(shard.num_rows))
        JournalWriter(site.store, opened.directory.run, lease).flush(samples[: 5 + number])
    status = read_status(site.store)
    assert (status.live, status.journaled_rows, status.rows_left) == (False, 3, 1)
    assert status.counts.rows == 6
    assert status.counts.prompt_tokens == opened.directory.recorded(opened.shards)[
        0
    ].counts.prompt_tokens + sum(item.prompt_tokens for item in samples)
    scores = status.counts.scores
    assert scores is not None and scores.num_rows == 6
    site.run(opened, [1])
    assert read_status(site.store).journaled_rows == 0, "published rows count once"


def test_scores_are_in_records_manifest_status_and_success(any_site: Site) -> None:
    """Accuracy is known from the bookkeeping alone, also of a part whose record was lost."""
    site = any_site
    site.rule, site.scored = replace(site.rule, n=2), True
    opened = site.open()
    site.run(opened)
    site.store.delete([f"_batchrun/{opened.directory.run}/parts/000001.json"])
    again = site.open()
    assert again.parts[1].counts.scores == Scores((2, 2, 0), majority_correct=2)
    counts = again.directory.finish(again.shards, {}, success=True)
    assert counts.scores == Scores((3, 4, 0), majority_correct=4)
    assert read_status(site.store).counts == counts
    success = json.loads(site.store.read(SUCCESS) or b"")
    assert success["evaluation"] == counts.scores.report()
    assert (success["evaluation"]["correct"], success["evaluation"]["samples"]) == (4, 2)
    manifest = json.loads(site.store.read(success["manifest"]) or b"")
    assert Counts.from_json(manifest["counts"]) == counts


def test_malformed_tool_calls_are_counted_again_from_the_part(any_site: Site) -> None:
    """A part whose commit record was lost tells the same counts, and so does the whole run."""
    site = any_site
    site.tools = True
    opened = site.open()
    site.publish(opened, opened.shards[0], "<TOOLCALL>")
    site.publish(opened, opened.shards[1])
    site.store.delete([f"_batchrun/{opened.directory.run}/parts/000000.json"])
    again = site.open()
    assert [part.counts.malformed_tool_calls for part in again.parts.values()] == [3, 0]
    counts = again.directory.finish(again.shards, {}, success=True)
    assert counts.malformed_tool_calls == 3
    assert json.loads(site.store.read(SUCCESS) or b"")["malformed_tool_calls"] == 3


def test_records_of_earlier_versions_are_read(site: Site) -> None:
    """A run that was begun before there were scores goes on, and says nothing of accuracy."""
    opened = site.open()
    site.run(opened)
    for number in (0, 1):
        path = f"_batchrun/{opened.directory.run}/parts/{number:06d}.json"
        record = json.loads(site.store.read(path) or b"")
        del record["counts"]["scores"], record["counts"]["malformed_tool_calls"]
        site.store.put(path, json.dumps(record).encode())
    again = site.open()
    assert [part.counts.rows for part in again.parts.values()] == [3, 4]
    again.directory.finish(again.shards, {}, success=True)
    assert "evaluation" not in json.loads(site.store.read(SUCCESS) or b"")
    progress = Progress(epoch=1, total_rows=7, counts=Counts(5, scores=Scores((1, 4), 4)))
    again.directory.write_progress(progress)
    assert again.directory.read_progress() == progress


def test_parts_by_their_records(site: Site) -> None:
    """A commit record gives the part back; damage is told."""
    part = Part(1, "x", "a", 2, "3", 4, Counts(5))
    assert part == part_from_json(part_to_json(part))
    for data in (b"{}", b"null", b"[]", b"x", b"\xff"):
        with pytest.raises(ValueError):
            part_from_json(data)
    opened = site.open()
    site.run(opened)
    site.store.put(f"_batchrun/{opened.directory.run}/parts/000001.json", b"{}")
    with pytest.raises(OutputError, match=r"000001\.json is damaged"):
        site.open()


@pytest.mark.parametrize("what", ["missing", "altered"])
def test_a_finished_part_that_is_gone_or_altered_is_refused(site: Site, what: str) -> None:
    """A person decides; nothing is generated over it."""
    opened = site.open()
    (part,) = site.run(opened, [0])
    if what == "missing":
        site.store.delete([part.name])
    else:
        site.store.put(part.name, b"x")
    with pytest.raises(OutputError, match=part.name):
        site.open()


def test_a_foreign_object_in_a_parts_place_fails_the_shard_and_stays(any_site: Site) -> None:
    """Neither overwritten nor counted as ours."""
    site = any_site
    opened = site.open()
    shard = opened.shards[0]
    name = part_name(opened.directory.run, shard)
    foreign = write(site.folder / "foreign.parquet", prompts(3)).read_bytes()
    for body in (b"junk", foreign):
        site.store.put(name, body)
        with pytest.raises(ShardError, match="is not the part of this run"):
            site.publish(opened, shard)
        assert body == site.store.read(name)


def test_a_run_ends_beside_a_foreign_object(site: Site) -> None:
    """Its shard stands in the manifest as failed, the others with their parts."""
    opened = site.open()
    site.store.put(part_name(opened.directory.run, opened.shards[0]), b"junk")
    site.run(opened, [1])
    counts = opened.directory.finish(opened.shards, {0: "not ours"}, success=False)
    assert counts.rows == 4
    manifest = site.store.read(f"_batchrun/{opened.directory.run}/manifest-0001.json")
    assert manifest is not None
    found = json.loads(manifest)
    assert found["failed"] == {"0": "not ours"} and len(found["parts"]) == 1


def test_part_names_differ_by_run_and_by_input() -> None:
    """A worker of another run or another input can never take a planned name."""
    shard = Shard(3, "a.parquet", "/in/a.parquet", 10, "f", (0,), 0, 5)
    names = {
        part_name(run, replace(shard, **changes))  # type: ignore[arg-type]
        for run, changes in (
            ("r1", {}),
            ("r2", {}),
            ("r1", {"fingerprint": "g"}),
            ("r1", {"size_bytes": 11}),
            ("r1", {"row_groups": (1,)}),
            ("r1", {"first_row": 1}),
            ("r1", {"num_rows": 4}),
            ("r1", {"path": "b.parquet"}),
        )
    }
    assert len(names) == 8
    assert all(PART_NAME.fullmatch(name) and name.startswith("part-000003-") for name in names)
    assert part_name("r1", shard) == part_name("r1", replace(shard, uri="s3://elsewhere/a"))


def test_the_run_id_is_of_the_content_alone() -> None:
    """The order of keys does not matter, every value does."""
    assert run_id({"a": 1, "b": {"c": 2, "d": 3}}) == run_id({"b": {"d": 3, "c": 2}, "a": 1})
    assert run_id({"a": 1}) != run_id({"a": 2}) != run_id({"a": "2"})
    assert len(run_id({})) == 16


def test_ending_with_shards_missing_is_impossible(site: Site) -> None:
    """Truth is the listing, not what somebody reported."""
    opened = site.open()
    site.run(opened, [0])
    with pytest.raises(BatchrunError, match="1 shards have no part"):
        opened.directory.finish(opened.shards, {}, success=True)
    with pytest.raises(BatchrunError):
        opened.directory.finish(opened.shards, {1: "damaged"}, success=True)
    assert site.store.info(SUCCESS) is None


def test_a_failed_shard_stands_in_the_manifest_and_is_tried_again(site: Site) -> None:
    """No _SUCCESS; the next submit forgets the failure and runs the shard."""
    opened = site.open()
    site.run(opened, [0])
    opened.directory.mark_failed(opened.shards[1], ShardError("damaged"))
    assert opened.directory.failed() == {1: "damaged"}
    opened.directory.finish(opened.shards, {1: "damaged"}, success=False)
    assert site.store.info(SUCCESS) is None
    manifest = site.store.read(f"_batchrun/{opened.directory.run}/manifest-0001.json")
    assert json.loads(manifest or b"")["failed"] == {"1": "damaged"}
    assert read_status(site.store).failed_shards == {1: "damaged"}
    again = site.open()
    assert again.directory.failed() == {}
    site.run(again)
    again.directory.finish(again.shards, {}, success=True)
    assert site.store.info(SUCCESS) is not None


def test_two_drivers_make_one_plan(site: Site) -> None:
    """The second adopts what the first has saved, also when it looked before."""
    files = list_input(str(site.folder / "in"))
    put_if_absent = site.store.put_if_absent
    other = Site(site.folder, Store.open(site.store.url), site.rule, site.semantic)
    once: list[OpenedRun] = []

    def overtaken(path: str, *rest: object) -> bool:
        if path.endswith("plan-0001.parquet") and not once:
            write(site.folder / "in/c.parquet", prompts(1))
            once.append(other.open())
            (site.folder / "in/c.parquet").unlink()
        return put_if_absent(path, *rest)  # type: ignore[arg-type]

    site.store.put_if_absent = overtaken  # type: ignore[method-assign]
    mine = open_run(site.store, site.semantic, {}, files, site.rule)
    assert len(once[0].shards) == 3
    assert once[0].shards[:2] == mine.shards


def test_status_from_object_storage_alone(any_site: Site) -> None:
    """What is planned, done, failed and left, and what the driver says of itself."""
    site = any_site
    with pytest.raises(OutputError, match="holds no run"):
        read_status(site.store)
    opened = site.open()
    site.run(opened, [0])
    progress = Progress(epoch=1, total_rows=7, counts=Counts(5, 1), workers=2, eta_s=3.5)
    opened.directory.write_progress(progress)
    status = read_status(site.store)
    assert (False, False, 2, 1, 7, 3, 4, progress) == (
        status.live,
        status.succeeded,
        status.num_shards,
        status.shards_done,
        status.total_rows,
        status.counts.rows,
        status.rows_left,
        status.progress,
    )
    site.store.put(LOCK, LockState(1, 1, False, Holder.this_process()).to_bytes())
    live = read_status(site.store)
    assert (True, 5, os.getpid()) == (live.live, live.counts.rows, live.holder and live.holder.pid)
    site.store.put(LOCK, LockState(1, 1, True, Holder.this_process()).to_bytes())
    site.run(opened, [1])
    opened.directory.finish(opened.shards, {}, success=True)
    ended = read_status(site.store)
    assert (
        ended.live,
        ended.succeeded,
        ended.counts.rows,
        ended.rows_left,
    ) == (False, True, 7, 0)


def test_discard_deletes_the_run_and_nothing_else(any_site: Site) -> None:
    """Parts, _SUCCESS and bookkeeping go; other files stay; the output can be used again."""
    site = any_site
    opened = site.open()
    site.run(opened)
    opened.directory.finish(opened.shards, {}, success=True)
    site.store.put("notes.txt", b"mine")
    site.store.put("sub/part-000000-deadbeef.parquet", b"mine")
    discard(site.store)
    assert [item.path for item in site.store.list()] == [
        "notes.txt",
        "sub/part-000000-deadbeef.parquet",
    ]
    site.semantic = {"other": "job"}
    assert len(site.open().shards) == 2
    with pytest.raises(OutputError, match="holds no run"):
        discard(Store.open(str(site.folder / "empty")))


def test_discard_refuses_while_the_run_lives(site: Site) -> None:
    """Exit 4, and nothing is deleted."""
    site.open()
    site.store.put(LOCK, LockState(1, 1, False, Holder.this_process()).to_bytes())
    before = site.store.list()
    with pytest.raises(OutputHeldError, match="is live"):
        discard(site.store)
    assert before == site.store.list()


def test_an_input_of_no_rows_is_a_run(site: Site) -> None:
    """0 rows simply work: a part without rows, and success."""
    site.input("a.parquet", 0)
    (site.folder / "in/b.parquet").unlink()
    opened = site.open()
    site.run(opened)
    assert Counts() == opened.directory.finish(opened.shards, {}, success=True)
    assert ds.dataset(str(site.folder / "out")).count_rows() == 0
    assert len(site.parts()) == 1

"""Rows that failed are run again, and a changed job goes on beside what is finished."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
import pytest

from batchrun.cli import main
from batchrun.cluster.opening import check_retry
from batchrun.cluster.rerun import recorded_job
from batchrun.cluster.summary import Retried, Summary
from batchrun.data.local import LocalStore
from batchrun.data.status import read_status
from batchrun.data.store import Store
from batchrun.data.sweeper import JournalSweeper
from batchrun.data.verify import verify_run
from batchrun.errors import OutputError
from batchrun.job import parse_job
from batchrun.records import HEALING

from .conftest import WarmRuns, Work, answer_of, sums

AT_ONCE, LATE = 1, 24  # tokens: of rows that end with their first step, and of others
QUICK = {"reasoning": False, "n": 2, "temperature": 0.8, "ignore_eos": True}
LIMIT = 1e-6  # seconds: whatever takes a second step is too late

pytestmark = pytest.mark.usefixtures("cluster")


def write_rows(work: Work) -> None:
    """Two files, of which some rows take longer than one step."""
    for name, start, tokens in (
        ("a", 1, [AT_ONCE, LATE, AT_ONCE, AT_ONCE, LATE]),
        ("b", 50, [AT_ONCE, AT_ONCE]),
        ("c", 80, [LATE, AT_ONCE]),
    ):
        prompts = sums(len(tokens), start)
        answers = [answer_of(prompt) for prompt in prompts]
        work.write(name, prompts, max_tokens=tokens, answer=answers)


def sections(**errors: object) -> dict[str, dict[str, object]]:
    """Of a job over these rows, with two samples each."""
    return {
        "input": {"overrides": ["max_tokens"], "columns": ["prompt", "max_tokens"]},
        "generation": QUICK,
        "resources": {"max_sequences": 4},
        "errors": errors,
        "evaluate": {"answer_column": "answer", "scorer": "number"},
    }


Run = Callable[..., Summary]


@pytest.fixture(scope="module")
def run(warm: WarmRuns) -> Run:
    """Submits a job in this session's cluster, equal to the byte."""
    return partial(warm, deterministic=True)


@pytest.fixture(scope="module")
def retry(warm: WarmRuns) -> Run:
    """Retries an output by what its run recorded."""

    def again(work: Work, output: str, *overrides: str, **options: Any) -> Summary:
        source, path = recorded_job(str(work.folder / output), overrides)
        checked = check_retry(parse_job(source), source, HEALING, path)
        return warm.checked(checked, deterministic=True, **options)

    return again


def checksums(work: Work, output: str) -> dict[str, str]:
    """Name -> checksum of every part."""
    folder = work.folder / output
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in work.parts(output)
    }


def is_sound(work: Work, output: str) -> None:
    """`batchrun verify` finds nothing."""
    assert verify_run(Store.open(str(work.folder / output))).problems == ()


class Crash(BaseException):
    """The driver dies here."""


def short_of_time(work: Work, output: str) -> dict[str, object]:
    """A job that some rows cannot meet, more than it allows."""
    return work.raw(output, **sections(row_timeout_s=LIMIT, max_failed_rows=1))


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The rows, in `out` what becomes of them when all have time, in `late` when they have not."""
    work = Work(tmp_path_factory.mktemp("retry"))
    write_rows(work)
    assert run(work.raw("out", **sections())).exit_code == 0
    late = run(short_of_time(work, "late"))
    assert (late.exit_code, late.failed_rows) == (3, 3)
    return work


def test_a_shard_that_changed_cannot_be_retried_and_stays(undisturbed: Work, retry: Run) -> None:
    """Its neighbours are healed all the same, from where their files are now; exit code 3."""
    work = undisturbed
    shutil.copytree(work.folder / "late", work.folder / "other")
    shutil.copytree(work.folder / "in", work.folder / "moved")
    (work.folder / "moved/c.parquet").write_bytes((work.folder / "in/b.parquet").read_bytes())
    before = checksums(work, "other")
    place = f"input.path={work.folder / 'moved'}"
    summary = retry(work, "other", "errors.row_timeout_s=null", place)
    assert summary.exit_code == 3 and list(summary.failed_shards) == ["000002 (c.parquet)"]
    assert "1 shards could not be run again" in str(summary.error)
    assert summary.retried == Retried(tuple(sorted(HEALING)), 3, 2, 2)
    after = checksums(work, "other")
    assert [after[name] == before[name] for name in after] == [False, True, True]
    is_sound(work, "other")
    status = read_status(Store.open(str(work.folder / "other")))
    assert (status.counts.failed_rows, status.succeeded) == (1, False)


def test_a_retry_heals_the_rows_that_failed_so(
    undisturbed: Work,
    warm: WarmRuns,
    run: Run,
    retry: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It may be stopped, or die in the middle of replacing a part, and goes on; then the output is
    that of an undisturbed run, scores, counts and all, and a second retry has nothing to do."""
    work = undisturbed
    before, rows = checksums(work, "late"), work.rows("late")
    assert {row["error"] is None for row in rows if row["max_tokens"] == LATE} == {False}

    healing = ("errors.row_timeout_s=null",)
    stop = threading.Event()
    stop.set()
    stopped = retry(work, "late", *healing, stop=stop)
    assert stopped.error is not None and (stopped.exit_code, stopped.counts.rows) == (75, 9)
    assert "0 of 3 rows to be retried are done" in stopped.error.message
    copy = LocalStore.copy

    def copy_and_die(self: LocalStore, source: str, target: str) -> None:
        copy(self, source, target)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "copy", copy_and_die)
        with pytest.raises(Crash):
            retry(work, "late", *healing)
    assert "retry was cut off" in verify_run(Store.open(str(work.folder / "late"))).problems[0]
    changed = work.job_file(
        "late", **{**sections(row_timeout_s=60.0), "generation": {**QUICK, "seed": 1}}
    )
    with pytest.raises(OutputError, match=r"what differs: generation\.seed: 0 -> 1"):
        main(["retry", str(changed)], standalone_mode=False)
    work.job_file("late", **sections(row_timeout_s=60.0))
    warm.close()
    capsys.readouterr()
    main(["retry", str(changed), "--deterministic", "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert (told["exit_code"], told["rows"]["failed"]) == (0, 0)
    assert told["retried"]["healed"] == told["retried"]["rows"] <= 1, "the first is in its place"
    is_sound(work, "late")
    assert work.rows("late") == work.rows("out")
    after = checksums(work, "late")
    assert [name for name in after if after[name] == before[name]] == [work.parts("late")[1]]
    status, wanted = (read_status(Store.open(str(work.folder / x))) for x in ("late", "out"))
    assert (status.succeeded, status.counts) == (True, wanted.counts)
    assert status.counts.scores is not None and sum(status.counts.scores.rows_by_correct) == 9
    again = run(short_of_time(work, "late"))
    assert again.exit_code == 0 and checksums(work, "late") == after
    nothing = retry(work, "late")
    assert (nothing.exit_code, nothing.retried) == (0, Retried(tuple(sorted(HEALING)), 0, 0, 0))


def test_finished_parts_stay_when_the_job_changes(
    work: Work, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that changed after an interrupt is refused with the ways on; with --keep-finished it
    runs the rest, and the books say what is whose. Going back is the same."""
    work.write("a", sums(3), max_tokens=pa.array([AT_ONCE] * 3, pa.int64()))
    work.write("b", sums(2, start=30), max_tokens=pa.array([None] * 2, pa.int64()))
    given = sections()
    del given["evaluate"]

    def job(max_tokens: int, **more: object) -> dict[str, object]:
        generation = {**QUICK, "max_tokens": max_tokens, **more}
        return work.raw("out", **{**given, "generation": generation})

    stop = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(JournalSweeper, "published", lambda self, number: stop.set())
        first = run(job(4000), stop=stop)
    assert (first.exit_code, first.counts.rows) == (75, 3)
    [name] = work.parts("out")
    kept = checksums(work, "out")[name]
    with pytest.raises(OutputError) as refused:
        run(job(5))
    assert "generation.max_tokens: 4000 -> 5" in refused.value.message
    for way in ("another output", "batchrun discard", "--keep-finished"):
        assert way in refused.value.hint
    books = sorted(path.name for path in (work.folder / "out/_batchrun").iterdir())
    with pytest.raises(OutputError, match="other columns"):
        run(job(5, logprobs=1), keep_finished=True)
    assert sorted(path.name for path in (work.folder / "out/_batchrun").iterdir()) == books
    assert run(job(5), keep_finished=True).exit_code == 0
    assert checksums(work, "out")[name] == kept
    tokens = [row["completion_tokens"] for row in work.rows("out")]
    assert tokens == [AT_ONCE] * 6 + [5] * 4
    store = Store.open(str(work.folder / "out"))
    verdict, status = verify_run(store), read_status(store)
    assert (verdict.problems, verdict.kept) == ((), {first.run_id: 1})
    assert (status.succeeded, status.kept) == (True, {first.run_id: 1})
    after = checksums(work, "out")
    for raw, keeps in ((job(5), False), (job(5), True), (job(4000), True), (job(5), True)):
        assert run(raw, keep_finished=keeps).generated_rows == 0
        assert checksums(work, "out") == after
        is_sound(work, "out")

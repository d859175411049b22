"""What befalls a worker: it is killed, hangs, runs out of memory, cannot load, meets a bad row."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from batchrun.cluster.tally import Progress
from batchrun.data.journal import read_journal
from batchrun.data.layout import strikes_folder
from batchrun.data.plan import read_plan
from batchrun.data.schema import InputColumns
from batchrun.errors import CheckpointError
from tests.chaos.conftest import (
    POISON,
    SEQUENCES,
    TOKENS,
    Field,
    Rows,
    Watcher,
    busy_workers,
    meanwhile,
    wait_for,
)
from tests.chaos.zombie import is_stopped, zombie_process
from tests.integration.conftest import is_alive, sums

Make = Callable[[Sequence[Sequence[str]]], tuple[Field, Rows]]


@pytest.mark.chaos
@pytest.mark.fault(1, "worker killed while it generates, five times")
def test_killed_over_and_over(field: Field, expected: Rows) -> None:
    """Whenever a worker is killed, a later one goes on from the journal."""
    field.plan("killed", engine={"step_s": 0.04})
    num_kills = [0]

    def kill(ended: threading.Event) -> None:
        for _ in range(5):
            before = field.sampled("killed")
            if not wait_for(lambda at=before: field.sampled("killed") > at + 150, ended):
                return
            for pid in busy_workers()[:1]:
                field.fault()
                os.kill(pid, signal.SIGKILL)
                num_kills[0] += 1

    with meanwhile(kill):
        # A kill from outside may hit a row that runs alone; that is not what this is about.
        summary = field.run("killed", errors={"max_retries": 9})
    assert summary.exit_code == 0 and summary.restarts == num_kills[0] >= 3
    field.check("killed", expected, losses=num_kills[0], step_s=0.04)


@pytest.mark.fault(2, "worker killed between the last flush and its part")
def test_killed_before_publishing(field: Field, expected: Rows) -> None:
    """The next worker publishes from the journal and the little that came after."""
    field.plan("before", puts=[{"match": r"^part-", "when": "before", "do": "kill", "times": 1}])
    summary = field.run("before")
    assert (summary.exit_code, summary.restarts) == (0, 1)
    field.check("before", expected, losses=1)


@pytest.mark.chaos
@pytest.mark.fault(3, "worker killed after its part stands, before it says so")
def test_killed_after_publishing(field: Field, expected: Rows) -> None:
    """The part is found, and nobody generates it again."""
    field.plan("after", puts=[{"match": r"^part-", "when": "after", "do": "kill", "times": 1}])
    summary = field.run("after")
    assert (summary.exit_code, summary.restarts) == (0, 1)
    field.check("after", expected, losses=1)


@pytest.mark.chaos
@pytest.mark.fault(2, "worker killed after a flush, before it says so, twice")
def test_killed_after_a_flush(field: Field, expected: Rows) -> None:
    """What that flush wrote counts."""
    rule = {"match": r"/journal/", "when": "after", "do": "kill", "times": 2}
    field.plan("flushed", puts=[rule])
    summary = field.run("flushed")
    assert (summary.exit_code, summary.restarts) == (0, 2)
    field.check("flushed", expected, losses=2)


@pytest.mark.chaos
@pytest.mark.fault(16, "all workers told to go every two seconds")
def test_preemption_storm(field: Field, expected: Rows) -> None:
    """With notice nothing is lost, nobody is blamed, and the run still gets on."""
    field.plan("storm")
    num_gone = [0]

    def preempt(ended: threading.Event) -> None:
        while num_gone[0] < 8 and not ended.wait(0.5):
            before = field.sampled("storm")
            if not wait_for(lambda at=before: field.sampled("storm") > at + 100, ended):
                return
            for pid in busy_workers():
                field.fault()
                os.kill(pid, signal.SIGTERM)
                num_gone[0] += 1

    with meanwhile(preempt):
        summary = field.run("storm", resources={"workers": 2})
    assert summary.exit_code == 0 and summary.restarts >= 3
    assert field.store("storm").list(strikes_folder(summary.run_id)) == ()
    assert summary.discarded_tokens == 0
    field.check("storm", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(15, "a worker is told to go, and its machine stays")
def test_a_notice_that_is_not_meant(field: Field, expected: Rows) -> None:
    """Ray takes no notice back, so another worker comes in its place: the run goes on at full
    strength, nothing is sampled twice, and nobody is blamed."""
    field.plan("stays", engine={"step_s": 0.12})
    told: list[int] = []
    strength: list[int] = []

    def notice(ended: threading.Event) -> None:
        if wait_for(lambda: field.sampled("stays") > 50 and len(busy_workers()) == 2, ended):
            field.fault()
            told.append(busy_workers()[0])
            os.kill(told[0], signal.SIGTERM)

    def look(progress: Progress) -> None:
        if told and not is_alive(told[0]):
            strength.append(progress.workers["ready"])

    with meanwhile(notice):
        summary = field.run("stays", Watcher(look), resources={"workers": 2})
    assert (summary.exit_code, summary.restarts, summary.discarded_tokens) == (0, 1, 0)
    assert max(strength) == 2 and field.recovery_s("stays") is not None
    assert field.store("stays").list(strikes_folder(summary.run_id)) == ()
    field.check("stays", expected, losses=0, step_s=0.12)


@pytest.mark.fault(18, "the engine fails for one row")
def test_a_row_that_the_engine_refuses(own_field: Make) -> None:
    """That row is an error row; its neighbours and the worker never notice."""
    poison = f"{POISON} 1"
    field, expected = own_field([["a", poison, "b", "c"], ["d", "e"]])
    field.plan("raises", prompts=[{"text": POISON, "do": "raise", "times": None}])
    summary = field.run("raises", errors={"max_failed_rows": 1})
    assert (summary.exit_code, summary.failed_rows, summary.restarts) == (0, 1, 0)
    field.check("raises", expected, losses=0, failed={poison: "engine: "})


@pytest.mark.fault(19, "the engine's process dies with four rows in it, once")
def test_a_death_that_is_nobodys_fault(field: Field, expected: Rows) -> None:
    """All rows in flight are suspects, none is guilty: each of them is answered."""
    rule = {"text": "question 1-5", "do": "die", "times": 1}
    field.plan("dies", prompts=[rule])
    summary = field.run("dies")
    assert (summary.exit_code, summary.failed_rows, summary.restarts) == (0, 0, 1)
    assert len(field.store("dies").list(strikes_folder(summary.run_id))) == 1
    field.check("dies", expected, losses=1)


@pytest.mark.chaos
@pytest.mark.fault(20, "out of memory in steps of more than two sequences")
def test_out_of_memory(work: object, own_field: Make) -> None:
    """The engine runs fewer sequences from then on; no row is blamed, no worker is lost."""
    field, _ = own_field([sums(9), sums(5, start=30)])
    for name, most in (("whole", None), ("halved", 2)):
        field.plan(name, engine={"real": True}, max_batch=most)
        summary = field.run(name)
        assert (summary.exit_code, summary.restarts, summary.failed_rows) == (0, 0, 0)
    assert field.rows("halved") == field.rows("whole")
    field.record("lost", 0)
    field.record("twice", 0)


@pytest.mark.chaos
@pytest.mark.fault(21, "the engine stands still, once")
def test_a_hang(field: Field, expected: Rows) -> None:
    """The worker is replaced, and where it stood is said."""
    field.plan("hangs", prompts=[{"text": "question 0-7", "do": "hang", "times": 1}])
    view = Watcher()
    summary = field.run("hangs", view, errors={"hang_timeout_s": 2.0})
    assert (summary.exit_code, summary.restarts, summary.failed_rows) == (0, 1, 0)
    assert any("_stand_still" in line for line in view.lines)
    field.check("hangs", expected, losses=1)


@pytest.mark.chaos
@pytest.mark.fault(22, "two rows that kill whatever runs them")
def test_poison(own_field: Make) -> None:
    """They are found by running suspects alone, within few deaths, and are the only ones lost."""
    first, second = f"{POISON} 1", f"{POISON} 2"
    neighbours = [f"neighbour {number}" for number in range(14)]
    field, expected = own_field(
        [[*neighbours[:5], first, *neighbours[5:9], second], neighbours[9:]]
    )
    field.plan("poison", prompts=[{"text": POISON, "do": "die", "times": None}])
    summary = field.run("poison", errors={"max_failed_rows": 2, "max_retries": 1})
    assert (summary.exit_code, summary.failed_rows) == (0, 2)
    # For each: with its neighbours, in a group, and alone until its retries are used up.
    assert summary.restarts <= 2 * (2 + 2)
    guilty = {first: "worker_lost: ", second: "worker_lost: "}
    field.check("poison", expected, losses=summary.restarts, failed=guilty)


@pytest.mark.fault(26, "the model cannot be loaded")
def test_a_model_that_cannot_be_loaded(field: Field, expected: Rows) -> None:
    """The run ends and says why; no shard is blamed, and the next submit does everything."""
    field.plan("load", load="raise")
    with pytest.raises(CheckpointError, match="the weights are damaged"):
        field.run("load")
    field.plan("load", engine={"step_s": 0.0})
    summary = field.run("load")
    assert (summary.exit_code, summary.failed_shards) == (0, {})
    field.check("load", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(34, "a worker runs out of the host's memory, once")
def test_host_memory(field: Field, expected: Rows) -> None:
    """A worker that gets no memory any more is replaced."""
    field.plan("memory", prompts=[{"text": "question 2-4", "do": "memory", "times": 1}])
    summary = field.run("memory")
    assert (summary.exit_code, summary.restarts, summary.failed_rows) == (0, 1, 0)
    field.check("memory", expected, losses=1)


@pytest.mark.chaos
@pytest.mark.fault(7, "a worker stops before its put, is replaced, and goes on")
def test_a_zombie(field: Field, expected: Rows) -> None:
    """Its machine stands still while others publish; when it comes back it changes nothing.

    The zombie is a worker that no Ray watches over, so nobody ends it.
    """
    field.plan("zombie", puts=[{"match": r"^part-", "when": "before", "do": "stop", "times": 1}])
    raw = field.raw("zombie")
    with zombie_process(raw) as zombie:
        deadline = time.monotonic() + 60
        while not is_stopped(zombie.pid):
            assert zombie.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        field.fault()
        before = field.sampled("zombie")
        summary = field.run("zombie")
        assert summary.exit_code == 0
        kept = {item.path: item for item in field.store("zombie").list(recursive=False)}
        os.kill(zombie.pid, signal.SIGCONT)
        out, _ = zombie.communicate(timeout=60)
        assert zombie.returncode == 0
        owner = out.strip().splitlines()[-1]
        assert owner.startswith(f"{summary_epoch(field, summary.run_id):06d}-")
        assert {item.path: item for item in field.store("zombie").list(recursive=False)} == kept
    assert before > 0
    field.check("zombie", expected, losses=1)


def summary_epoch(field: Field, run: str) -> int:
    """The epoch of the latest driver."""
    return len(field.store("zombie").list(f"_batchrun/{run}/epochs"))


@pytest.mark.fault(35, "journal objects torn and flipped between two submits")
def test_a_torn_journal(field: Field, expected: Rows) -> None:
    """What is damaged is generated again, the rest is taken; it is never an error."""
    field.plan("torn")
    stop = threading.Event()

    def watch(ended: threading.Event) -> None:
        if wait_for(lambda: field.sampled("torn") > 600, ended):
            stop.set()

    with meanwhile(watch):
        first = field.run("torn", stop=stop)
    assert first.exit_code == 75
    folder = field.work.folder / "torn" / "_batchrun" / first.run_id / "journal"
    objects = sorted(folder.rglob("*.zst"))
    assert objects
    for number, path in enumerate(objects):
        data = bytearray(path.read_bytes())
        if number % 2:
            data = data[: len(data) // 2]
        else:
            data[len(data) // 3] ^= 0xFF
        path.write_bytes(data)
    store = field.store("torn")
    left = 0
    for shard in read_plan(store, first.run_id, InputColumns()).shards.values():
        left += len(read_journal(store, first.run_id, shard).finished)
    field.plan("torn", engine={"step_s": 0.0})
    summary = field.run("torn")
    assert summary.exit_code == 0 and summary.journaled_rows == 0
    # Rows that no journal has any more are generated again, with everything that was sampled.
    most = (len(expected) - first.counts.rows - left) * TOKENS
    assert summary.sampled_tokens <= most
    field.check("torn", expected, losses=SEQUENCES)


@pytest.mark.chaos
@pytest.mark.fault(40, "the journal is deleted again and again while workers run")
def test_a_journal_that_vanishes(field: Field, expected: Rows) -> None:
    """A journal is a saving; without it rows are generated, and nothing else happens."""
    field.plan("vanishing", puts=[{"match": "^part-", "when": "before", "do": "kill", "times": 1}])

    def delete(ended: threading.Event) -> None:
        while not ended.wait(0.1):
            for path in (field.work.folder / "vanishing").rglob("*.zst"):
                path.unlink(missing_ok=True)

    with meanwhile(delete):
        summary = field.run("vanishing", resources={"workers": 2})
    assert (summary.exit_code, summary.restarts) == (0, 1)
    # Whatever a range had journaled may be generated again.
    field.check("vanishing", expected, losses=12)

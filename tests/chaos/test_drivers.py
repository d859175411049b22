"""What befalls drivers: they are killed, there are two at once, the job changes under workers."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import pytest

from batchrun.data.layout import SUCCESS, epochs_folder, strikes_folder
from batchrun.data.status import discard
from batchrun.data.verify import verify_run
from tests.chaos.conftest import POISON, Field, Rows
from tests.chaos.zombie import is_stopped, zombie_process
from tests.integration.conftest import Command

Start = Callable[..., Command]


@pytest.mark.chaos
@pytest.mark.fault(10, "driver killed at eight points of its run")
def test_a_driver_killed_at_many_points(
    field: Field, expected: Rows, batchrun: Start, cluster: str
) -> None:
    """Whenever it was killed, the next submit goes on."""
    field.plan("points")
    store = field.store("points")
    num_losses = 0
    for number in range(8):
        at = 60 + 170 * number
        command = field.command(batchrun, "points", cluster)
        deadline = time.monotonic() + 60
        while command.process.poll() is None and time.monotonic() < deadline:
            # The first ones before there is a token: while it opens, and while workers load.
            if number < 2 and store.list("_batchrun"):
                time.sleep(0.4 * number)
                break
            if number >= 2 and field.sampled("points") >= at:
                break
            time.sleep(0.05)
        if command.process.poll() is None:
            field.fault()
            command.process.kill()
            num_losses += 1
        command.end()
    summary = field.run("points")
    assert summary.exit_code == 0 and num_losses >= 4
    assert store.info(SUCCESS) is not None
    # A killed driver's workers go on until Ray ends them, some seconds later.
    field.check("points", expected, losses=3 * num_losses)


@pytest.mark.chaos
@pytest.mark.fault(12, "two drivers at once")
def test_two_drivers(field: Field, expected: Rows, batchrun: Start, cluster: str) -> None:
    """One of them runs the job, the other ends with exit code 4 and names it."""
    field.plan("two")
    both = [field.command(batchrun, "two", cluster) for _ in range(2)]
    ends = sorted(command.end(timeout_s=120) for command in both)
    assert [code for code, _, _ in ends] == [0, 4]
    assert "another live run holds" in ends[1][2] and "Traceback" not in ends[1][2]
    assert json.loads(ends[0][1])["rows"]["done"] == len(expected)
    field.check("two", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(38, "a driver stands still until another has its lock, and goes on")
def test_a_driver_that_stands_still(
    field: Field, expected: Rows, batchrun: Start, cluster: str
) -> None:
    """The second takes over after 20 s of silence on its own clock; the first finds the lock lost
    when it wakes up, says so, and changes nothing any more."""
    field.plan("still", engine={"step_s": 0.1})
    store = field.store("still")
    first = field.command(batchrun, "still", cluster)
    first.wait_until(lambda: field.sampled("still") > 100)
    (run,) = store.folders("_batchrun")
    field.fault()
    os.kill(first.process.pid, signal.SIGSTOP)
    try:
        second = field.command(batchrun, "still", cluster)
        second.wait_until(lambda: len(store.list(epochs_folder(run))) == 2)
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    code, _, err = first.end()
    assert code == 4 and "Traceback" not in err, err
    code, _, err = second.end(timeout_s=120)
    assert code == 0, err
    field.check("still", expected, losses=2, step_s=0.1)


@pytest.mark.fault(13, "the driver ends between manifest and _SUCCESS")
def test_a_manifest_without_success(field: Field, expected: Rows) -> None:
    """The next submit writes it, and generates nothing."""
    field.plan("nearly", engine={"step_s": 0.0})
    summary = field.run("nearly")
    store = field.store("nearly")
    before = {item.path: item for item in store.list(recursive=False)}
    store.delete([SUCCESS])
    again = field.run("nearly")
    assert (again.exit_code, again.generated_rows, again.restarts) == (0, 0, 0)
    assert summary.run_id == again.run_id
    after = {item.path: item for item in store.list(recursive=False)}
    assert after.keys() == before.keys() and store.info(SUCCESS) is not None
    field.check("nearly", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(23, "a row that kills, and a driver killed after every death")
def test_poison_and_a_new_driver_each_time(
    own_field: Callable[..., tuple[Field, Rows]], batchrun: Start, cluster: str
) -> None:
    """Deaths are counted where no driver's end can take them away: the row is found all the same,
    and its neighbours are answered."""
    poison = f"{POISON} 1"
    field, expected = own_field([["a", "b", poison, "c", "d"], ["e", "f"]])
    field.plan("struck", prompts=[{"text": POISON, "do": "die", "times": None}])
    store = field.store("struck")

    def num_strikes() -> int:
        runs = store.folders("_batchrun")
        return len(store.list(strikes_folder(runs[0]))) if runs else 0

    code, num_drivers = -9, 0
    while code == -9 and num_drivers < 9:
        num_drivers += 1
        seen = num_strikes()
        command = field.command(
            batchrun, "struck", cluster, errors={"max_failed_rows": 1, "max_retries": 1}
        )
        while command.process.poll() is None:
            if num_strikes() > seen:
                command.process.kill()
            time.sleep(0.1)
        code, _, _ = command.end()
    assert (code, num_strikes()) == (0, num_drivers - 1)
    assert num_strikes() <= 2 + 2
    field.check("struck", expected, losses=3 * num_drivers, failed={poison: "worker_lost: "})


@pytest.mark.chaos
@pytest.mark.fault(39, "the job is changed while a worker of the old one lives")
def test_a_changed_job_while_an_old_worker_lives(field: Field, expected: Rows) -> None:
    """The old worker can only write under the old run's names; the new run's parts stay."""
    field.plan("changed", puts=[{"match": "^part-", "when": "before", "do": "stop", "times": 1}])
    old = field.raw("changed", generation={"max_tokens": 20})
    with zombie_process(old) as zombie:
        deadline = time.monotonic() + 60
        while not is_stopped(zombie.pid):
            assert zombie.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        store = field.store("changed")
        discard(store)
        field.plan("changed")
        sampled_before = field.sampled("changed")
        assert field.run("changed").exit_code == 0
        kept = {item.path: item for item in store.list()}
        field.fault()
        os.kill(zombie.pid, signal.SIGCONT)
        zombie.communicate(timeout=60)
        now = {item.path: item for item in store.list()}
        assert {path: now[path] for path in kept} == kept
        # What it wrote has names of its own, and `verify` tells of it.
        strangers = set(now) - set(kept)
        part = next(path for path in strangers if path.startswith("part-"))
        assert any(part in problem for problem in verify_run(store).problems)
        store.delete(strangers)
    assert sampled_before > 0
    field.check("changed", expected, losses=4)

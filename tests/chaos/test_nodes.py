"""What befalls machines: a cluster's head dies, nodes are drained, lost, frozen, and come late."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from batchrun.data.layout import strikes_folder
from tests.chaos.conftest import Field, Rows
from tests.chaos.hosts import can_make_hosts, two_hosts
from tests.integration.conftest import Command, descendants, worker_pids

Start = Callable[..., Command]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(420)]

_QUICK = {  # how soon Ray takes a node for dead
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A Ray cluster of its own on this machine: a head without CPUs, and nodes that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": 80 * 2**20,
                "_system_config": _QUICK,
            },
        )
        self.address = str(self._cluster.address)

    def add(self, num_cpus: int = 1, num_gpus: int = 0) -> Any:
        """A node, for one worker if nothing else is said."""
        return self._cluster.add_node(
            num_cpus=num_cpus, num_gpus=num_gpus, object_store_memory=80 * 2**20, wait=True
        )

    def remove(self, node: Any) -> None:
        """Take a node away at once."""
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        """End the head's processes as a power cut does."""
        for pid in self.pids(self._cluster.head_node):
            os.kill(pid, signal.SIGKILL)

    def pids(self, node: Any) -> list[int]:
        """The processes of a node, workers too."""
        own = [info.process.pid for infos in node.all_processes.values() for info in infos]
        return [*own, *(child for pid in own for child in descendants(pid))]

    def workers(self, node: Any) -> set[int]:
        """The batchrun workers of a node."""
        own = [info.process.pid for infos in node.all_processes.values() for info in infos]
        return {pid for parent in own for pid in worker_pids(parent)}

    def drain(self, node: Any, deadline_s: int) -> None:
        """Tell the cluster that a node will be taken away."""
        subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
                *("--address", self.address, "--node-id", node.node_id),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"),
                *("--deadline-remaining-seconds", str(deadline_s)),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )

    def shutdown(self) -> None:
        """End all of it."""
        self._cluster.shutdown()


@contextmanager
def cluster_of(num_nodes: int) -> Iterator[tuple[Nodes, list[Any]]]:
    """A cluster with so many nodes besides its head."""
    nodes = Nodes()
    try:
        yield nodes, [nodes.add() for _ in range(num_nodes)]
    finally:
        nodes.shutdown()


def wait_until(command: Command, condition: Callable[[], object], timeout_s: float = 90) -> bool:
    """Wait until something holds; False when the command has ended before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if command.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.1)
    return True


def succeeded(command: Command, timeout_s: float = 180) -> None:
    """The command ends well."""
    code, _, err = command.end(timeout_s)
    assert code == 0, err


@pytest.mark.fault(11, "the head of an existing cluster dies")
def test_a_dead_head(field: Field, expected: Rows, batchrun: Start, cluster: str) -> None:
    """The run ends with an exit code that says so, and goes on in another cluster."""
    field.plan("headless")
    with cluster_of(1) as (nodes, _):
        command = field.command(batchrun, "headless", nodes.address)
        assert wait_until(command, lambda: field.sampled("headless") > 300)
        field.fault()
        nodes.kill_head()
        code, _, err = command.end(timeout_s=150)
    assert code == 75, (code, err)
    assert "submit again to resume" in err and "Traceback" not in err
    assert field.run("headless").exit_code == 0
    field.check("headless", expected, losses=4)


@pytest.mark.parametrize("deadline_s", [60, 10])
@pytest.mark.fault(14, "a node is drained with notice")
def test_a_drained_node(field: Field, expected: Rows, batchrun: Start, deadline_s: int) -> None:
    """Its worker gives everything back, no token is sampled twice and nobody is blamed."""
    name = f"drained-{deadline_s}"
    field.plan(name)
    with cluster_of(2) as (nodes, [first, _]):
        command = field.command(batchrun, name, nodes.address, resources={"workers": 2})
        assert wait_until(command, lambda: field.sampled(name) > 200 and nodes.workers(first))
        field.fault()
        nodes.drain(first, deadline_s)
        succeeded(command)
    run = field.store(name).folders("_batchrun")[0]
    assert field.store(name).list(strikes_folder(run)) == ()
    field.check(name, expected, losses=0)


@pytest.mark.fault(16, "nodes are taken away without a word, one after the other")
def test_a_storm_of_lost_nodes(field: Field, expected: Rows, batchrun: Start) -> None:
    """Whenever a node is lost another worker goes on; nobody is blamed."""
    field.plan("nodes", engine={"step_s": 0.04})
    num_lost = 0
    with cluster_of(2) as (nodes, there):
        command = field.command(batchrun, "nodes", nodes.address, resources={"workers": 2})
        for _ in range(4):
            before = field.sampled("nodes")
            if not wait_until(command, lambda at=before: field.sampled("nodes") > at + 150):
                break
            field.fault()
            nodes.remove(there.pop(0))
            there.append(nodes.add())
            num_lost += 1
        succeeded(command, timeout_s=300)
    assert num_lost >= 2
    run = field.store("nodes").folders("_batchrun")[0]
    assert field.store("nodes").list(strikes_folder(run)) == ()
    field.check("nodes", expected, losses=2 * num_lost, step_s=0.04)


@pytest.mark.fault(17, "no node at first, later none for a while")
def test_nodes_that_come_late(field: Field, expected: Rows, batchrun: Start) -> None:
    """The run waits for a node, and again when its only node is gone."""
    field.plan("waits")
    with cluster_of(0) as (nodes, _):
        command = field.command(batchrun, "waits", nodes.address)
        time.sleep(8)
        node = nodes.add()
        assert wait_until(command, lambda: field.sampled("waits") > 300)
        field.fault()
        nodes.remove(node)
        time.sleep(8)
        assert command.process.poll() is None
        nodes.add()
        succeeded(command)
    field.check("waits", expected, losses=2)


@pytest.mark.fault(7, "a node freezes, is given up, and comes back to life")
def test_a_frozen_node(field: Field, expected: Rows, batchrun: Start) -> None:
    """Its rows are run elsewhere; when it wakes up it can neither overwrite nor double a part."""
    field.plan("frozen", engine={"step_s": 0.04})
    with cluster_of(2) as (nodes, [first, _]):
        command = field.command(batchrun, "frozen", nodes.address, resources={"workers": 2})
        assert wait_until(command, lambda: field.sampled("frozen") > 300 and nodes.workers(first))
        field.fault()
        frozen = nodes.pids(first)
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        try:
            succeeded(command, timeout_s=240)
        finally:
            for pid in frozen:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGCONT)
        parts = {item.path: item for item in field.store("frozen").list(recursive=False)}
        time.sleep(5)  # for what the dead want to do yet
        assert {i.path: i for i in field.store("frozen").list(recursive=False)} == parts
    field.check("frozen", expected, losses=4, step_s=0.04)


@pytest.mark.skipif(not can_make_hosts(), reason="needs to make network namespaces")
@pytest.mark.fault(8, "a host is cut off from all others, but not from storage")
def test_a_host_that_is_cut_off(field: Field, expected: Rows) -> None:
    """Its rows are run elsewhere and nobody is blamed; it writes nothing that anybody has written,
    not while it is alone and not when it is back."""
    field.plan("cut", engine={"step_s": 0.04})
    with two_hosts() as hosts:
        hosts.start_ray(_QUICK)
        command = field.command(hosts.batchrun, "cut", hosts.address, resources={"workers": 2})
        assert wait_until(command, lambda: field.sampled("cut") > 300 and hosts.workers("far"))
        field.fault()
        hosts.cut()
        succeeded(command, timeout_s=240)
        parts = {item.path: item for item in field.store("cut").list(recursive=False)}
        hosts.mend()
        time.sleep(5)  # for what the far host wants to do yet
        assert {i.path: i for i in field.store("cut").list(recursive=False)} == parts
    run = field.store("cut").folders("_batchrun")[0]
    assert field.store("cut").list(strikes_folder(run)) == ()
    field.check("cut", expected, losses=1, step_s=0.04)


@pytest.mark.fault(24, "one of two GPUs ends every process that runs a row on it")
def test_a_bad_device(field: Field, expected: Rows, batchrun: Start) -> None:
    """No row is given up for it: what died there is answered by the other one, and after three
    deaths it gets nothing more to do."""
    rule = {"text": "", "do": "die", "device": "0", "times": None}
    field.plan("device", engine={"step_s": 0.05}, prompts=[rule])
    with cluster_of(0) as (nodes, _):
        nodes.add(num_cpus=2, num_gpus=2)
        command = field.command(batchrun, "device", nodes.address, resources={"workers": 2})
        code, _, err = command.end(timeout_s=240)
    assert code == 0 and "GPU 0 gets no more work" in err, err
    num_deaths = len(list(field.marks("device").glob("prompt-0-*")))
    assert 3 <= num_deaths <= 4  # one more had begun
    field.check("device", expected, losses=num_deaths, step_s=0.05)

"""Runs submitted to a Ray cluster of a head and two GPU nodes, through its Jobs API."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import mkdtemp

import pytest
from ray.job_submission import JobSubmissionClient

from tests.integration.conftest import Call, Command, Work, sums

_CLUSTER = """
import sys
from ray.cluster_utils import Cluster

memory = 80 * 2**20
dashboard, *agents = map(int, sys.argv[1:])  # an agent whose port is taken cannot run jobs
head = dict(num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1",
            dashboard_port=dashboard, dashboard_agent_listen_port=agents.pop(),
            object_store_memory=memory)
cluster = Cluster(initialize_head=True, head_node_args=head)
for port in agents:
    cluster.add_node(num_cpus=2, num_gpus=1, resources={"accelerator_type:A10G": 1},
                     dashboard_agent_listen_port=port, object_store_memory=memory)
print("up", flush=True)
sys.stdin.read()
cluster.shutdown()
"""
GPUS = {"accelerator_type": "A10G", "workers": 2}


def _free_ports(count: int) -> list[int]:
    """Such that Ray takes: it keeps 10002 to 19999 for its workers."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if not 10002 <= port <= 19999:
                ports.append(port)
    return ports


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The address of the cluster's dashboard."""
    ports = _free_ports(4)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PATH": path}
    environ["RAY_metrics_report_interval_ms"] = "1000"  # instead of 10 s
    # Where Ray notes which cluster of a machine its jobs belong to; others would write there too.
    environ["RAY_TMPDIR"] = mkdtemp(prefix="ray-")
    environ.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER, *map(str, ports)],
        env=environ,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert any(line == "up\n" for line in process.stdout), "the cluster did not start"
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(environ["RAY_TMPDIR"], ignore_errors=True)


Start = Callable[..., Command]


def test_a_run_is_submitted_and_followed_to_its_end(
    work: Work, batchrun: Start, call: Call, dashboard: str
) -> None:
    """The id and the page come on stdout, what the run says on stderr, everything is done by
    workers on the nodes with the GPUs that the job asks for, and the exit code is the run's: 3 for
    a row that failed."""
    work.write("a", [*sums(19), None])
    work.write("b", sums(20, start=20))
    job = work.job_file(resources=GPUS)
    code, out, err = batchrun("submit", job, "--address", dashboard, "--wait").end(120)
    assert 3 == code, err
    job_id, url = out.splitlines()
    assert f"{dashboard}/#/jobs/{job_id}" == url
    assert "1 of 40 rows failed" in err
    answered = {row["prompt"] for row in work.rows() if row["error"] is None}
    assert set(sums(39)) == answered and 40 == len(work.rows())
    code, out, _ = call("list", "--address", dashboard, "--json")
    (listed,) = [item for item in json.loads(out) if item["id"] == job_id]
    assert (3, "failed", "out") == (listed["exit_code"], listed["state"], listed["name"])
    assert str(work.folder / "out") == listed["output"]
    assert listed["run_id"] in os.listdir(work.folder / "out/_batchrun")
    code, out, _ = call("logs", job_id, "--address", dashboard)
    assert 0 == code and "1 of 40 rows failed" in out
    code, out, err = call("retry", work.folder / "out", "--address", dashboard)
    assert (3, url[: url.rindex("/")]) == (code, out.splitlines()[1].rpartition("/")[0]), err
    assert "nothing to retry: no row failed with engine, timeout, worker_lost" in err


def test_an_invalid_job_is_refused_before_it_is_submitted(
    work: Work, call: Call, dashboard: str
) -> None:
    """What can be known beforehand is known here, not minutes later on the cluster."""
    work.write("a", sums(3))
    job = work.job_file(input={"prompt_column": "nothing"})
    code, out, err = call("submit", job, "--address", dashboard)
    assert 2 == code and "" == out
    assert "input.prompt_column" in err
    _, out, _ = call("list", "--address", dashboard, "--json")
    assert str(work.folder / "out") not in [item["output"] for item in json.loads(out)]


def test_a_cancelled_run_keeps_what_it_has_and_goes_on_when_submitted_again(
    work: Work, batchrun: Start, call: Call, dashboard: str
) -> None:
    """`cancel` asks the run to drain first, so it ends by itself with exit code 75. While it runs,
    Ray's dashboard and metrics say which run each actor works for and how far it is, and its log
    tells of its shards."""
    for number in range(4):
        work.write(f"{number}", sums(10, start=1 + 10 * number), max_tokens=[32] * 10)
    work.write("long", sums(120, start=41), max_tokens=[3_900] * 120)  # until it is cancelled
    job = work.job_file(
        resources=GPUS, input={"overrides": ["max_tokens"]}, generation={"ignore_eos": True}
    )
    code, out, _ = call("submit", job, "--address", dashboard, "--json", "--log-file", "-")
    submitted = json.loads(out)
    assert 0 == code
    details = JobSubmissionClient(dashboard).get_job_info(submitted["id"])  # it knows the token
    assert details.metadata is not None and "out" == details.metadata["job_name"]
    follower = batchrun("logs", submitted["id"], "-f", "--address", dashboard)
    follower.wait_until(lambda: len(work.parts()) >= 2)
    deadline = time.monotonic() + 90
    while not (series := _ray_series(dashboard, "ray_batchrun_rows_total", submitted["run_id"])):
        assert time.monotonic() < deadline, "no series of the run on Ray's metrics"
        time.sleep(1)
    assert 'job="out"' in series[0] and 'status="' in series[0]
    names = {actor["name"]: actor["repr_name"] for actor in _actors(dashboard)}
    assert f"out {submitted['run_id'][:8]} worker 1-1" in names
    assert f"batchrun(out {submitted['run_id'][:8]} worker 1-1)" in names.values()
    _, out, _ = call("logs", submitted["id"], "--address", dashboard)
    assert '"event": "shard_published"' in out

    code, out, err = call("cancel", submitted["id"], "--address", dashboard, "--json")
    cancelled = json.loads(out)
    assert 0 == code, err
    assert (True, 75) == (cancelled["drained"], cancelled["exit_code"])
    assert "interrupted" in follower.end()[1]
    done = set(work.parts())
    assert 2 <= len(done) < 5
    limits = ("--set", "errors.row_timeout_s=1", "--set", "errors.max_failed_rows=120")
    code, _, err = call("submit", job, *limits, "--address", dashboard, "--wait")
    assert 0 == code, err
    assert "resuming" in err
    assert done < set(work.parts())
    assert 160 == len({row["id"] for row in work.rows()}) == len(work.rows())


def test_what_is_not_there_is_named(call: Call, dashboard: str) -> None:
    """An unknown id and a cluster that does not answer are exit code 2 with a hint."""
    for command in ("logs", "cancel"):
        code, out, err = call(command, "no-such-run", "--address", dashboard)
        assert 2 == code and "" == out
        assert "'no-such-run'" in err and "batchrun list" in err
    code, _, err = call("list", "--address", "http://127.0.0.1:1")
    assert 2 == code and "no Ray dashboard answers" in err and "hint:" in err


def _get(url: str) -> bytes:
    """What is there; with Ray's token, which a cluster may ask for."""
    kept = Path.home() / ".ray/auth_token"
    token = os.environ.get("RAY_AUTH_TOKEN") or (kept.read_text() if kept.exists() else "")
    headers = {"Authorization": f"Bearer {token.strip()}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        found: bytes = answer.read()
    return found


def _actors(dashboard: str) -> list[dict[str, str]]:
    document = json.loads(_get(f"{dashboard}/api/v0/actors?detail=1"))
    found: list[dict[str, str]] = document["data"]["result"]["result"]
    return found


def _ray_series(dashboard: str, name: str, run: str) -> list[str]:
    """Lines of a series of a run, from all of Ray's metrics endpoints."""
    groups = json.loads(_get(f"{dashboard}/api/prometheus/sd"))
    targets = [target for group in groups for target in group["targets"]]
    found = []
    for target in targets:
        try:
            lines = _get(f"http://{target}/metrics").decode().splitlines()
        except OSError:
            continue  # Ray lists endpoints of processes that are still to start
        found += [line for line in lines if line.startswith(name) and f'run="{run}"' in line]
    return found

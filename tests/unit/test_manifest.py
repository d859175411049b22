"""The Kubernetes objects of a scheduled job: what they say, and what their script does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchrun.manifest import ScheduledJob, kubernetes_name, render_manifest

JOB = ScheduledJob(
    name="Nightly: classify",
    job_text="name: x\n# 100 %, $HOME and 'quotes'\nmodel: {path: tiny}\n",
    cron="0 2 * * 1-5",
    time_zone="Europe/Berlin",
    image="registry.example/batchrun:0.1.0",
    ray_version="2.60.0",
    workers=4,
    gpu=True,
    namespace="batch",
    overrides=("generation.stop=[a b]",),
    environ={"AWS_REGION": "eu-central-1"},
    secrets=("s3",),
    node_selector={"gpu": "a10g"},
)


def parts(job: ScheduledJob) -> dict[str, Any]:
    """The objects by kind, read back from the text."""
    found = list(yaml.safe_load_all(render_manifest(job)))
    assert len({part["kind"] for part in found}) == len(found)
    return {part["kind"]: part for part in found}


def rayjob_of(job: ScheduledJob) -> Any:
    """The RayJob inside the ConfigMap."""
    return yaml.safe_load(parts(job)["ConfigMap"]["data"]["rayjob.yaml"])


def test_the_cronjob_keeps_to_its_schedule() -> None:
    """Time and zone, one run at a time, a late start within the hour, a short history."""
    spec = parts(JOB)["CronJob"]["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("0 2 * * 1-5", "Europe/Berlin")
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] == 3600
    assert spec["successfulJobsHistoryLimit"] == spec["failedJobsHistoryLimit"] == 3


def test_the_starter_may_do_what_it_does() -> None:
    """Its account may create and read RayJobs of its namespace, and nothing else."""
    found = parts(JOB)
    assert found["Role"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    pod = found["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    account = found["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account
    assert found["RoleBinding"]["subjects"] == [
        {"kind": "ServiceAccount", "name": account, "namespace": "batch"}
    ]
    assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]
    assert {part["metadata"]["namespace"] for part in found.values()} == {"batch"}


def test_the_rayjob_runs_the_job_as_written() -> None:
    """The job file byte for byte, `--set` as given, a cluster of its own that goes afterwards."""
    found = parts(JOB)
    assert found["ConfigMap"]["data"]["job.yaml"] == JOB.job_text
    spec = rayjob_of(JOB)["spec"]
    assert spec["entrypoint"] == (
        "batchrun run /etc/batchrun/job.yaml --address auto --set 'generation.stop=[a b]' "
        "--set metrics.host=0.0.0.0 --set metrics.port=9464"
    )
    assert (spec["shutdownAfterJobFinishes"], spec["backoffLimit"]) == (True, 0)
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    [group] = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["maxReplicas"]) == (4, 4)
    head, worker = cluster["headGroupSpec"]["template"], group["template"]
    for pod in (head, worker):
        [container] = pod["spec"]["containers"]
        assert container["image"] == JOB.image
        assert container["env"] == [{"name": "AWS_REGION", "value": "eu-central-1"}]
        assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
        assert pod["spec"]["serviceAccountName"] == "batchrun"
    gpu = {"cpu": "3", "memory": "14Gi", "nvidia.com/gpu": "1"}
    assert worker["spec"]["containers"][0]["resources"]["limits"] == gpu
    assert worker["spec"]["nodeSelector"] == {"gpu": "a10g"}
    assert "nvidia.com/gpu" not in head["spec"]["containers"][0]["resources"]["limits"]
    volumes = [volume["name"] for volume in head["spec"]["volumes"]]
    assert "job" in volumes


def test_a_job_for_cpus_asks_for_no_gpu() -> None:
    """No GPU, no toleration, no secret and no namespace where none is named."""
    from dataclasses import replace

    plain = replace(JOB, gpu=False, secrets=(), namespace=None, node_selector={})
    text = render_manifest(plain)
    for word in ("nvidia", "envFrom", "nodeSelector", "namespace"):
        assert word not in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Nightly: classify", "nightly-classify"),
        ("2026", "job-2026"),
        ("ä", "job"),
        ("x" * 37 + "-y", "x" * 37),
    ],
)
def test_names_are_short_enough_for_a_tick(name: str, expected: str) -> None:
    """With the number of a tick behind it a name is one that a RayJob can have (47)."""
    assert kubernetes_name(name) == expected
    assert len(kubernetes_name(name)) + len("-29431234") <= 47


FAKE_KUBECTL = """#!/bin/sh
echo "$@" >>calls
case "$1 $*" in
  create*) cp "$3" created.yaml; exit "${CREATE:-0}" ;;
  *jobDeploymentStatus*)
    [ -e asked ] || { touch asked; printf Running; exit 0; }
    printf %s "$STATE" ;;
  *jobStatus*) printf %s "$OUTCOME" ;;
  *message*) printf %s "$MESSAGE" ;;
  *) [ -e created.yaml ] || exit 1 ;;
esac
"""


def start(folder: Path, **environ: str) -> tuple[int, str]:
    """Run the starter's script with a kubectl that plays the API server."""
    data = parts(JOB)["ConfigMap"]["data"]
    for name, text in data.items():
        (folder / name).write_text(text)
    temporary = folder / "tmp"
    temporary.mkdir()
    kubectl = folder / "kubectl"
    kubectl.write_text(FAKE_KUBECTL)
    kubectl.chmod(0o755)
    done = subprocess.run(
        ["sh", "start.sh"],
        cwd=folder,
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "JOB_NAME": "nightly-1",
            "JOB_UID": "u-1",
            "TMPDIR": str(temporary),
            "POLL_S": "0",
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.returncode, done.stdout + done.stderr


FAILED = "Job entrypoint command failed with exit code {}, last available logs: exit code 9"


@pytest.mark.parametrize(
    ("state", "outcome", "message", "code", "said"),
    [
        ("Complete", "SUCCEEDED", "", 0, "every row is done"),
        ("Failed", "FAILED", FAILED.format(4), 0, "the last run is still alive"),
        ("Failed", "FAILED", FAILED.format(75), 0, "the next run resumes"),
        ("Failed", "FAILED", FAILED.format(3), 3, "failed with exit code 3"),
        ("Failed", "", "head pod was evicted", 1, "failed with exit code unknown"),
    ],
)
def test_the_starter_ends_as_the_run_does(
    tmp_path: Path, state: str, outcome: str, message: str, code: int, said: str
) -> None:
    """It waits for the RayJob, and only what needs a person is a failed Job."""
    found = start(tmp_path, STATE=state, OUTCOME=outcome, MESSAGE=message)
    assert found[0] == code, found
    assert said in found[1]
    created = yaml.safe_load((tmp_path / "created.yaml").read_text())
    assert created["metadata"]["name"] == "nightly-1"
    [owner] = created["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", "nightly-1", "u-1")


def test_a_starter_that_comes_again_creates_nothing(tmp_path: Path) -> None:
    """After an eviction the RayJob that is there is waited for."""
    (tmp_path / "created.yaml").touch()
    code, _ = start(tmp_path, STATE="Complete", OUTCOME="SUCCEEDED", MESSAGE="")
    assert code == 0
    assert "create" not in (tmp_path / "calls").read_text()


def test_trouble_with_the_api_is_tried_again(tmp_path: Path) -> None:
    """Where the RayJob cannot be created the pod fails with a code that does not end the Job."""
    code, _ = start(tmp_path, STATE="", OUTCOME="", MESSAGE="", CREATE="1")
    assert code == 10
    policy = parts(JOB)["CronJob"]["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]
    codes = [rule["onExitCodes"]["values"] for rule in policy["rules"] if "onExitCodes" in rule]
    assert codes == [[1, 2, 3]]

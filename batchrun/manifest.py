"""The Kubernetes objects that run a job on its schedule: a CronJob that creates a KubeRay RayJob.

A CronJob can create pods and nothing else. So its pod, the *starter*, creates a RayJob of the name
of its own Job, waits for the end of it, and ends with the run's exit code: that makes
``concurrencyPolicy: Forbid`` and the CronJob's history tell the truth. A starter that is evicted is
started again and finds the RayJob by its name. The RayJob belongs to the Job, so whatever deletes
the one deletes the other.

GPUs are held only while a run is alive: the RayJob brings its own cluster and takes it down.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

JOB_FOLDER = "/etc/batchrun"
METRICS_PORT = 9464
GRACE_S = 110
"""A spot instance is told two minutes before; pods get a little less."""

_STARTED = "RAYJOB_NAME"
# 52 characters are Kubernetes' own limit for a CronJob; a RayJob has 47, of which the number of
# the tick takes 9.
_MAX_NAME = 38

_START_SH = """\
# Create the RayJob of this tick, wait for its end, and end with the run's exit code.
# Exit code 10 is trouble with the API server: the pod is started again and goes on waiting.
set -u
manifest="${TMPDIR:-/tmp}/rayjob.yaml"
sed "s/RAYJOB_NAME/$JOB_NAME/; s/RAYJOB_OWNER/$JOB_UID/" rayjob.yaml >"$manifest" || exit 10

read_status() {
  kubectl get rayjob "$JOB_NAME" -o "jsonpath={.status.$1}"
}

if ! kubectl get rayjob "$JOB_NAME" >/dev/null 2>&1; then
  kubectl create -f "$manifest" || exit 10
fi
state=""
while [ "$state" != Complete ] && [ "$state" != Failed ]; do
  sleep "${POLL_S:-15}"
  state="$(read_status jobDeploymentStatus)" || state=""
done
outcome="$(read_status jobStatus)" || exit 10
if [ "$outcome" = SUCCEEDED ]; then
  echo "$JOB_NAME: every row is done"
  exit 0
fi
message="$(read_status message)" || exit 10
printf '%s\\n' "$message"
code="$(printf '%s' "$message" | grep -o 'exit code [0-9][0-9]*' | head -n 1)"
code="${code##* }"
case "$code" in
  4) echo "$JOB_NAME: the last run is still alive; nothing to do" ;;
  75) echo "$JOB_NAME: interrupted; what is finished is kept, the next run resumes" ;;
  *)
    echo "$JOB_NAME: failed with exit code ${code:-unknown}"
    exit "${code:-1}"
    ;;
esac
"""


@dataclass(frozen=True, slots=True)
class ScheduledJob:
    """What the manifest is made of.

    ``job_text`` is the job file as written; ``overrides`` are those of ``--set``. ``cron`` has
    numbers alone. ``gpu`` says whether workers have one each. ``secrets`` are names of Secrets
    whose keys become environment variables.
    """

    name: str
    job_text: str
    cron: str
    time_zone: str
    image: str
    ray_version: str
    workers: int
    gpu: bool
    namespace: str | None = None
    service_account: str = "batchrun"
    overrides: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    node_selector: Mapping[str, str] = field(default_factory=dict)


def kubernetes_name(name: str) -> str:
    """``name`` as Kubernetes takes it, short enough for all that is made of it."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if plain and not plain[0].isalpha():
        plain = f"job-{plain}"
    return plain[:_MAX_NAME].strip("-") or "job"


def render_manifest(job: ScheduledJob) -> str:
    """All objects as one YAML stream, for ``kubectl apply -f -``."""
    return "---\n".join(
        yaml.dump(part, Dumper=_Dumper, sort_keys=False, width=1000) for part in objects(job)
    )


def objects(job: ScheduledJob) -> list[dict[str, Any]]:
    """ServiceAccount, Role, RoleBinding, ConfigMap and CronJob."""
    name = kubernetes_name(job.name)
    starter = f"{name}-starter"
    subject: dict[str, Any] = {"kind": "ServiceAccount", "name": starter}
    if job.namespace is not None:
        subject["namespace"] = job.namespace
    rayjob = yaml.dump(_rayjob(job), Dumper=_Dumper, sort_keys=False, width=1000)
    return [
        _object("v1", "ServiceAccount", starter, job),
        {
            **_object("rbac.authorization.k8s.io/v1", "Role", starter, job),
            # Only RayJobs, and neither to change nor to delete one.
            "rules": [
                {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
            ],
        },
        {
            **_object("rbac.authorization.k8s.io/v1", "RoleBinding", starter, job),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": starter},
            "subjects": [subject],
        },
        {
            **_object("v1", "ConfigMap", name, job),
            "data": {"job.yaml": job.job_text, "rayjob.yaml": rayjob, "start.sh": _START_SH},
        },
        {**_object("batch/v1", "CronJob", name, job), "spec": _cronjob(job, name, starter)},
    ]


def _object(version: str, kind: str, name: str, job: ScheduledJob) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "batchrun", "app.kubernetes.io/instance": name}
    metadata: dict[str, Any] = {"name": name, "labels": labels}
    if job.namespace is not None:
        metadata["namespace"] = job.namespace
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _cronjob(job: ScheduledJob, name: str, starter: str) -> dict[str, Any]:
    def label(key: str) -> dict[str, Any]:
        return {"fieldRef": {"fieldPath": f"metadata.labels['batch.kubernetes.io/{key}']"}}

    container = {
        "name": "starter",
        "image": job.image,
        "command": ["sh", f"{JOB_FOLDER}/start.sh"],
        "workingDir": JOB_FOLDER,
        "env": [
            {"name": "JOB_NAME", "valueFrom": label("job-name")},
            {"name": "JOB_UID", "valueFrom": label("controller-uid")},
            {"name": "HOME", "value": "/tmp"},
        ],
        "resources": _resources("50m", "128Mi", limit_cpu=False),
        "securityContext": {**_CONTAINER_SECURITY, "readOnlyRootFilesystem": True},
        "volumeMounts": [_JOB_MOUNT, {"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = {
        "serviceAccountName": starter,
        "restartPolicy": "Never",
        "securityContext": _POD_SECURITY,
        "containers": [container],
        "volumes": [
            {"name": "job", "configMap": {"name": name}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "16Mi"}},
        ],
    }
    policy = {
        "rules": [
            {
                "action": "Ignore",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
            {
                # What the run said; to start the pod again would ask the same RayJob again.
                "action": "FailJob",
                "onExitCodes": {"containerName": "starter", "operator": "In", "values": [1, 2, 3]},
            },
        ]
    }
    return {
        "schedule": job.cron,
        "timeZone": job.time_zone,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {
            "spec": {
                "backoffLimit": 3,
                "podFailurePolicy": policy,
                "template": {"metadata": {"labels": _labels(name, "starter")}, "spec": pod},
            }
        },
    }


def _rayjob(job: ScheduledJob) -> dict[str, Any]:
    name = kubernetes_name(job.name)
    # For a Prometheus outside the pod; who may reach the port is for a NetworkPolicy to say.
    settings = [*job.overrides, "metrics.host=0.0.0.0", f"metrics.port={METRICS_PORT}"]
    command = ["batchrun", "run", f"{JOB_FOLDER}/job.yaml", "--address", "auto"]
    for setting in settings:
        command += ["--set", setting]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": _STARTED, "uid": "RAYJOB_OWNER"}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": _STARTED,
            "labels": {"app.kubernetes.io/name": "batchrun", "app.kubernetes.io/instance": name},
            "ownerReferences": [owner],
        },
        "spec": {
            "entrypoint": shlex.join(command),
            # No submitter pod that could be evicted on its own.
            "submissionMode": "HTTPMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            # Who resumes is the next tick: what failed for a reason would fail again at once.
            "backoffLimit": 0,
            "rayClusterSpec": {
                "rayVersion": job.ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # The driver and no worker: GPUs and models stay off the head.
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _ray_pod(job, name, is_head=True),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": job.workers,
                        "minReplicas": 0,
                        "maxReplicas": job.workers,
                        "rayStartParams": {},
                        "template": _ray_pod(job, name, is_head=False),
                    }
                ],
            },
        },
    }


def _ray_pod(job: ScheduledJob, name: str, *, is_head: bool) -> dict[str, Any]:
    role = "head" if is_head else "worker"
    container: dict[str, Any] = {
        "name": f"ray-{role}",
        "image": job.image,
        "env": [{"name": key, "value": value} for key, value in job.environ.items()],
        "resources": _resources("2", "8Gi") if is_head else _resources("3", "14Gi", gpu=job.gpu),
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if job.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in job.secrets]
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}
    ]
    spec: dict[str, Any] = {
        "serviceAccountName": job.service_account,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": _POD_SECURITY,
    }
    if is_head:
        container["ports"] = [
            {"containerPort": 6379, "name": "gcs-server"},
            {"containerPort": 8265, "name": "dashboard"},
            {"containerPort": 8080, "name": "metrics"},
            {"containerPort": METRICS_PORT, "name": "batchrun"},
        ]
        container["volumeMounts"].append(_JOB_MOUNT)
        volumes.append({"name": "job", "configMap": {"name": name}})
    else:
        container["ports"] = [{"containerPort": 8080, "name": "metrics"}]
        container["lifecycle"] = {"preStop": {"exec": {"command": ["batchrun-drain"]}}}
        if job.node_selector:
            spec["nodeSelector"] = dict(job.node_selector)
        if job.gpu:
            spec["tolerations"] = [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
            ]
    spec["containers"] = [container]
    spec["volumes"] = volumes
    return {"metadata": {"labels": _labels(name, role)}, "spec": spec}


def _labels(name: str, component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "batchrun",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": component,
    }


def _resources(
    cpu: str, memory: str, *, gpu: bool = False, limit_cpu: bool = True
) -> dict[str, Any]:
    requests = {"cpu": cpu, "memory": memory}
    limits = {**({"cpu": cpu} if limit_cpu else {}), "memory": memory}
    if gpu:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = "1"
    return {"requests": requests, "limits": limits}


# What the Pod Security Standard `restricted` asks for.
_POD_SECURITY: dict[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "runAsGroup": 10001,
    "fsGroup": 10001,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}
_JOB_MOUNT: dict[str, Any] = {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Values that stand twice are written twice."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _represent_text)

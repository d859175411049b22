"""What deploy/ holds, looked at without a cluster: manifests, image, compose file, rules."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchrun import __version__
from batchrun.job import parse_job
from batchrun.jobfile import read_job_file
from batchrun.manifest import GRACE_S, METRICS_PORT, ScheduledJob, objects
from batchrun.metrics import ALL_SERIES, Kind

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "kubernetes/overlays").iterdir())
ENFORCE = "pod-security.kubernetes.io/enforce"
DASHBOARD = DEPLOY / "grafana/dashboards/batchrun.json"

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is absent")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is absent")


def read_yaml(path: Path) -> Any:
    """One document."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# Kubernetes


@functools.cache
def built(overlay: str) -> dict[str, Any]:
    """What kustomize makes of an overlay, by kind: there is one object of each."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes/overlays" / overlay)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    parts = list(yaml.safe_load_all(done.stdout))
    assert len({part["kind"] for part in parts}) == len(parts)
    return {part["kind"]: part for part in parts}


def cluster_of(parts: dict[str, Any]) -> Any:
    """The RayCluster's spec, whether it stands alone or in a RayJob."""
    if "RayJob" in parts:
        return parts["RayJob"]["spec"]["rayClusterSpec"]
    return parts["RayCluster"]["spec"]


def scheduled() -> dict[str, Any]:
    """What ``batchrun schedule`` prints, its RayJob taken out of the ConfigMap."""
    job = ScheduledJob("n", "x: 1\n", "0 2 * * *", "Etc/UTC", "batchrun:1", "2.60.0", 1, True)
    parts = {part["kind"]: part for part in objects(job)}
    parts["RayJob"] = yaml.safe_load(parts["ConfigMap"]["data"]["rayjob.yaml"])
    return parts


def templates() -> Iterator[tuple[str, Any]]:
    """Every pod template of the overlays and of a scheduled job, with a name."""
    everything = {name: built(name) for name in OVERLAYS} if shutil.which("kubectl") else {}
    for name, parts in {**everything, "scheduled": scheduled()}.items():
        cluster = cluster_of(parts)
        yield f"{name} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{name} worker", group["template"]
        if "CronJob" in parts:
            spec = parts["CronJob"]["spec"]["jobTemplate"]["spec"]
            yield f"{name} starter", spec["template"]


def test_pods_keep_to_the_restricted_standard() -> None:
    """No root, no privileges, no capabilities, the runtime's seccomp profile, bounded memory."""
    seen = 0
    for name, template in templates():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= {"configMap", "emptyDir", "secret"}, name
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            for bound in ("requests", "limits"):
                assert "memory" in container["resources"][bound], name
        seen += 1
    assert seen >= 3


def test_workers_drain_before_they_end() -> None:
    """preStop drains for less time than the pod has, and that is less than a spot's warning."""
    script = (DEPLOY / "image/batchrun-drain").read_text()
    [drain_s] = re.findall(r"BATCHRUN_DRAIN_S:-(\d+)", script)
    for name, template in templates():
        if name.endswith("worker"):
            [container] = template["spec"]["containers"]
            assert container["lifecycle"]["preStop"]["exec"]["command"] == ["batchrun-drain"]
            assert int(drain_s) < template["spec"]["terminationGracePeriodSeconds"] == GRACE_S < 120


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_whole(overlay: str) -> None:
    """Names, labels and ports of the parts fit one another; tokens are on; the image is pinned."""
    parts = built(overlay)
    cluster = cluster_of(parts)
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]["template"]
    [group] = cluster["workerGroupSpecs"]
    assert parts["Namespace"]["metadata"]["labels"][ENFORCE] == "restricted"
    spaces = {part["metadata"].get("namespace") for part in parts.values()} - {None}
    assert spaces == {parts["Namespace"]["metadata"]["name"]}
    selector = parts["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert selector == parts["PodMonitor"]["spec"]["selector"]["matchLabels"]
    for template in (head, group["template"]):
        assert selector.items() <= template["metadata"]["labels"].items()
        account = template["spec"]["serviceAccountName"]
        assert account == parts["ServiceAccount"]["metadata"]["name"]
        [container] = template["spec"]["containers"]
        name, _, tag = container["image"].rpartition(":")
        assert name and tag and tag != "latest"
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in template["spec"]["volumes"]}
        metrics = {port["name"] for port in container["ports"]}
        assert "metrics" in metrics
    ports = {p["name"]: p["containerPort"] for p in head["spec"]["containers"][0]["ports"]}
    endpoints = {e["port"]: e for e in parts["PodMonitor"]["spec"]["podMetricsEndpoints"]}
    assert set(endpoints) <= set(ports)
    assert endpoints["batchrun"]["honorLabels"] is True
    assert ports["batchrun"] == METRICS_PORT
    [_, _, monitoring] = parts["NetworkPolicy"]["spec"]["ingress"]
    allowed = {port["port"] for port in monitoring["ports"]}
    assert allowed == {ports[name] for name in endpoints}
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@needs_kubectl
def test_a10g_workers_are_spot_and_the_head_is_not() -> None:
    """GPUs, selector and tolerations on workers alone; Ray knows the accelerator's name."""
    for overlay in ("aws-a10g-cluster", "aws-a10g-job"):
        cluster = cluster_of(built(overlay))
        [group] = cluster["workerGroupSpecs"]
        worker = group["template"]["spec"]
        limits = worker["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == "1"
        assert {item["key"] for item in worker["tolerations"]} == {"nvidia.com/gpu", "spot"}
        # KubeRay puts it on a command line, hence JSON in quotes.
        resources = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert resources == {"accelerator_type:A10G": 1}
        head = cluster["headGroupSpec"]["template"]["spec"]
        assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
        assert "affinity" in head and "tolerations" not in head
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@needs_kubectl
def test_rayjobs_run_a_valid_job(tmp_path: Path) -> None:
    """The RayJob's entrypoint runs the job of the ConfigMap that it mounts."""
    parts = built("aws-a10g-job")
    spec = parts["RayJob"]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] == 0
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    volume = next(volume for volume in head["volumes"] if volume["name"] == "job")
    assert volume["configMap"]["name"] == parts["ConfigMap"]["metadata"]["name"]
    job_file = tmp_path / "job.yaml"
    job_file.write_text(parts["ConfigMap"]["data"]["job.yaml"])
    job = parse_job(read_job_file(job_file))
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert job.resources.workers == group["replicas"] == 4
    assert spec["entrypoint"] == scheduled()["RayJob"]["spec"]["entrypoint"]


@needs_kubectl
def test_core_kinds_are_valid() -> None:
    """ServiceAccount, NetworkPolicy, RBAC, CronJob: by the schemas of Kubernetes, strictly."""
    validator = pytest.importorskip("kubernetes_validate")
    checked = set()
    for parts in [*map(built, OVERLAYS), scheduled()]:
        for part in parts.values():
            if part["kind"] not in ("RayCluster", "RayJob", "PodMonitor"):
                validator.validate(part, "1.32", strict=True)
                checked.add(part["kind"])
    assert {"ServiceAccount", "NetworkPolicy", "ConfigMap", "CronJob", "Role"} <= checked


# The image


def test_the_image_is_small_pinned_and_nobody_is_root() -> None:
    """Base images have tags, the last user is a number, nothing is fetched but by apt and pip, and
    compilers of C++ stay in the stage that is thrown away."""
    text = (DEPLOY / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    for image in re.findall(r"^FROM \$\{(\w+)\}", text, re.MULTILINE):
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]+", arguments[image]), arguments[image]
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == 3
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["10001:10001"]
    assert not re.search(r"\b(curl|wget -|ADD|sudo)\b|https?://", text)
    last = text.rpartition("\nFROM ")[2]
    for word in ("g++", "ninja", "pip install", "COPY . "):
        assert word not in last
    assert text.count("apt-get install") == text.count("rm -rf /var/lib/apt/lists/*") == 2
    assert text.count("--no-install-recommends") == 2
    assert "-c constraints.txt" in text and "scripts/install_gpu.sh" in text


def test_the_image_has_what_it_copies() -> None:
    """Every file that the Dockerfile copies exists and is not kept from the build."""
    text = (DEPLOY / "Dockerfile").read_text()
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = []
    for line in re.findall(r"^COPY ((?!--from).*)$", text, re.MULTILINE):
        copied += [word for word in line.split()[:-1] if not word.startswith("--")]
    assert len(copied) >= 8
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(f"!{parent}" in kept for parent in (name, *map(str, Path(name).parents))), name


def drain(folder: Path, ray: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the script of preStop with a `ray` that is this shell script."""
    program = folder / "ray"
    program.write_text(f'#!/bin/sh\necho "$@" >"{folder}/called"\n{ray}\n')
    program.chmod(0o755)
    return subprocess.run(
        ["sh", str(DEPLOY / "image/batchrun-drain")],
        env={"PATH": f"{folder}:{os.environ['PATH']}", **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_node_that_cannot_be_drained_ends(tmp_path: Path) -> None:
    """Where Ray is gone the container's end is not held up."""
    assert drain(tmp_path, "exit 1", BATCHRUN_DRAIN_S="50").returncode == 0


def test_draining_waits_for_workers_and_not_for_ever(tmp_path: Path) -> None:
    """Ray is told; as long as a worker's process is there it waits, up to its limit."""
    title = "import time; time.sleep(600)"
    worker = subprocess.Popen(["ray::Worker", "-c", title], executable=sys.executable)
    try:
        assert drain(tmp_path, "exit 0", BATCHRUN_DRAIN_S="1").returncode == 0
        assert worker.poll() is None
    finally:
        worker.kill()
        worker.wait()
    called = (tmp_path / "called").read_text()
    assert called.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION ")
    assert called.endswith("--deadline-remaining-seconds 1\n")


def test_ray_has_the_command_that_drains() -> None:
    """`ray drain-node` and its options are those of the pinned Ray."""
    from ray.scripts.scripts import drain_node

    options = {name for option in drain_node.params for name in option.opts}
    script = (DEPLOY / "image/batchrun-drain").read_text()
    used = set(re.findall(r"--[a-z-]+", script.split("\nray drain-node")[1].split("||")[0]))
    assert used and used <= options
    [reason] = [option for option in drain_node.params if "--reason" in option.opts]
    assert "DRAIN_NODE_REASON_PREEMPTION" in reason.type.choices


# Compose


def test_compose_keeps_to_this_machine() -> None:
    """Ports are bound to 127.0.0.1, images have tags, files that are mounted exist, what is waited
    for has a health check, and the token comes from the environment."""
    compose = read_yaml(DEPLOY / "compose.yaml")
    services = compose["services"]
    assert set(services) == {"s3", "ray-head", "ray-worker", "prometheus", "grafana"}
    for name, service in services.items():
        image, _, tag = service["image"].rpartition(":")
        assert image and tag and tag != "latest", name
        for port in service.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), mount
                assert mount.endswith(":ro"), mount
            else:
                assert source in compose["volumes"], mount
        waits = service.get("depends_on", {})
        for other in waits:
            assert other in services
            if isinstance(waits, dict):
                assert "healthcheck" in services[other]
        environment = service.get("environment", {})
        if name.startswith("ray"):
            assert environment["RAY_AUTH_MODE"] == "token"
            assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
            assert service["cap_drop"] == ["ALL"]


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="docker compose is absent",
)
def test_compose_reads_the_file() -> None:
    """`docker compose config` takes it, and asks for the token."""
    command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    without = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_TOKEN"}
    assert subprocess.run(command, env=without, capture_output=True).returncode != 0
    done = subprocess.run(command, env={**without, "RAY_AUTH_TOKEN": "x"}, capture_output=True)
    assert done.returncode == 0, done.stderr


# Prometheus and Grafana


def rules() -> list[dict[str, Any]]:
    """Every recording rule and alert."""
    found = []
    for name in ("recording.yml", "alerts.yml"):
        for group in read_yaml(DEPLOY / "prometheus" / name)["groups"]:
            found += group["rules"]
    return found


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard that show something."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Every expression of rules, alerts and dashboard, by where it stands."""
    found = {rule.get("record") or rule["alert"]: rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']} ({panel['id']})"] = target["expr"]
    return found


@pytest.mark.parametrize("place", sorted(expressions()))
def test_expressions_use_series_and_labels_that_exist(place: str) -> None:
    """Each name is one that a run exports or a rule records, each label one that it has, and each
    value that is asked for one that the label can take."""
    expression = expressions()[place]
    recorded = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    known: dict[str, Any] = {}
    for series in ALL_SERIES:
        suffixes = ("_bucket", "_count", "_sum") if series.kind is Kind.HISTOGRAM else ("",)
        known |= {series.name + suffix: series for suffix in suffixes}
    used = re.findall(r"batchrun[_:][\w:]*", expression)
    assert used
    labels = {"job", "run"}
    values: dict[str, set[str]] = {}
    for name in used:
        if name in recorded:
            inner = re.findall(r"batchrun_\w+", recorded[name])
        else:
            inner = [name]
        for series_name in inner:
            assert series_name in known, series_name
            series = known[series_name]
            labels |= set(series.labels) | ({"worker"} if series.per_worker else set())
            labels |= {"le"} if series_name.endswith("_bucket") else set()
            for label, allowed in series.labels.items():
                values.setdefault(label, set()).update(allowed)
    for group in re.findall(r"\b(?:by|on|ignoring|without) ?\(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= labels, group
    for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', expression):
        assert label in labels, label
        if "$" not in value:
            for word in value.split("|") if operator.endswith("~") else [value]:
                assert word in values[label], f"{label}={word}"


def test_every_alert_has_a_place_in_the_runbook() -> None:
    """Severity, a summary that names the job, and a heading in deploy/README.md that says more."""
    runbook = (DEPLOY / "README.md").read_text()
    headings = {title.lower() for title in re.findall(r"^### `?(\w+)`?$", runbook, re.MULTILINE)}
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 9
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert "{{ $labels.job }}" in alert["annotations"]["summary"]
        name = alert["alert"].lower()
        assert alert["annotations"]["runbook"] == f"deploy/README.md#{name}"
        assert name in headings, alert["alert"]


def test_every_alert_is_tested_both_ways() -> None:
    """The rules' own tests have, for each alert, a moment when it fires."""
    tests = read_yaml(DEPLOY / "prometheus/alerts_test.yml")["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


@needs_promtool
def test_promtool_takes_rules_and_configurations(tmp_path: Path) -> None:
    """The rules' own tests pass, and both configurations with the rules beside them are valid."""
    tested = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    for name in ("recording.yml", "alerts.yml"):
        shutil.copy(DEPLOY / "prometheus" / name, tmp_path)
    for config in ("prometheus", "compose"):
        shutil.copy(DEPLOY / config / "prometheus.yml", tmp_path / f"{config}.yml")
        checked = subprocess.run(
            ["promtool", "check", "config", str(tmp_path / f"{config}.yml")],
            capture_output=True,
            text=True,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_scrapes_runs_and_ray() -> None:
    """Where a job of default settings serves its metrics, and what Ray says of its nodes; the
    labels of a run stay as they are."""
    keys = parse_job_defaults()
    run, ray = read_yaml(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    assert run["static_configs"] == [{"targets": [f"{keys.host}:{keys.port}"]}]
    assert run["honor_labels"] is True
    [discovery] = ray["file_sd_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert discovery["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    inside, nodes = read_yaml(DEPLOY / "compose/prometheus.yml")["scrape_configs"]
    services = read_yaml(DEPLOY / "compose.yaml")["services"]
    for scrape in (inside, nodes):
        for target in scrape["static_configs"][0]["targets"]:
            assert target.split(":")[0] in services
    assert inside["honor_labels"] is True


def parse_job_defaults() -> Any:
    """The section `metrics` of a job that does not have it."""
    from batchrun.job import Metrics

    return Metrics()


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """Panels have their own ids and places that do not overlap, and ask the chosen Prometheus."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"] == "batchrun" and len(panels()) >= 18
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    covered: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert not cells & covered, panel["title"]
        covered |= cells
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= names, target["expr"]
    source = read_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")
    assert source["datasources"][0]["type"] == "prometheus"
    provider = read_yaml(DEPLOY / "grafana/provisioning/dashboards/batchrun.yml")["providers"][0]
    mounts = read_yaml(DEPLOY / "compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_the_dashboard_shows_every_series() -> None:
    """What a run exports can be seen."""
    text = DASHBOARD.read_text()
    missing = [series.name for series in ALL_SERIES if series.name not in text]
    assert missing == []


def test_versions_are_those_of_the_release() -> None:
    """Image tags, Ray and the S3 server are the versions that the tests run with."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    for name in ("cluster/raycluster.yaml", "job/rayjob.yaml"):
        assert f'rayVersion: "{pins["ray"]}"' in (DEPLOY / "kubernetes" / name).read_text()
    services = read_yaml(DEPLOY / "compose.yaml")["services"]
    assert services["s3"]["image"] == f"motoserver/moto:{pins['moto']}"
    for overlay in ("aws-a10g-cluster", "aws-a10g-job"):
        [image] = read_yaml(DEPLOY / "kubernetes/overlays" / overlay / "kustomization.yaml")[
            "images"
        ]
        assert image["newTag"] == __version__

"""Every expression of deploy/, asked of a real Prometheus that scraped a real run."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchrun.cluster.driver import run_job
from batchrun.cluster.tally import Progress
from batchrun.job import parse_job
from batchrun.jobfile import JobSource

from .conftest import ROOT, Work, sums

DEPLOY = ROOT / "deploy"

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is absent"),
]

# What an undisturbed run of seconds has no value for: nothing was lost, nothing is late.
MAY_BE_EMPTY = {
    "Traces that were cut",
    "Prompt tokens not computed again",
    "Share of the device's bound",  # of the embedded model it says nothing
    "Requests to storage",  # this run writes to a folder
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass
class Prometheus:
    """A Prometheus with the rules of deploy/, on this machine."""

    port: int

    def ask(self, expression: str, at: float | None = None) -> list[Any]:
        """The result of an instant query; an expression that it refuses fails."""
        parameters = {"query": expression} if at is None else {"query": expression, "time": str(at)}
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/query?{query}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            document = json.load(answer)
        assert document["status"] == "success", (expression, document)
        result: list[Any] = document["data"]["result"]
        return result


class Pace:
    """A view that holds the driver up a little, so that all that it shows is scraped too, however
    quick the machine is."""

    def say(self, text: str) -> None:
        """Nothing."""

    def __call__(self, progress: Progress) -> None:
        """Longer than two scrapes and an evaluation of the rules."""
        time.sleep(0.6)


@pytest.fixture(scope="module")
def scraped(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen a run of some seconds from beginning to end."""
    folder = tmp_path_factory.mktemp("prometheus")
    port, run_port = free_port(), free_port()
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "500ms"}
    config["scrape_configs"] = config["scrape_configs"][:1]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{run_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in ("recording.yml", "alerts.yml"):
        shutil.copy(DEPLOY / "prometheus" / name, folder)
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log,
        stderr=log,
    )
    try:
        prometheus = Prometheus(port)
        wait_until_up(prometheus, server, folder / "log")
        work = Work(folder)
        work.write("a", sums(150))
        raw = work.raw(
            generation={"max_tokens": 60, "ignore_eos": True},
            metrics={"port": run_port},
            resources={"max_sequences": 4},
            checkpoint={"interval_s": 1},
        )
        job = parse_job(JobSource.of_mapping({"name": "scraped", **raw}))
        assert run_job(job, view=Pace()).exit_code == 0
        yield prometheus
    finally:
        server.terminate()
        server.wait(timeout=20)
        log.close()


def wait_until_up(prometheus: Prometheus, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until Prometheus answers."""
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            prometheus.ask("vector(1)")
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail("Prometheus does not answer")


def last_moment(prometheus: Prometheus) -> float:
    """When the run was scraped for the last time with a worker: its gauges end with it."""
    [series] = prometheus.ask("batchrun_rows_in_flight[10m]")
    return float(series["values"][-1][0])


def rules(name: str) -> list[dict[str, Any]]:
    """The rules of a file."""
    [group] = yaml.safe_load((DEPLOY / "prometheus" / name).read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_every_panel_of_the_dashboard_shows_the_run(scraped: Prometheus) -> None:
    """Each expression, with its variables filled in as Grafana does, has a value of the run."""
    at = last_moment(scraped)
    dashboard = json.loads((DEPLOY / "grafana/dashboards/batchrun.json").read_text())
    asked = 0
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$job", "scraped").replace("$run", ".*")
            expression = expression.replace("$__rate_interval", "1m")
            assert "$" not in expression
            result = scraped.ask(expression, at)
            asked += 1
            if panel["title"] not in MAY_BE_EMPTY:
                assert result, (panel["title"], expression)
            for series in result:
                labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                assert labels <= set(series["metric"]), (panel["title"], series["metric"])
                assert series["metric"]["job"] == "scraped"
    assert asked >= 20


def test_every_recording_rule_has_recorded_the_run(scraped: Prometheus) -> None:
    """Prometheus itself has evaluated each, and the values are those of the run."""
    at = last_moment(scraped)
    for rule in rules("recording.yml"):
        assert scraped.ask(rule["expr"], at), rule["record"]
        found = scraped.ask(f"last_over_time({rule['record']}[10m])", at)
        assert {series["metric"]["job"] for series in found} == {"scraped"}, rule["record"]
    [share] = [r["expr"] for r in rules("recording.yml") if r["record"].endswith("share15m")]
    [shares] = scraped.ask(f"sum by (job) ({share})", at)
    assert float(shares["value"][1]) == pytest.approx(1)
    [failed] = scraped.ask("batchrun:failed_rows:ratio", at)
    assert float(failed["value"][1]) == 0


def test_every_alert_is_quiet_about_a_good_run(scraped: Prometheus) -> None:
    """Each expression is one that Prometheus evaluates, and none has a value while all is well."""
    at = last_moment(scraped)
    for rule in rules("alerts.yml"):
        assert scraped.ask(rule["expr"], at) == [], rule["alert"]
    url = f"http://127.0.0.1:{scraped.port}/api/v1/rules?type=alert"
    with urllib.request.urlopen(url, timeout=10) as answer:
        groups = json.load(answer)["data"]["groups"]
    loaded = [rule for group in groups for rule in group["rules"]]
    assert len(loaded) == len(rules("alerts.yml"))
    assert {rule["health"] for rule in loaded} == {"ok"}


def test_labels_are_the_runs_own(scraped: Prometheus) -> None:
    """With honor_labels the label `job` is the job's name, and a run that is over is seen to be:
    its last word is in the database, its series have ended."""
    [done] = scraped.ask('batchrun_rows_total{status="done"}', last_moment(scraped))
    assert done["metric"]["job"] == "scraped"
    assert 0 < float(done["value"][1]) <= 150
    assert scraped.ask("batchrun_rows_total") == []

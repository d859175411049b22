"""``batchrun schedule``: what is printed where, and what is left out of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from batchrun.cli import main

JOB = """\
model: {path: tiny}
input: {path: s3://b/in, prompt_column: p, storage_options: {endpoint_url: "${S3_ENDPOINT:-}"}}
output: {path: s3://b/out}
resources: {workers: 3}
"""


def run(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call."""
    result = CliRunner().invoke(main, ["schedule", *args], prog_name="batchrun")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``nightly.yaml``, and a bare environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_", "S3_"))]:
        monkeypatch.delenv(name)
    for name in ("HTTPS_PROXY", "NO_PROXY", "PYTHONPATH", "BATCHRUN_CACHE"):
        monkeypatch.delenv(name, raising=False)
    Path("nightly.yaml").write_text(JOB + 'schedule: "0 2 * * *"\n')
    return tmp_path


def test_a_crontab(here: Path) -> None:
    """Absolute paths, the folder, the log; the next times are on stderr."""
    code, out, err = run("nightly.yaml", "--set", "generation.n=2")
    assert code == 0
    comment, line = out.splitlines()
    assert comment.startswith("# batchrun: nightly.")
    assert line.startswith(f"0 2 * * * cd {here} && mkdir -p {here}/logs || exit 1; ")
    assert f" submit {here}/nightly.yaml --set generation.n=2 >>" in line
    assert f" {sys.executable} -m batchrun submit" in line
    assert "--wait" not in line
    assert err.startswith("next: ") and err.count(" 02:00 ") == 3


def test_variables_are_written_and_secrets_are_not(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the job names is in the line; a secret is refused without a file, left out with one."""
    monkeypatch.setenv("S3_ENDPOINT", "http://10.0.0.1:9000")
    monkeypatch.setenv("AWS_PROFILE", "batch")
    code, out, _ = run("nightly.yaml")
    assert code == 0
    assert "; S3_ENDPOINT=http://10.0.0.1:9000 AWS_PROFILE=batch /" in out
    monkeypatch.setenv("S3_ENDPOINT", "http://me:hunter22@10.0.0.1:9000")
    code, out, err = run("nightly.yaml", "--set", "input.storage_options={}")
    assert (code, out) == (2, "")
    assert "the variable S3_ENDPOINT holds a secret" in err and "--env-file" in err
    assert "hunter22" not in err
    Path("env").write_text("S3_ENDPOINT=…\n")
    code, out, err = run("nightly.yaml", "--env-file", "env", "--set", "input.storage_options={}")
    assert code == 0, err
    assert f"set -a; . {here}/env || exit 1; set +a; AWS_PROFILE=batch" in out
    assert "hunter22" not in out


def test_a_cluster_is_waited_for(here: Path) -> None:
    """With an address the line submits there and waits, so that its exit code is the run's. What is
    no address is refused, wherever it stands."""
    for wrong in (["--address", "rubbish"], ["--set", "ray.address=ftp://host"]):
        code, out, err = run("nightly.yaml", *wrong)
        assert (code, out) == (2, "")
        assert f"{wrong[1].rpartition('=')[2]!r} is no address of a Ray dashboard" in err
    code, out, _ = run("nightly.yaml", "--address", "http://ray:8265")
    assert code == 0
    assert f"{here}/nightly.yaml --address http://ray:8265 --wait >>" in out
    from batchrun.cli.submit import command

    options = {name for option in command.params for name in option.opts}
    assert {"--address", "--wait", "--set"} <= options


def test_a_time_zone(here: Path) -> None:
    """The zone stands above the line and in the next times; one that is none is refused."""
    code, out, err = run("nightly.yaml", "--time-zone", "Asia/Kolkata")
    assert (code, out.splitlines()[1]) == (0, "CRON_TZ=Asia/Kolkata")
    assert err.splitlines()[-1].count(" 02:00 IST") == 3
    code, out, err = run("nightly.yaml", "--time-zone", "Mars/Base")
    assert (code, out) == (2, "")
    assert "there is no time zone 'Mars/Base'" in err


def test_kubernetes_objects(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job file as written, its workers, its variables; nothing that is this machine's own."""
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("S3_ENDPOINT", "http://s3:9000")
    code, out, err = run(
        "nightly.yaml", "--format", "kubernetes", "--image", "batchrun:1", "--namespace", "n",
        "--node-selector", "gpu=a10g", "--secret", "keys",
    )  # fmt: skip
    assert (code, err.splitlines()[0].count(" 02:00 UTC")) == (0, 3)
    parts = {part["kind"]: part for part in yaml.safe_load_all(out)}
    assert parts["CronJob"]["spec"]["timeZone"] == "Etc/UTC"
    assert parts["ConfigMap"]["data"]["job.yaml"] == Path("nightly.yaml").read_text()
    rayjob = yaml.safe_load(parts["ConfigMap"]["data"]["rayjob.yaml"])
    [group] = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 3
    [container] = group["template"]["spec"]["containers"]
    assert container["env"] == [{"name": "S3_ENDPOINT", "value": "http://s3:9000"}]
    assert group["template"]["spec"]["nodeSelector"] == {"gpu": "a10g"}


def test_local_paths_are_warned_of(here: Path) -> None:
    """A pod does not have this machine's files."""
    code, _, err = run(
        "nightly.yaml", "--format", "kubernetes", "--image", "i", "--set", "output.path=/data/out"
    )
    assert code == 0
    assert err.startswith("warning: /data/out is a local path: mount a volume there in every pod")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "kubernetes"], "--format kubernetes needs --image"),
        (["--env-file", "nowhere"], "--env-file: nowhere is no file"),
        (["--set", "schedule=1 2 3"], "schedule: has 3 fields, not 5"),
        (["--set", "schedule=null"], "--set: schedule: is not given, so there is no time"),
        (["--set", "name=" + "x" * 200, "--log-dir", "y" * 200, "--set", "name=" + "z" * 200],
         "more than cron takes"),
        (["--format", "kubernetes", "--image", "i", "--node-selector", "gpu"],
         "write LABEL=VALUE, not 'gpu'"),
    ],
)  # fmt: skip
def test_what_cannot_be_printed_is_exit_code_2(here: Path, arguments: list[str], said: str) -> None:
    """Nothing is on stdout then, and stderr says what to mend."""
    code, out, err = run("nightly.yaml", *arguments)
    assert (code, out) == (2, "")
    assert said in err

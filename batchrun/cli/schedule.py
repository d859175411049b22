"""``batchrun schedule``"""

from __future__ import annotations

import os
import re
import shutil
import sys
from datetime import UTC, datetime, tzinfo
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import click

from batchrun.cli import echo_error
from batchrun.cli.options import debug_option, job_argument, set_option
from batchrun.errors import JobError, Problem
from batchrun.logs import names_a_secret, redact

if TYPE_CHECKING:
    from batchrun.job import Job
    from batchrun.schedule import Schedule

# What a run reads of the environment beside the variables that the job names.
_PASSED = (
    "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
    "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION",
)  # fmt: skip
# And what means something on this machine alone.
_PASSED_HERE = (
    "AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE",
    "AWS_EC2_METADATA_DISABLED", "HTTPS_PROXY", "NO_PROXY", "BATCHRUN_CACHE", "RAY_ADDRESS",
    "RAY_USAGE_STATS_ENABLED", "PYTHONPATH",
)  # fmt: skip
_NAMED = re.compile(r"(?<!\$)\$\{([A-Za-z_][A-Za-z0-9_]*)")


@click.command(
    epilog="Example: batchrun schedule jobs/classify.yaml --set 'schedule=0 2 * * *' >>my.crontab, "
    "or with --format kubernetes --image IMAGE | kubectl apply -f -"
)
@job_argument
@set_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["cron", "kubernetes"]),
    default="cron",
    show_default=True,
    help="A crontab line for this machine, or a CronJob that creates a RayJob.",
)
@click.option(
    "--time-zone",
    metavar="NAME",
    help="Zone of the schedule, e.g. Europe/Berlin. Default: the machine's for cron, UTC else.",
)
@click.option("--address", metavar="URL", help="cron: submit to this Ray cluster and wait.")
@click.option(
    "--log-dir", default="logs", show_default=True, help="cron: folder of the logs, one a day."
)
@click.option(
    "--keep-logs",
    metavar="DAYS",
    type=click.IntRange(1, 3650),
    default=30,
    show_default=True,
    help="cron: days after which logs are deleted.",
)
@click.option("--env-file", metavar="FILE", help="cron: NAME=value lines read before each run.")
@click.option("--image", help="kubernetes: the container image, see deploy/Dockerfile.")
@click.option("--namespace", help="kubernetes: the namespace; default: that of kubectl.")
@click.option(
    "--service-account",
    default="batchrun",
    show_default=True,
    help="kubernetes: of the run's pods; what may read and write the storage.",
)
@click.option(
    "--secret",
    "secrets",
    metavar="NAME",
    multiple=True,
    help="kubernetes: a Secret whose keys become environment variables. Can be repeated.",
)
@click.option(
    "--node-selector",
    "selectors",
    metavar="LABEL=VALUE",
    multiple=True,
    help="kubernetes: nodes of the workers. Can be repeated.",
)
@debug_option
def command(
    job_path: str,
    overrides: tuple[str, ...],
    form: str,
    time_zone: str | None,
    address: str | None,
    log_dir: str,
    keep_logs: int,
    env_file: str | None,
    image: str | None,
    namespace: str | None,
    service_account: str,
    secrets: tuple[str, ...],
    selectors: tuple[str, ...],
) -> int:
    """Print what runs a job on its schedule: a crontab line, or Kubernetes objects.

    The schedule is the job's key `schedule`, a cron expression. Each run takes what is new: a run
    over a folder in which nothing is new ends at once. Nothing is installed; stdout is the
    crontab or manifest.
    """
    from batchrun.job import parse_job
    from batchrun.jobfile import read_job_file
    from batchrun.schedule import ScheduleError, parse_schedule

    source = read_job_file(job_path, overrides)
    job = parse_job(source)
    if job.schedule is None:
        problem = Problem(
            source.place("schedule"),
            "schedule",
            "is not given, so there is no time to run at",
            'add for example schedule: "0 2 * * *"',
        )
        raise JobError((problem,))
    schedule = parse_schedule(job.schedule)
    zone = _zone(time_zone)
    text = Path(job_path).read_text(encoding="utf-8-sig")
    if form == "kubernetes":
        if image is None:
            raise click.UsageError("--format kubernetes needs --image, the image that pods run")
        environ = _environ(text, _PASSED, bool(secrets), "name a Secret that has it with --secret")
        click.echo(
            _kubernetes(
                job, text, schedule, overrides, time_zone or "Etc/UTC", image, namespace,
                service_account, environ, secrets, _pairs(selectors),
            ),
            nl=False,
        )  # fmt: skip
        _echo_next(schedule, zone or UTC)
        return 0
    advice = "put it into a file that only its owner can read, and name that with --env-file"
    environ = _environ(text, (*_PASSED, *_PASSED_HERE), env_file is not None, advice)
    try:
        line = _crontab(job, job_path, schedule, overrides, address, log_dir, keep_logs, env_file,
                        environ)  # fmt: skip
    except ScheduleError as error:
        raise click.UsageError(f"{error.message}; {error.hint}") from error
    click.echo(f"# batchrun: {_slug(job.name)}. Mails when a run needs a person; logs every run.")
    if time_zone is not None:
        click.echo(f"CRON_TZ={time_zone}")
        _warn_of_zone(time_zone)
    click.echo(line)
    _echo_next(schedule, zone)
    return 0


def _crontab(
    job: Job,
    job_path: str,
    schedule: Schedule,
    overrides: tuple[str, ...],
    address: str | None,
    log_dir: str,
    keep_logs: int,
    env_file: str | None,
    environ: dict[str, str],
) -> str:
    from batchrun.cluster.address import check_address
    from batchrun.schedule import CronCommand, crontab_line

    command = [*_program(), "submit", os.path.abspath(job_path)]
    for override in overrides:
        command += ["--set", override]
    if address is not None:
        command += ["--address", address]
    place = address or job.ray.address or environ.get("RAY_ADDRESS")
    if place:
        check_address(place)
        command.append("--wait")
    if env_file is not None and not Path(env_file).is_file():
        raise click.UsageError(f"--env-file: {env_file} is no file")
    return crontab_line(
        schedule,
        CronCommand(
            name=_slug(job.name),
            # Where the relative paths of a job mean what they mean to whoever calls this.
            folder=os.getcwd(),
            command=command,
            log_folder=os.path.abspath(log_dir),
            keep_days=keep_logs,
            environ=environ,
            env_file=None if env_file is None else os.path.abspath(env_file),
        ),
    )


def _kubernetes(
    job: Job,
    text: str,
    schedule: Schedule,
    overrides: tuple[str, ...],
    time_zone: str,
    image: str,
    namespace: str | None,
    service_account: str,
    environ: dict[str, str],
    secrets: tuple[str, ...],
    node_selector: dict[str, str],
) -> str:
    from batchrun.manifest import ScheduledJob, render_manifest

    written = job.input.path
    paths = [job.model.path, *([written] if isinstance(written, str) else written), job.output.path]
    for path in paths:
        if ("://" not in path and path != job.model.path) or path.startswith("file:"):
            echo_error(f"warning: {path} is a local path: mount a volume there in every pod")
    workers = job.resources.workers
    return render_manifest(
        ScheduledJob(
            name=job.name,
            job_text=text,
            cron=schedule.text,
            time_zone=time_zone,
            image=image,
            ray_version=version("ray"),
            workers=workers if isinstance(workers, int) else workers.max,
            gpu=job.resources.gpus_per_worker != 0,
            namespace=namespace,
            service_account=service_account,
            overrides=overrides,
            environ=environ,
            secrets=secrets,
            node_selector=node_selector,
        )
    )


def _program() -> list[str]:
    """What is running now, as cron can start it: `batchrun`, or Python with the module."""
    script = Path(os.path.abspath(sys.argv[0]))
    if script.name == "batchrun" and os.access(script, os.X_OK):
        return [str(script)]
    return [sys.executable, "-m", "batchrun"]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "job"


def _environ(
    job_text: str, passed: tuple[str, ...], has_place: bool, advice: str
) -> dict[str, str]:
    """Variables to write down: those that the job names and those that a run reads, where set.

    A secret is never written down: it is left to the place that there is for it (``has_place``),
    or refused.
    """
    found = {}
    for name in dict.fromkeys((*_NAMED.findall(job_text), *passed)):
        value = os.environ.get(name)
        if not value:
            continue
        if names_a_secret(name) or redact(f"{name}={value}") != f"{name}={value}":
            if not has_place:
                raise click.UsageError(f"the variable {name} holds a secret: {advice}")
            continue
        found[name] = value
    return found


def _pairs(selectors: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for selector in selectors:
        label, equals, value = selector.partition("=")
        if not label or not equals:
            raise click.UsageError(f"--node-selector: write LABEL=VALUE, not {selector!r}")
        pairs[label] = value
    return pairs


def _zone(name: str | None) -> ZoneInfo | None:
    if name is None:
        return None
    try:
        return ZoneInfo(name)
    except (ValueError, OSError) as error:  # ZoneInfoNotFoundError is a KeyError
        raise click.UsageError(f"--time-zone: there is no time zone {name!r}") from error
    except KeyError as error:
        raise click.UsageError(
            f"--time-zone: there is no time zone {name!r}; write one such as Europe/Berlin"
        ) from error


def _warn_of_zone(name: str) -> None:
    """Say where the cron of this machine would not keep to the zone."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    for program in ("crond", "cron"):
        found = shutil.which(program, path=path)
        if found is not None:
            # Debian's and Ubuntu's cron takes CRON_TZ for a variable like any other.
            if b"CRON_TZ" not in Path(found).read_bytes() and _local_zone() != name:
                echo_error(
                    f"warning: {found} does not know CRON_TZ and goes by the machine's zone "
                    f"({_local_zone() or 'unknown'}): install cronie, or set the machine's zone"
                )
            return


def _local_zone() -> str:
    return os.path.realpath("/etc/localtime").partition("/zoneinfo/")[2]


def _echo_next(schedule: Schedule, zone: tzinfo | None) -> None:
    now = datetime.now(UTC)
    ticks = islice(schedule.times_after(now, zone or now.astimezone().tzinfo), 3)
    echo_error("next: " + ", ".join(f"{tick:%a %Y-%m-%d %H:%M %Z}" for tick in ticks))

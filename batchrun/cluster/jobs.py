"""Runs as jobs of a Ray cluster, through the Ray Jobs API: submit, list, follow, cancel.

The cluster is reached by its dashboard's address alone; nothing of Ray runs on this machine. What
travels is the job file with everything filled in, and this version of the package, so that the
cluster needs batchrun's dependencies but not batchrun itself. A job of Ray is not started again
when its node dies: submitting again resumes the run.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobSubmissionClient

from batchrun import __version__
from batchrun.cluster.address import HINT, check_address, find_dashboard
from batchrun.cluster.places import located
from batchrun.errors import ClusterError, InterruptedRunError, JobError, Problem
from batchrun.job import Job, from_root

_KEY = "batchrun."
_JOB_FILE = "job.yaml"
_POLL_S = 1.0
_AGENT_S = 30.0  # how long a cluster may take to be able to run jobs after its dashboard answers


class JobState(StrEnum):
    """What Ray says of a job."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self not in (JobState.PENDING, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """One run as a job of a cluster. Times are Unix seconds; ``exit_code`` is that of
    ``batchrun run``, None until it ended by itself. ``output`` and ``storage_options`` (without
    secrets) are where the run writes; ``run_id`` is "" where it was not known at submission."""

    id: str
    name: str
    run_id: str
    output: str
    storage_options: dict[str, object]
    state: JobState
    message: str
    started_at: float | None
    ended_at: float | None
    exit_code: int | None

    @property
    def verdict(self) -> str:
        """How it is, for people. What Ray calls failed may be a run that was interrupted."""
        if not self.exit_code:
            return self.state.value
        interrupted = self.exit_code == InterruptedRunError.exit_code
        return f"{'interrupted' if interrupted else self.state.value} (exit {self.exit_code})"

    def to_json(self) -> dict[str, object]:
        """Plain values for one JSON document."""
        return {
            "id": self.id,
            "name": self.name,
            "run_id": self.run_id,
            "output": self.output,
            "state": self.state.value,
            "exit_code": self.exit_code,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "message": self.message,
        }


class ClusterJobs:
    """The jobs of one cluster.

    ``address`` is that of its dashboard, e.g. ``http://127.0.0.1:8265``, or what else Ray's own
    ``ray job`` takes. Every method raises ClusterError when the cluster does not answer.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        check_address(address)
        with _border(address):
            self._client = JobSubmissionClient(find_dashboard(address))
        # Its uploads and closed sockets are nobody's news.
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)

    @property
    def dashboard_url(self) -> str:
        """Where a person looks at the cluster."""
        return str(self._client.get_address()).rstrip("/")

    def url(self, job_id: str) -> str:
        """Where a person looks at one job."""
        return f"{self.dashboard_url}/#/jobs/{job_id}"

    def submit(
        self, job: Job, *, run_id: str = "", command: str = "run", flags: Sequence[str] = ()
    ) -> str:
        """Start ``batchrun run``, or another ``command`` that runs ``job`` in a cluster, with
        ``flags``; the id of the job.

        Raises JobError where ``ray.runtime_env`` has keys that the shipping needs itself.
        """
        job_id = f"{_slug(job.name)}-{(run_id or secrets.token_hex(4))[:8]}-{secrets.token_hex(3)}"
        words = ["python", "-m", "batchrun", command, _JOB_FILE, "--address", "auto", *flags]
        with tempfile.TemporaryDirectory(prefix="batchrun-") as folder:
            (Path(folder) / _JOB_FILE).write_text(shipped_job(job), encoding="utf-8")
            runtime_env = _runtime_env(job, folder)
            until = time.monotonic() + _AGENT_S
            while not self._submit(job_id, shlex.join(words), runtime_env, _metadata(job, run_id)):
                if time.monotonic() > until:
                    raise ClusterError(
                        f"the Ray cluster at {self.address!r} has no node that takes jobs",
                        "its agents may still be starting, or be dead because another Ray on their "
                        "machine has their port: look at the dashboard and dashboard_agent.log",
                    )
                time.sleep(_POLL_S)
        return job_id

    def _submit(
        self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> bool:
        """Hand a job to the cluster; False while it is too young to take one."""
        with _border(self.address):
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=runtime_env,
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "No available agent" not in str(error):
                    raise
                return False
        return True

    def list(self) -> list[ClusterJob]:
        """The runs among the cluster's jobs, the newest first."""
        with _border(self.address):
            details = self._client.list_jobs()
        found = [_cluster_job(item) for item in details if _is_ours(item)]
        return sorted(found, key=lambda item: item.started_at or time.time(), reverse=True)

    def get(self, job_id: str) -> ClusterJob:
        """The run of this id. Raises ClusterError where there is none."""
        details = self._details(job_id)
        if details is not None and _is_ours(details):
            return _cluster_job(details)
        raise ClusterError(
            f"the cluster at {self.address} has no run {job_id!r}",
            "`batchrun list` shows them; a cluster forgets its jobs when it is stopped",
        )

    def _details(self, job_id: str) -> JobDetails | None:
        """What Ray knows of one job; None where it knows none of this id."""
        with _border(self.address):
            try:
                return self._client.get_job_info(job_id)
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise
                return None

    def logs(self, job_id: str) -> str:
        """What the run printed so far."""
        with _border(self.address):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """What the run printed and prints, as it comes, until it ends."""
        with _border(self.address):
            lines = self._client.tail_job_logs(job_id)
            with asyncio.Runner() as runner:
                while (text := runner.run(_next(lines))) is not None:
                    yield text

    def wait(self, job_id: str, timeout_s: float = float("inf")) -> ClusterJob:
        """The run when it is over, or as it is after so long."""
        until = time.monotonic() + timeout_s
        while True:
            job = self.get(job_id)
            if job.state.is_over or time.monotonic() >= until:
                return job
            time.sleep(min(_POLL_S, max(0.05, until - time.monotonic())))

    def stop(self, job_id: str) -> None:
        """Have Ray end the job: SIGTERM, and SIGKILL three seconds later."""
        with _border(self.address):
            self._client.stop_job(job_id)

    def cancel(
        self, job_id: str, ask: Callable[[ClusterJob], bool], grace_s: float
    ) -> tuple[ClusterJob, bool]:
        """End a run: first ``ask`` it to drain, and have Ray stop it if it has not ended after
        ``grace_s``. The run as it is then, and whether it ended by itself.

        ``ask`` says whether the run can hear it; where it cannot, Ray stops it at once.
        """
        job = self.get(job_id)
        if job.state.is_over:
            return job, True
        if ask(job):
            job = self.wait(job_id, grace_s)
            if job.state.is_over:
                return job, True
        self.stop(job_id)
        return self.wait(job_id, _POLL_S * 30), False


def shipped_job(job: Job) -> str:
    """The job file as the cluster gets it: everything filled in, local paths absolute, and no
    ``ray`` section, as it runs inside the cluster already."""
    raw = located(job.model_dump(mode="json"))
    del raw["ray"]
    # Variables were replaced here: what looks like one now is meant as it stands.
    return json.dumps(raw, indent=2, ensure_ascii=False).replace("${", "$${")


def _runtime_env(job: Job, folder: str) -> dict[str, Any]:
    own = {"working_dir", "py_modules"}
    taken = sorted(own & job.ray.runtime_env.keys())
    if taken:
        key = f"ray.runtime_env.{taken[0]}"
        problem = Problem(
            job.name,
            key,
            "the job file and batchrun itself are shipped with this key",
            "delete it; use pip, env_vars or an image for what workers need beside",
        )
        raise JobError((problem,))
    return {
        **job.ray.runtime_env,
        "working_dir": folder,
        "py_modules": [str(Path(__file__).resolve().parents[1])],
    }


def _metadata(job: Job, run_id: str) -> dict[str, str]:
    masked = job.redacted()["output"]
    assert isinstance(masked, dict)
    return {
        "job_name": job.name,  # what Ray's page of jobs shows as their names
        f"{_KEY}job": job.name,
        f"{_KEY}run": run_id,
        f"{_KEY}output": from_root(job.output.path),
        f"{_KEY}storage_options": json.dumps(masked["storage_options"]),
        f"{_KEY}version": __version__,
    }


def _is_ours(details: JobDetails) -> bool:
    return bool(details.submission_id) and f"{_KEY}job" in (details.metadata or {})


def _cluster_job(details: JobDetails) -> ClusterJob:
    metadata = details.metadata or {}
    return ClusterJob(
        id=str(details.submission_id),
        name=metadata[f"{_KEY}job"],
        run_id=metadata.get(f"{_KEY}run", ""),
        output=metadata.get(f"{_KEY}output", ""),
        storage_options=json.loads(metadata.get(f"{_KEY}storage_options", "{}")),
        state=JobState(str(details.status.value).lower()),
        message=details.message or "",
        started_at=details.start_time / 1000 if details.start_time else None,
        ended_at=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
    )


async def _next(lines: Any) -> str | None:
    return await anext(lines, None)


def _slug(name: str) -> str:
    """The job's name as far as it can stand in an id and a URL."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "job"


@contextmanager
def _border(address: str) -> Iterator[None]:
    """What Ray's client raises, as an error of this package. It has few classes of its own:
    ConnectionError, RuntimeError with the server's words, ValueError for a wrong address."""
    try:
        yield
    except (ConnectionError, OSError) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {address!r}: {_first_line(error)}",
            HINT,
        ) from error
    except (RayError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        hint = ""
        if "401" in str(error) or "authenti" in str(error).lower():
            hint = "the cluster wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        raise ClusterError(
            f"the Ray cluster at {address!r} refused: {_first_line(error)} "
            f"(this is Ray {ray.__version__})",
            hint,
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]

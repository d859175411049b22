"""Trying failed rows of a finished run again: the job, from its file or from the run itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from batchrun.cluster.connection import Cluster
from batchrun.cluster.driver import run_checked
from batchrun.cluster.opening import check_retry
from batchrun.cluster.summary import Summary
from batchrun.cluster.view import NoView, View
from batchrun.data.jobrecord import read_job
from batchrun.data.store import Store
from batchrun.job import Job
from batchrun.jobfile import JobSource, override_job
from batchrun.logs import REDACTED
from batchrun.records import ErrorKind


def retry_job(
    job: Job,
    kinds: Sequence[ErrorKind],
    *,
    source: JobSource | None = None,
    model_path: str | None = None,
    address: str | None = None,
    deterministic: bool = False,
    stop: threading.Event | None = None,
    view: View | None = None,
) -> Summary:
    """Run the rows again that failed with one of ``kinds``, and put the parts that hold them anew
    in their places. Everything else is as in :func:`~batchrun.cluster.driver.run_job`.

    ``model_path`` is how the run names its model, where ``job`` names it otherwise.
    """
    started = time.monotonic()
    view = view or NoView()
    checked = check_retry(job, source, tuple(kinds), model_path)
    with Cluster(job, address, view) as cluster:
        return run_checked(
            checked, cluster, started=started, deterministic=deterministic, stop=stop, view=view
        )


def recorded_job(output: str, overrides: Sequence[str]) -> tuple[JobSource, str | None]:
    """The job of the run in ``output``, as the run recorded it, with ``overrides`` on top; and how
    it names its model.

    What was masked there as secret is left out: credentials come from the environment. Raises
    OutputError when there is no run.
    """
    store = Store.open(output)
    semantic, recorded = read_job(store)
    raw = {
        name: _without_masked(section) if isinstance(section, Mapping) else section
        for name, section in recorded.items()
    }
    own = raw.get("output")
    raw["output"] = {**(own if isinstance(own, Mapping) else {}), "path": output}
    model = semantic.get("model")
    path = model.get("path") if isinstance(model, Mapping) else None
    source = override_job(raw, overrides, f"the job of {store.url}")
    return source, path if isinstance(path, str) else None


def _without_masked(section: Mapping[str, object]) -> dict[str, object]:
    """A section of a job without the options that hold a masked secret."""
    found: dict[str, object] = {}
    for name, value in section.items():
        if name in ("storage_options", "runtime_env") and isinstance(value, Mapping):
            value = _unmasked(value)
        found[name] = value
    return found


def _unmasked(options: Mapping[str, object]) -> dict[str, object]:
    return {
        name: _unmasked(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if not (isinstance(value, str) and REDACTED in value)
    }

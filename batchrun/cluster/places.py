"""Local paths of a job made absolute, for those who run it from another folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchrun.llm import TINY


def located(raw: Mapping[str, object]) -> dict[str, Any]:
    """A job as nested dictionaries, with absolute paths wherever a local one stands."""
    job: dict[str, Any] = copy.deepcopy(dict(raw))
    if job["model"]["path"] != TINY:
        job["model"]["path"] = absolute(job["model"]["path"])
    paths = job["input"]["path"]
    job["input"]["path"] = (
        absolute(paths) if isinstance(paths, str) else [absolute(path) for path in paths]
    )
    job["output"]["path"] = absolute(job["output"]["path"])
    return job


def absolute(path: str) -> str:
    """A local path seen from the root; URLs stay as they are."""
    # Not resolve(): a glob stays as it is, and a link may point elsewhere on a cluster.
    local = Path(path).expanduser()
    # The folder that a process runs in may be gone, so it is asked for where it matters.
    return path if "://" in path else str(local if local.is_absolute() else Path.cwd() / local)

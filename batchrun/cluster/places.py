"""Local paths of a job made absolute, for those who run it from another folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from batchrun.job import TINY, from_root


def located(raw: Mapping[str, object]) -> dict[str, Any]:
    """A job as nested dictionaries, with absolute paths wherever a local one stands."""
    job: dict[str, Any] = copy.deepcopy(dict(raw))
    if job["model"]["path"] != TINY:
        job["model"]["path"] = from_root(job["model"]["path"])
    paths = job["input"]["path"]
    job["input"]["path"] = (
        from_root(paths) if isinstance(paths, str) else [from_root(path) for path in paths]
    )
    job["output"]["path"] = from_root(job["output"]["path"])
    return job

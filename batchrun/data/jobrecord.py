"""Whose run an output holds: the record of its job, ``job.json`` in the run's folder.

While it is there, the output is known as that run's.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping

from batchrun.data.kept import newest_run
from batchrun.data.layout import run_folder
from batchrun.data.store import Store
from batchrun.errors import OutputError


def find_run(store: Store) -> str | None:
    """The id of the run in this output, the newest where parts of earlier ones were kept."""
    return newest_run(store)


def require_run(store: Store) -> str:
    """The id of the run in this output. Raises OutputError when there is none."""
    run = find_run(store)
    if run is None:
        raise OutputError(
            f"output: {store.url} holds no run of batchrun", "check the path, or submit a job"
        )
    return run


def read_job(store: Store) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """What determines the content of the run in ``store``, and its whole job without secrets.

    Raises OutputError when there is no run.
    """
    run = require_run(store)
    path = f"{run_folder(run)}/job.json"
    try:
        record = json.loads(store.read(path) or b"null")
        semantic, job = record["semantic"], record["job"]
        if not (isinstance(semantic, dict) and isinstance(job, dict)):
            raise ValueError("it holds no job")
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"output: {store.url}/{path} is damaged ({error!r})", "give the job file instead"
        ) from error
    return semantic, job


def read_semantic(store: Store, run: str) -> Mapping[str, object]:
    """What determines the content of a run, as it was recorded; empty where that is damaged."""
    data = store.read(f"{run_folder(run)}/job.json")
    try:
        semantic = json.loads(data or b"{}").get("semantic", {})
    except (ValueError, AttributeError):
        return {}
    return semantic if isinstance(semantic, dict) else {}


def samples_per_row(store: Store, run: str) -> int:
    """How many samples a row of the run has, as its job says."""
    generation = read_semantic(store, run).get("generation")
    found = generation.get("n") if isinstance(generation, dict) else None
    return found if isinstance(found, int) else 1


def write_job(store: Store, run: str, job: Mapping[str, object]) -> None:
    """Record the job of ``run``, unless that is done already."""
    data = json.dumps(job, indent=1).encode()
    store.put_if_absent(f"{run_folder(run)}/job.json", data, uuid.uuid4().hex)


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """``key: old -> new`` for every leaf that differs, in key order."""
    before, after = _flat(old), _flat(new)
    absent = "(not set)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in sorted({*before, *after})
        if before.get(key, absent) != after.get(key, absent)
    ]


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, item in value.items():
            found.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
        return found
    text = json.dumps(value, ensure_ascii=False)
    return {prefix: text if len(text) <= 80 else text[:77] + "..."}

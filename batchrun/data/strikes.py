"""Deaths of workers, written down before anybody acts on them: they outlive every driver."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
from dataclasses import asdict
from typing import Any

from batchrun.data.layout import strikes_folder
from batchrun.data.store import Store
from batchrun.errors import OutputError
from batchrun.records import Strike
from batchrun.rows import Rows

_MAX_BYTES = 16 << 20
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,100}")

_log = logging.getLogger(__name__)


def write_strike(store: Store, run: str, epoch: int, strike: Strike) -> None:
    """Record a death; returns when that is durable. The same death is recorded once only.

    ``epoch`` is that of the driver, whose workers have names of their own.
    """
    record = {**asdict(strike), "rows": {str(n): r.ranges for n, r in strike.rows.items()}}
    path = f"{strikes_folder(run)}/{epoch:06d}-{_file_name(strike.worker)}.json"
    store.put_if_absent(path, json.dumps(record, indent=1).encode(), uuid.uuid4().hex)


def read_strikes(store: Store, run: str) -> tuple[Strike, ...]:
    """Every death on record, in the order of drivers and workers.

    A record that cannot be read is left out, with a warning: the rows are then tried once more.
    """
    found = []
    for item in store.list(strikes_folder(run)):
        data = store.read(item.path) if item.size_bytes <= _MAX_BYTES else b""
        try:
            found.append(_parse(data or b""))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            _log.warning("%s/%s is damaged (%s) and is ignored", store.url, item.path, error)
    return tuple(found)


def delete_strikes(store: Store, run: str) -> None:
    """Forget all deaths: the rows may be tried again as if nothing had happened."""
    paths = [item.path for item in store.list(strikes_folder(run))]
    if paths:
        store.delete(paths)


def _parse(data: bytes) -> Strike:
    raw: dict[str, Any] = json.loads(data)
    rows: dict[int, Rows] = {}
    for number, ranges in raw.pop("rows").items():
        if any(type(ordinal) is not int for pair in ranges for ordinal in pair):
            raise ValueError("an ordinal that is no number")
        rows[int(number)] = Rows.of_ranges(ranges)
    texts = ("worker", "cause", "message", "device")
    switches = ("alone", "blind", "idle")
    if not all(isinstance(raw[name], str) for name in texts) or not all(
        isinstance(raw[name], bool) for name in switches
    ):
        raise ValueError("a value of the wrong type")
    return Strike(rows=rows, **raw)


def _file_name(worker: str) -> str:
    """A worker's name as one of a file, where need be by its hash."""
    if not worker:
        raise OutputError("a strike needs the name of its worker")
    if _PLAIN.fullmatch(worker) and not worker.startswith("."):
        return worker
    return hashlib.sha256(worker.encode()).hexdigest()[:32]

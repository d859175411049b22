"""Asking a run to stop, through the storage that it writes to.

The request is an object beside the run's bookkeeping. The driver looks for it with every beat of
its lock and then stops as after SIGTERM: everything finished is kept, exit code 75. So a run can
be stopped from any machine that can write its output, however it was started.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime

from batchrun.data.layout import run_folder
from batchrun.data.store import Store


def cancel_path(run: str) -> str:
    """Where the request stands."""
    return f"{run_folder(run)}/cancel.json"


def request_cancel(store: Store, run: str) -> None:
    """Ask the run's driver to stop; the object says who asked, and when."""
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.put(cancel_path(run), json.dumps(record, indent=1).encode())


def is_cancel_requested(store: Store, run: str) -> bool:
    """Whether somebody asked the run to stop since its driver began."""
    return store.info(cancel_path(run)) is not None


def clear_cancel(store: Store, run: str) -> None:
    """Forget a request that was meant for an earlier driver."""
    if is_cancel_requested(store, run):
        store.delete([cancel_path(run)])

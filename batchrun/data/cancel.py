"""Asking a run to stop, through the storage that it writes to.

The request is an object beside the run's bookkeeping; the driver looks for it with every beat of
its lock and then stops as after SIGTERM: everything finished is kept, exit code 75. So a run can
be stopped from any machine that can write its output, however it was started.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

from batchrun.data.layout import run_folder
from batchrun.data.lock import Holder
from batchrun.data.store import Store


def cancel_path(run: str) -> str:
    """Where the request of a run stands."""
    return f"{run_folder(run)}/cancel.json"


def request_cancel(store: Store, run: str) -> None:
    """Ask the run's driver to stop; says who asked, and when."""
    who = Holder.this_process()
    record = {
        "host": who.host,
        "pid": who.pid,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.put(cancel_path(run), json.dumps(record, indent=1).encode())


def is_cancel_requested(store: Store, run: str) -> bool:
    """Whether somebody asked the run to stop since its driver began."""
    return store.info(cancel_path(run)) is not None


def clear_cancel(store: Store, run: str) -> None:
    """Forget a request that was meant for an earlier driver."""
    store.delete([cancel_path(run)])

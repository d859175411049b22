"""Faults that a text sets off, in workers that tests start: a row's prompt says what befalls the
process when its engine runs it. A setup hook of Ray installs them; the package knows nothing of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Hashable
from typing import Any

DIE = "What is 90+90+90?"
"""The process ends, as after an illegal access of the GPU."""
HANG = "What is 91+91+91?"
"""The process stands still."""
DEADLY = "deadly"
"""In the name of a file: the process ends when the file is to be read."""
HOOK = "tests.integration.faults.install"
RUNTIME_ENV: dict[str, Any] = {"worker_process_setup_hook": HOOK}


def install() -> None:
    """Prepare this process; the engine is touched only where a worker loads one."""
    from batchrun.cluster.worker import Loaded, Worker
    from tests.chaos import faults as planned

    planned.install()
    load = Worker.load

    def load_with_faults(self: Worker) -> Loaded:
        _arm()
        return load(self)

    Worker.load = load_with_faults  # type: ignore[method-assign]


def _arm() -> None:
    from batchrun.data.reader import ShardReader
    from batchrun.engine.engine import Engine
    from batchrun.engine.model_runner import ModelRunner, Pass
    from batchrun.engine.request import Request
    from batchrun.engine.scheduler import Step
    from batchrun.records import Shard

    faults: dict[Hashable, str] = {}
    add, launch, read = Engine.add, ModelRunner.launch, ShardReader.__init__

    def read_or_die(self: ShardReader, shard: Shard, *args: Any, **more: Any) -> None:
        if DEADLY in shard.path:
            os._exit(1)
        read(self, shard, *args, **more)

    def add_and_look(self: Engine, request: Request) -> None:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(list(request.prompt_token_ids))
        for fault in (DIE, HANG):
            if fault in text:
                faults[request.key] = fault
        add(self, request)

    def launch_or_fail(self: ModelRunner, step: Step) -> list[Pass]:
        keys = [item.request.key for item in step.decodes]
        keys += [chunk.sequence.request.key for chunk in step.prefills]
        for key in keys:
            match faults.get(key):
                case fault if fault == DIE:
                    os._exit(1)
                case fault if fault == HANG:
                    _stand_still()
        return launch(self, step)

    ShardReader.__init__ = read_or_die  # type: ignore[method-assign]
    Engine.add = add_and_look  # type: ignore[method-assign]
    ModelRunner.launch = launch_or_fail  # type: ignore[method-assign]


def _stand_still() -> None:
    while True:
        time.sleep(60)

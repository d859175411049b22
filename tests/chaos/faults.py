"""What happens to the workers of a chaos test: read from ``chaos-<output>.json`` beside the input.

A setup hook of Ray installs it in every worker process; the package knows nothing of it. The plan:

- ``engine``: the settings of the :class:`~tests.chaos.engine.FakeEngine`; ``{"real": true}`` for
  the embedded model.
- ``puts``: what befalls create-only puts of a worker: ``{"match": regex, "when": "before"|"after",
  "do": "kill"|"stop", "times": n}``; so often in all processes together.
- ``prompts``: what befalls a process that is about to run a prompt: ``{"text": …, "do": "die" |
  "hang" | "raise" | "memory", "times": n}``; ``times`` null is always. With ``"device": "0"`` only
  where that is the process's GPU.
- ``load``: "raise" or null: what loading the model does.
- ``max_batch``: the real engine runs out of memory in steps of more sequences.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HOOK = "tests.chaos.faults.install"
RUNTIME_ENV: dict[str, Any] = {"worker_process_setup_hook": HOOK}


def plan_path(input_folder: Path, output: str) -> Path:
    """Where the plan of a run's faults stands."""
    return input_folder.parent / f"chaos-{output.rstrip('/').rpartition('/')[2]}.json"


def marks(plan: Path) -> Path:
    """Where processes leave marks: which faults have happened, and their ledgers."""
    return plan.with_suffix("")


def install() -> None:
    """Prepare this process; nothing happens unless the run has a plan."""
    from batchrun.cluster.worker import Loaded, Worker

    load = Worker.load

    def load_with_faults(self: Worker) -> Loaded:
        job = self._settings.job
        path = plan_path(Path(str(job.input.path)), job.output.path)
        if path.is_file():
            _arm(json.loads(path.read_text()), marks(path))
        return load(self)

    Worker.load = load_with_faults  # type: ignore[method-assign]


def _arm(plan: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if plan.get("puts"):
        _arm_puts(plan["puts"], folder)
    if plan.get("load") == "raise":
        _arm_load()
    elif plan.get("engine", {}).get("real"):
        _arm_real(plan)
    else:
        _arm_fake(plan, folder)


def claim(folder: Path, name: str, times: int | None) -> bool:
    """Whether a fault is still to happen; counts it, over all processes."""
    for number in range(times if times is not None else 1 << 30):
        try:
            os.close(os.open(folder / f"{name}-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
        except FileExistsError:
            continue
    return False


def _arm_puts(rules: Sequence[Mapping[str, Any]], folder: Path) -> None:
    from batchrun.data.local import LocalStore
    from batchrun.data.remote import RemoteStore

    def wrap(store: Any) -> None:
        put: Callable[..., bool] = store.put_if_absent

        def put_with_faults(self: Any, path: str, *arguments: Any, **named: Any) -> bool:
            hit = [item for item in enumerate(rules) if re.search(item[1]["match"], path)]
            for number, rule in hit:
                if rule["when"] == "before" and claim(folder, f"put-{number}", rule["times"]):
                    _befall(rule["do"])
            answer = put(self, path, *arguments, **named)
            for number, rule in hit:
                if rule["when"] == "after" and claim(folder, f"put-{number}", rule["times"]):
                    _befall(rule["do"])
            return answer

        store.put_if_absent = put_with_faults

    wrap(LocalStore)
    wrap(RemoteStore)


def _befall(what: str) -> None:
    match what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "die":
            os._exit(1)
        case "hang":
            _stand_still()
        case "memory":
            _run_out_of_memory()
        case _:
            raise RuntimeError(f"the test wanted this: {what}")


def _stand_still() -> None:
    while True:
        time.sleep(60)


def _run_out_of_memory() -> None:
    """Take memory beyond what the process may have from now on: raises MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    blocks = []
    while True:
        blocks.append(bytearray(16 << 20))


def _arm_load() -> None:
    from batchrun.engine.engine import Engine
    from batchrun.errors import CheckpointError

    def load(*_: object) -> Engine:
        raise CheckpointError("the weights are damaged", "copy them again")

    Engine.load = load  # type: ignore[method-assign, assignment]


def _arm_real(plan: Mapping[str, Any]) -> None:
    import torch

    from batchrun.engine.model_runner import ModelRunner, Pass
    from batchrun.engine.scheduler import Step

    most = plan.get("max_batch")
    launch = ModelRunner.launch

    def launch_or_fail(self: ModelRunner, step: Step) -> list[Pass]:
        if most is not None and len(step.decodes) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return launch(self, step)

    ModelRunner.launch = launch_or_fail  # type: ignore[method-assign]


def _arm_fake(plan: Mapping[str, Any], folder: Path) -> None:
    from batchrun.engine.engine import Engine
    from tests.chaos.engine import make_engine

    device = os.environ.get("CUDA_VISIBLE_DEVICES")
    rules = [rule for rule in plan.get("prompts", ()) if rule.get("device", device) == device]

    def before_step(prompts: Sequence[str]) -> None:
        for number, rule in enumerate(rules):
            if rule["do"] != "raise" and any(rule["text"] in prompt for prompt in prompts):
                if claim(folder, f"prompt-{number}", rule["times"]):
                    _befall(rule["do"])

    def broken(prompt: str) -> bool:
        return any(rule["do"] == "raise" and rule["text"] in prompt for rule in rules)

    def load(*_: object) -> Any:
        engine = make_engine(plan.get("engine", {}), folder / "ledger")
        if rules:
            engine.before_step = before_step
            engine.broken = broken
        return engine

    Engine.load = load  # type: ignore[method-assign, assignment]

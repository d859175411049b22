"""batchrun, transformers and vLLM on the same prompts, in turn, several rounds.

    python scripts/bench/compare.py --python-hf PYTHON --python-vllm PYTHON [--rounds 3]

Each engine has a process and, where it needs one, an environment of its own: the Python given to
it. One that is not given is left out. All are loaded before anything is timed, and all but the one
whose turn it is are stopped. Every round has fresh prompts, the same for all engines. Printed are
output tokens a second, their medians and ratios, and beside each figure how many CPUs *others* kept
busy meanwhile: one busy core more than halves the speed of an engine on two.

Tokens are greedy; those of the float32 engines are compared with batchrun's.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import workloads
from make_model import CONFIG, make_model

from batchrun.engine.cpu_load import busy_seconds

_HERE = Path(__file__).parent
_START_SECONDS = 600
_RUN_SECONDS = 900
_KV_GIB = 2
"""What vLLM is given for its cache; many times what the workloads need."""


@dataclass(frozen=True)
class Entry:
    """An engine in one precision."""

    engine: str
    dtype: str
    python: str

    def __str__(self) -> str:
        return f"{self.engine} {self.dtype}"


@dataclass(frozen=True)
class Timing:
    """One run: output tokens a second, CPU seconds that the engine took, and CPUs others did."""

    rate: float
    cpu_seconds: float
    foreign_cores: float


class Process:
    """A running engine; stopped (as by SIGSTOP) but for :meth:`run`."""

    def __init__(self, entry: Entry, arguments: argparse.Namespace, caching: bool) -> None:
        self.entry = entry
        read_end, write_end = os.pipe()
        self._replies = os.fdopen(read_end)
        command = [
            entry.python, str(_HERE / "run_engine.py"), entry.engine,
            "--model", str(arguments.model), "--dtype", entry.dtype,
            "--device", arguments.device, "--sequences", str(arguments.sequences),
            "--threads", str(arguments.threads), "--replies", str(write_end),
            *(["--prefix-caching"] if caching else []),
        ]  # fmt: skip
        self._log = Path(arguments.scratch) / f"{entry.engine}-{entry.dtype}-{caching}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=_environment(entry, arguments.threads),
                pass_fds=[write_end],
                start_new_session=True,
            )
        os.close(write_end)
        started = time.perf_counter()
        self.versions: dict[str, str] = self._reply(_START_SECONDS)["versions"]
        self.load_seconds = time.perf_counter() - started
        self._signal(signal.SIGSTOP)

    def run(self, workload: Path, tokens: Path, num_tokens: int) -> Timing:
        """Run a workload file of ``num_tokens`` output tokens, which go to ``tokens``."""
        self._signal(signal.SIGCONT)
        before, own = busy_seconds() or 0.0, self._cpu_seconds()
        started = time.perf_counter()
        assert self._process.stdin is not None
        order = json.dumps({"workload": str(workload), "tokens": str(tokens)})
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        seconds = self._reply(_RUN_SECONDS)["seconds"]
        wall = time.perf_counter() - started
        cpu = self._cpu_seconds() - own
        foreign = max(0.0, ((busy_seconds() or 0.0) - before - cpu) / wall)
        self._signal(signal.SIGSTOP)
        return Timing(num_tokens / seconds, cpu, foreign)

    def close(self) -> None:
        """End the engine and what it started."""
        for pid, _ in self._members():
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._replies.close()

    def _reply(self, timeout: float) -> dict[str, object] | dict[str, float]:  # type: ignore[return]
        ready, _, _ = select.select([self._replies], [], [], timeout)
        line = self._replies.readline() if ready else ""
        if line:
            return json.loads(line)
        tail = "\n".join(self._log.read_text().splitlines()[-15:])
        self.close()
        raise SystemExit(f"{self.entry} {'failed' if ready else 'took too long'}:\n{tail}")

    def _members(self) -> Iterator[tuple[int, float]]:
        """Processes of the engine's session, and the CPU seconds of each and its ended children."""
        for path in glob.glob("/proc/[0-9]*/stat"):
            try:
                text = Path(path).read_text()
            except OSError:  # it has just ended
                continue
            fields = text[text.rindex(")") + 2 :].split()
            if int(fields[3]) == self._process.pid:
                ticks = sum(map(int, fields[11:15]))
                yield int(text.split(" ", 1)[0]), ticks / os.sysconf("SC_CLK_TCK")

    def _cpu_seconds(self) -> float:
        return sum(seconds for _, seconds in self._members())

    def _signal(self, number: signal.Signals) -> None:
        for pid, _ in self._members():
            os.kill(pid, number)


def _environment(entry: Entry, threads: int) -> dict[str, str]:
    """All threads for everybody; for vLLM what its documentation recommends on a CPU."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if entry.engine != "batchrun":
        environment.pop("PYTHONPATH", None)
    else:
        environment["PYTHONPATH"] = str(_HERE.parents[1])
    if entry.engine == "vllm":
        # By itself it leaves a core to its scheduler, half of a machine that has two.
        is_all = threads == os.cpu_count()
        environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}" if is_all else "nobind"
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(_KV_GIB)
        preloaded = glob.glob("/usr/lib/*/libtcmalloc.so.4") + glob.glob(
            str(Path(entry.python).parent.parent / "lib" / "libiomp5.so")
        )
        environment["LD_PRELOAD"] = ":".join(preloaded)
    return environment


@dataclass
class Agreement:
    """How far an engine's tokens are batchrun's: rows, and tokens before the first difference."""

    rows: int = 0
    equal_rows: int = 0
    tokens: int = 0
    equal_tokens: int = 0

    def add(self, ours: list[list[int]], theirs: list[list[int]]) -> None:
        """Compare a run."""
        for one, other in zip(ours, theirs, strict=True):
            if len(one) != len(other):
                raise SystemExit(f"{len(one)} tokens against {len(other)}: not the same work")
            pairs = enumerate(zip(one, other, strict=True))
            same = next((i for i, (a, b) in pairs if a != b), len(one))
            self.rows += 1
            self.equal_rows += same == len(one)
            self.tokens += len(one)
            self.equal_tokens += same

    def __str__(self) -> str:
        return (
            f"{self.equal_rows} of {self.rows} rows equal, "
            f"{self.equal_tokens / max(1, self.tokens):.2%} of tokens before a first difference"
        )


def compare(name: str, entries: list[Entry], arguments: argparse.Namespace) -> dict[str, object]:
    """Run one workload and print it."""
    print(f"\n{name}", flush=True)
    processes: list[Process] = []
    timings: dict[Entry, list[Timing]] = defaultdict(list)
    agreements: dict[Entry, Agreement] = defaultdict(Agreement)
    scratch = Path(arguments.scratch)
    try:
        for entry in entries:
            processes.append(Process(entry, arguments, caching=name == "shared-prefix"))
            found = ", ".join(f"{k} {v}" for k, v in processes[-1].versions.items())
            print(f"  {entry}: {found}, loaded in {processes[-1].load_seconds:.0f} s", flush=True)
        for number in range(arguments.rounds + 1):
            # The first, smaller one is the warm-up: compilation, caches of kernels.
            is_warm_up = number == 0
            rows = min(arguments.rows, 16) if is_warm_up else arguments.rows
            work = workloads.WORKLOADS[name](rows, arguments.vocab_size, arguments.seed + number)
            num_tokens = sum(length for _, length in work)
            file = scratch / f"{name}-{number}.jsonl"
            workloads.write(file, work)
            tokens: dict[Entry, list[list[int]]] = {}
            # Nobody is always first.
            turn = number % len(processes)
            for process in processes[turn:] + processes[:turn]:
                entry = process.entry
                if entry.engine == "hf" and number > arguments.hf_rounds:
                    continue
                target = scratch / "tokens.json"
                timing = process.run(file, target, num_tokens)
                tokens[entry] = json.loads(target.read_text())
                if not is_warm_up:
                    timings[entry].append(timing)
                    print(
                        f"  round {number}: {entry!s:18} {timing.rate:8.1f} output tokens/s, "
                        f"{num_tokens / timing.cpu_seconds:7.1f} a CPU second, others "
                        f"{timing.foreign_cores:.2f} CPUs",
                        flush=True,
                    )
            # In bfloat16 near ties fall either way.
            exact = {e.engine: found for e, found in tokens.items() if e.dtype == "float32"}
            for entry, theirs in tokens.items():
                is_other = entry.engine != "batchrun" and entry.dtype == "float32"
                if is_other and "batchrun" in exact:
                    agreements[entry].add(exact["batchrun"], theirs)
    finally:
        for process in processes:
            process.close()
    return _summary(timings, agreements)


def _summary(
    timings: dict[Entry, list[Timing]], agreements: dict[Entry, Agreement]
) -> dict[str, object]:
    medians = {e: statistics.median(t.rate for t in found) for e, found in timings.items()}
    summary: dict[str, object] = {}
    for entry, middle in medians.items():
        ratios = {
            str(ours): rate / middle
            for ours, rate in medians.items()
            if ours.engine == "batchrun" and entry.engine != "batchrun"
        }
        line = f"  median   {entry!s:18} {middle:8.1f} output tokens/s"
        line += "".join(f"; {ours} is {ratio:.2f}x" for ours, ratio in ratios.items())
        print(line)
        found = timings[entry]
        summary[str(entry)] = {
            "tokens_per_second": [timing.rate for timing in found],
            "cpu_seconds": [timing.cpu_seconds for timing in found],
            "foreign_cores": [timing.foreign_cores for timing in found],
            "median": middle,
            "ratios": ratios,
        }
    for entry, agreement in agreements.items():
        print(f"  tokens   {entry!s:18} {agreement}")
        summary[str(entry)]["agreement"] = str(agreement)  # type: ignore[index]
    return summary


def main() -> None:
    """Read the arguments, run the workloads."""
    parser = argparse.ArgumentParser(description="batchrun, transformers and vLLM compared.")
    parser.add_argument("--python-hf", help="a Python that has transformers; none: left out")
    parser.add_argument("--python-vllm", help="a Python that has vLLM; none: left out")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: 60M random weights")
    parser.add_argument("--workload", choices=workloads.WORKLOADS, help="default: all")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="transformers: the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hf-rounds", type=int, default=1, help="it takes the most time by far")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=64, help="at once, batchrun and vLLM")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write all figures to this file, as JSON")
    arguments = parser.parse_args()

    dtypes = arguments.dtypes.split(",")
    entries = [Entry("batchrun", dtype, sys.executable) for dtype in dtypes]
    if arguments.python_vllm:
        entries += [Entry("vllm", dtype, arguments.python_vllm) for dtype in dtypes]
    if arguments.python_hf:
        entries.append(Entry("hf", dtypes[0], arguments.python_hf))
    # Ended from outside, the engines must not stay behind, stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        arguments.scratch = scratch
        if arguments.model is None:
            arguments.model = Path(scratch) / "model"
            make_model(arguments.model, CONFIG)
        config = json.loads((arguments.model / "config.json").read_text())
        arguments.vocab_size = config["vocab_size"]
        print(
            f"{arguments.rows} rows, {arguments.sequences} at once, {arguments.threads} of "
            f"{os.cpu_count()} threads, {arguments.device}, {platform.machine()}, load average "
            f"{os.getloadavg()[0]:.1f}"
        )
        names = [arguments.workload] if arguments.workload else list(workloads.WORKLOADS)
        summary = {name: compare(name, entries, arguments) for name in names}
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

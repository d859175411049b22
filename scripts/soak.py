"""Many rows through real Ray actors with an engine that costs nothing: what the runner itself can.

    python scripts/soak.py                      200,000 rows, 40 files, one worker
    python scripts/soak.py --rows 1000000 --workers 2

Everything but the model is real: reading, prompts, admission, journal, parts, reports, manifest.
Prints rows a second from the moment the first worker is ready, and the driver's memory over time.
Ends with exit code 1 when a row is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
_TOKENS = 16
_SEQUENCES = 64


@dataclass
class Watch:
    """Follows a run: rows and the driver's memory, every few seconds."""

    every_s: float = 2.0
    samples: list[tuple[float, int, float]] = field(default_factory=list)
    """Seconds, rows done, MiB."""
    _at: float = 0.0

    def say(self, text: str) -> None:
        """A line for a person."""
        print(text, file=sys.stderr)

    def __call__(self, progress: object) -> None:
        """A moment of the run."""
        now = time.monotonic()
        if now - self._at < self.every_s:
            return
        self._at = now
        rows: int = progress.done.rows  # type: ignore[attr-defined]
        elapsed: float = progress.elapsed_s  # type: ignore[attr-defined]
        self.samples.append((elapsed, rows, resident_mib()))
        print(f"{elapsed:6.0f} s  {rows:>9,} rows  {self.samples[-1][2]:5.0f} MiB", file=sys.stderr)


def resident_mib() -> float:
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def write_input(folder: Path, num_rows: int, num_files: int) -> None:
    """So many short questions."""
    folder.mkdir()
    for number in range(num_files):
        mine = range(number, num_rows, num_files)
        table = pa.table({"prompt": [f"Question {n}: what comes next?" for n in mine]})
        pq.write_table(table, folder / f"{number:05d}.parquet")


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from batchrun.cluster.driver import run_job
    from batchrun.data.store import Store
    from batchrun.data.verify import verify_run
    from batchrun.job import parse_job
    from batchrun.jobfile import JobSource
    from tests.chaos.faults import RUNTIME_ENV, plan_path

    with tempfile.TemporaryDirectory(prefix="batchrun-soak-") as name:
        folder = Path(name)
        write_input(folder / "in", arguments.rows, arguments.files)
        output = str(folder / "out")
        engine = {"max_sequences": _SEQUENCES, "tokens_a_step": _TOKENS}
        plan_path(folder / "in", output).write_text(json.dumps({"engine": engine}))
        raw = {
            "model": {"path": "tiny"},
            "input": {"path": str(folder / "in"), "prompt_column": "prompt"},
            "generation": {"max_tokens": _TOKENS},
            "resources": {"workers": arguments.workers},
            "output": {"path": output},
            "metrics": {"port": None},
            "ray": {"runtime_env": {**RUNTIME_ENV, "env_vars": {"PYTHONPATH": str(ROOT)}}},
        }
        watch = Watch()
        summary = run_job(parse_job(JobSource.of_mapping(raw)), view=watch)
        verdict = verify_run(Store.open(output))
    seconds = summary.elapsed_s - summary.startup_s
    half = watch.samples[len(watch.samples) // 2 :]
    found = {
        "rows": summary.counts.rows,
        "rows_per_s": round(summary.counts.rows / seconds, 1),
        "seconds": round(seconds, 1),
        "driver_mib_at_half": round(half[0][2], 1) if half else None,
        "driver_mib_at_end": round(half[-1][2], 1) if half else None,
        "problems": list(verdict.problems),
    }
    if arguments.as_json:
        print(json.dumps(found))
    else:
        print(f"{found['rows']:,} rows in {found['seconds']} s: {found['rows_per_s']:,} rows/s")
        print(
            f"driver: {found['driver_mib_at_half']} MiB at half, {found['driver_mib_at_end']} MiB"
        )
    return 0 if not verdict.problems and summary.counts.rows == arguments.rows else 1


if __name__ == "__main__":
    sys.exit(main())

"""What a run costs beside its engine: rows a second of a whole ``submit`` and of the engine alone.

    python scripts/bench/overhead.py                 the embedded model, 4,000 questions
    python scripts/bench/overhead.py --rows 400 --json

The same rows twice, on this machine: first by an engine in this process that gets all rows at
once, then by `submit` with one worker, from the moment its model is loaded to the end of the run:
reading, journal, parts, manifest and Ray's calls are in it. Prints both and their ratio, which
means something on an idle machine only: a run has several processes, the engine alone has one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.cluster.driver import run_job
from batchrun.data.checkpoints import find_checkpoint
from batchrun.data.schema import InputSchema
from batchrun.engine.engine import Engine
from batchrun.engine.options import EngineOptions
from batchrun.job import Job, parse_job
from batchrun.jobfile import JobSource
from batchrun.prompts import input_columns
from batchrun.records import Lease
from batchrun.rowrequests import RequestBuilder
from batchrun.rows import Rows


def questions(count: int) -> list[str]:
    """So many sums of two to five terms, all different."""
    texts = []
    for number in range(1, count + 1):
        terms = (
            1 + (number * 7 + term * (13 + number // 90)) % 90 for term in range(2 + number % 4)
        )
        texts.append(f"What is {'+'.join(map(str, terms))}?")
    return texts


def make_job(folder: Path, num_rows: int, num_shards: int) -> Job:
    """Questions in so many files below ``in/``, answers below ``out/``."""
    texts = questions(num_rows)
    (folder / "in").mkdir()
    for number in range(num_shards):
        table = pa.table({"prompt": texts[number::num_shards]})
        pq.write_table(table, folder / "in" / f"{number:03d}.parquet")
    raw = {
        "model": {"path": "tiny"},
        "input": {"path": str(folder / "in"), "prompt_column": "prompt", "columns": ["prompt"]},
        "generation": {"max_tokens": 96},
        "output": {"path": str(folder / "out")},
        "metrics": {"port": None},
    }
    return parse_job(JobSource.of_mapping(raw))


def time_engine(job: Job) -> tuple[float, int]:
    """Seconds of an engine alone with all the rows of the job, read before, their prompts not made
    yet (as for `LLM.chat`), and the tokens that it sampled."""
    from batchrun.data.inputs import list_input
    from batchrun.data.reader import ShardReader
    from batchrun.data.shards import plan_shards

    engine = Engine.load(find_checkpoint("tiny"), EngineOptions())
    found = list_input(str(job.input.path))
    schema = InputSchema.of(found, input_columns(job))
    builder = RequestBuilder(job, engine)
    rows = []
    for shard in plan_shards(
        found, carried=schema.columns.carried, max_tokens=job.generation.max_tokens, n=1
    ):
        lease = Lease(shard, 1, f"{shard.number}", Rows.all(shard.num_rows))
        with ShardReader(shard, schema) as reader:
            rows += [(lease, row) for row in reader]
    started = time.monotonic()
    for lease, row in rows:
        made = builder.build(lease, row, {0: None})
        assert isinstance(made, list), made
        for request in made:
            engine.add(request)
    while engine.num_unfinished:
        engine.step()
    return time.monotonic() - started, engine.stats().sampled_tokens


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-") as name:
        job = make_job(Path(name), arguments.rows, arguments.shards)
        engine_s, engine_tokens = time_engine(job)
        summary = run_job(job)
    run_s = summary.elapsed_s - summary.startup_s
    found = {
        "rows": arguments.rows,
        "engine_rows_per_s": round(arguments.rows / engine_s, 1),
        "run_rows_per_s": round(summary.generated_rows / run_s, 1),
        "ratio": round(engine_s / run_s, 3),
        "engine_tokens": engine_tokens,
        "run_tokens": summary.sampled_tokens,
        "startup_s": round(summary.startup_s, 1),
    }
    if arguments.as_json:
        print(json.dumps(found))
    else:
        print(f"engine alone  {found['engine_rows_per_s']:>8} rows/s")
        print(f"whole submit  {found['run_rows_per_s']:>8} rows/s without the start")
        print(f"ratio         {found['ratio']:>8.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

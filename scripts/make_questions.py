"""Write a Parquet file of sums with their answers: input for demonstrations and load tests.

    python scripts/make_questions.py --rows 240 --seed 7 jobs/data/questions.parquet

Columns: ``id``, ``prompt``, ``answer``, all strings. Only problems that the embedded model never
saw in training are asked unless ``--split`` says otherwise. The same arguments give the same rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny_problems as tp

SPLITS = {"held-out": True, "train": False, "any": None}


def make_table(rows: int, seed: int, split: str = "held-out") -> pa.Table:
    """``rows`` questions, operand counts in turn so that every count is equally frequent."""
    rng = Random(seed)
    width = max(4, len(str(rows - 1)))
    counts = range(tp.MIN_OPERANDS, tp.MAX_OPERANDS + 1)
    ids, prompts, answers = [], [], []
    for i in range(rows):
        count = counts[i % len(counts)]
        problem = tp.draw_problem(rng, held_out=SPLITS[split], operands=(count, count))
        ids.append(f"q{i:0{width}d}")
        prompts.append(tp.phrase(rng, problem, plain=True))
        answers.append(problem.answer)
    return pa.table({"id": ids, "prompt": prompts, "answer": answers})


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description="Write a Parquet file of sums and answers.")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--split", choices=SPLITS, default="held-out")
    parser.add_argument("--row-group-size", type=int, default=10_000)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table = make_table(args.rows, args.seed, args.split)
    pq.write_table(table, args.output, row_group_size=args.row_group_size, compression="zstd")


if __name__ == "__main__":
    main()

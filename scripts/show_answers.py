"""Show some answers of a run with their reasoning, and how many are right.

    python scripts/show_answers.py out/demo

OUTPUT is read as any Parquet dataset is; its columns ``prompt`` and ``answer`` are those of the
input, carried through by ``input.columns``. Whether an answer is right says the column
``correct``, which the run wrote because its job has ``evaluate``.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

COLUMNS = [
    "id", "prompt", "answer", "completion", "reasoning", "finish_reason",
    "reasoning_tokens", "completion_tokens", "thinking_budget_hit", "error", "correct",
]  # fmt: skip


def read_rows(output: Path) -> list[dict[str, Any]]:
    """All rows of a run's output, in the order of the input."""
    dataset = ds.dataset(str(output), format="parquet")
    missing = [name for name in COLUMNS if name not in dataset.schema.names]
    if missing:
        raise SystemExit(
            f"error: {output} has no column {', '.join(missing)}\n"
            "hint: carry the question and its answer with input.columns: [prompt, answer], "
            "and ask for scores with evaluate: {answer_column: answer, scorer: exact}"
        )
    return dataset.to_table(columns=COLUMNS).to_pylist()


def is_right(row: dict[str, Any]) -> bool:
    """Whether the run found the completion right."""
    return row["correct"] is True


def pick(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """A handful spread over the run, wrong answers last, and one of those where there is any."""
    count = min(count, len(rows))
    picked = [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]
    wrong = [row for row in rows if not is_right(row)]
    if wrong and all(is_right(row) for row in picked):
        picked[-1] = wrong[0]
    return sorted(picked, key=is_right, reverse=True)


def format_row(row: dict[str, Any]) -> str:
    """One answer as a person reads it."""
    verdict = "right" if is_right(row) else f"wrong, it is {row['answer']}"
    lines = [f"{row['id']}  {row['prompt']}"]
    if row["error"]:
        return "\n".join([*lines, f"  error      {row['error']}"])
    if row["reasoning"]:
        trace = textwrap.indent(row["reasoning"].rstrip("\n"), " " * 13).lstrip()
        lines.append(f"  reasoning  {trace}")
    if row["thinking_budget_hit"]:
        lines.append("             (cut: the thinking budget was used up)")
    lines.append(f"  answer     {row['completion']}   ({verdict})")
    return "\n".join(lines)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The closing line: accuracy and what it took."""
    scored = [row for row in rows if row["correct"] is not None]
    right = sum(map(is_right, scored))
    share = f"{right / len(scored):.1%}" if scored else "none has an expected answer"
    reasoning = sum(row["reasoning_tokens"] or 0 for row in rows)
    answers = sum(row["completion_tokens"] or 0 for row in rows)
    hits = sum(bool(row["thinking_budget_hit"]) for row in rows)
    failed = sum(row["error"] is not None for row in rows)
    return (
        f"accuracy: {right} of {len(scored)} right ({share}); "
        f"{reasoning} reasoning and {answers} completion tokens, "
        f"{hits} thinking budget hits, {failed} failed rows"
    )


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description="Show answers of a run and how many are right.")
    parser.add_argument("output", type=Path, help="the run's output folder")
    parser.add_argument("--count", type=int, default=6, help="how many answers to show")
    args = parser.parse_args()
    if not args.output.is_dir():
        raise SystemExit(f"error: {args.output} is not a folder\nhint: run scripts/demo.sh first")
    rows = read_rows(args.output)
    if not rows:
        sys.exit(f"error: {args.output} holds no rows yet\nhint: see batchrun status {args.output}")
    picked = pick(rows, max(1, args.count))
    print(f"\n{len(picked)} of {len(rows)} answers in {args.output}\n")
    for row in picked:
        print(format_row(row) + "\n")
    print(summary(rows))


if __name__ == "__main__":
    main()

"""``batchrun status``"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchrun.cli.options import debug_option, echo_json, json_option
from batchrun.cli.scores import score_lines
from batchrun.wording import duration

if TYPE_CHECKING:
    from batchrun.data.status import RunStatus
    from batchrun.data.store import Store


@click.command(epilog="Example: batchrun status out/demo")
@click.argument("where", metavar="OUTPUT_OR_JOB")
@json_option
@debug_option
def command(where: str, as_json: bool) -> int:
    """Show how far a run is: rows done, failed and left, tokens, rate.

    OUTPUT_OR_JOB is an output or the job file that writes it. Reads the output's storage alone, so
    it works from any machine and after the run.
    """
    from batchrun.data.status import read_status

    store = open_output(where)
    status = read_status(store)
    if as_json:
        echo_json(status_json(store.url, status))
    else:
        click.echo(status_text(store.url, status))
    return 0


def open_output(where: str) -> Store:
    """The output that ``where`` names, directly or by its job file."""
    from batchrun.data.store import Store

    if names_a_job(where):
        from batchrun.job import parse_job
        from batchrun.jobfile import read_job_file

        output = parse_job(read_job_file(where, ())).output
        return Store.open(output.path, output.storage_options)
    return Store.open(where)


def names_a_job(where: str) -> bool:
    """Whether this is the path of a job file, not of an output."""
    return where.endswith((".yaml", ".yml")) or Path(where).is_file()


def status_json(url: str, status: RunStatus) -> dict[str, object]:
    """Plain values for one JSON document."""
    counts = asdict(status.counts)
    del counts["scores"]
    scores = status.counts.scores
    progress = status.progress if status.live else None
    return {
        "output": url,
        "run_id": status.run_id,
        "state": status.state.value,
        "rows": {
            "total": status.total_rows,
            "done": counts.pop("rows"),
            "failed": counts.pop("failed_rows"),
            "left": status.rows_left,
            "journaled": status.journaled_rows,
        },
        "shards": {
            "total": status.num_shards,
            "done": status.shards_done,
            "failed": {str(number): why for number, why in status.failed_shards.items()},
            "kept": dict(status.kept),
        },
        **counts,
        "evaluation": None if scores is None else scores.report(),
        "rows_per_s": progress.rows_per_s if progress else None,
        "tokens_per_s": progress.tokens_per_s if progress else None,
        "eta_s": progress.eta_s if progress else None,
        "workers": progress.workers if progress else 0,
        "holder": asdict(status.holder) if status.holder else None,
    }


def status_text(url: str, status: RunStatus) -> str:
    """What a person wants to know, in a few lines."""
    from batchrun.data.status import RunState

    counts = status.counts
    share = counts.rows / status.total_rows if status.total_rows else 1.0
    lines = [
        f"{url}: {status.state} (run {status.run_id})",
        f"  rows    {counts.rows:,} of {status.total_rows:,} done ({share:.0%}), "
        f"{counts.failed_rows:,} of them failed, {status.rows_left:,} left",
        f"  shards  {status.shards_done:,} of {status.num_shards:,} published",
        f"  tokens  {counts.prompt_tokens:,} of prompt, {counts.reasoning_tokens:,} of reasoning, "
        f"{counts.completion_tokens:,} of completion",
    ]
    for run, count in status.kept.items():
        lines.append(f"  kept    {count:,} of them of the job before (run {run})")
    if status.journaled_rows:
        lines.append(f"  journal {status.journaled_rows:,} of the rows wait for the next submit")
    if counts.scores is not None:
        lines += [f"  {line}" for line in score_lines(counts.scores)]
    if counts.malformed_tool_calls:
        lines.append(f"  calls   {counts.malformed_tool_calls:,} cannot be read, kept as text")
    progress = status.progress
    if status.live and progress is not None:
        eta = "--" if progress.eta_s is None else duration(progress.eta_s)
        age = duration(max(0.0, time.time() - progress.updated_at))
        lines.append(
            f"  now     {progress.workers} workers, {progress.rows_per_s:,.1f} rows/s, "
            f"{progress.tokens_per_s:,.0f} tokens/s, ETA {eta} ({age} ago)"
        )
    if status.holder is not None:
        holder = status.holder
        lines.append(f"  holder  process {holder.pid} on {holder.host}, since {holder.since}")
    for number, why in list(status.failed_shards.items())[:10]:
        lines.append(f"  failed  shard {number:06d}: {why}")
    if len(status.failed_shards) > 10:
        lines.append(f"          and {len(status.failed_shards) - 10} more")
    if status.state is RunState.STOPPED:
        lines.append("  submit the job again to resume")
    return "\n".join(lines)

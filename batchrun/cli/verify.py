"""``batchrun verify``"""

from __future__ import annotations

from dataclasses import asdict

import click

from batchrun.cli.options import debug_option, echo_json, json_option
from batchrun.cli.status import open_output


@click.command(epilog="Example: batchrun verify out/demo")
@click.argument("where", metavar="OUTPUT_OR_JOB")
@json_option
@debug_option
def command(where: str, as_json: bool) -> int:
    """Prove that an output holds every row once, or name what is not so.

    Reads every part: each input row must have one output row a sample, each part must match the
    run's records (size, checksum, rows), and nothing may be orphaned. Exit code 1 if not.
    """
    from batchrun.data.verify import verify_run

    store = open_output(where)
    verdict = verify_run(store)
    if as_json:
        document = asdict(verdict)
        echo_json({"output": store.url, "ok": not verdict.problems, **document})
    elif verdict.problems:
        click.echo(f"{store.url}: {len(verdict.problems)} problems (run {verdict.run_id})")
        for problem in verdict.problems:
            click.echo(f"  {problem}")
    else:
        plural = "" if verdict.num_parts == 1 else "s"
        click.echo(
            f"{store.url}: every row is there once (run {verdict.run_id})\n"
            f"  {verdict.num_rows:,} rows in {verdict.num_parts:,} part{plural}, "
            f"{verdict.counts.failed_rows:,} of them failed"
        )
        for run, count in verdict.kept.items():
            click.echo(f"  {count:,} of the parts are of the job before (run {run})")
    return 1 if verdict.problems else 0

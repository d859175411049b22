"""``batchrun plan``"""

from __future__ import annotations

import time
from pathlib import Path

import click

from batchrun.cli import echo_error
from batchrun.cli.options import debug_option, echo_json, job_argument, json_option, set_option
from batchrun.errors import JobError


@click.command(epilog="Example: batchrun plan jobs/demo.yaml --accelerator A10G")
@job_argument
@click.option(
    "--accelerator",
    metavar="NAME",
    help="Plan for this GPU, e.g. A10G; default: resources.accelerator_type, else this machine.",
)
@click.option(
    "--bench",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of `batchrun bench --output`: measured rates instead of assumed ones.",
)
@click.option("--exact", is_flag=True, help="Read every footer and tokenise every row.")
@click.option(
    "--expect-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens that a sample generates, instead of assumptions.",
)
@set_option
@json_option
@debug_option
def command(
    job_path: str,
    accelerator: str | None,
    bench: Path | None,
    exact: bool,
    expect_tokens: int | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Say what a run would take, before it takes it: rows, prompt tokens, the memory of a worker,
    tokens a second, hours, cost, requests.

    Checks the job as `batchrun validate` does, but for the checkpoint's weights, which may be
    missing. Needs no GPU, loads no weights, writes nothing.
    """
    from batchrun.job import check_source
    from batchrun.jobfile import in_order, read_job_file

    started = time.monotonic()
    source = read_job_file(job_path, overrides)
    reading = check_source(source)
    if reading.job is None:
        raise JobError(reading.problems)
    if reading.problems:
        from batchrun.preflight import inspect_job

        found = inspect_job(reading.job, source, reading.bad, weights=False).problems
        raise JobError(in_order((*reading.problems, *found)))
    from batchrun.cli.plantext import plan_text
    from batchrun.planner.plan import plan_job

    plan = plan_job(
        reading.job,
        source,
        accelerator=accelerator,
        bench=bench,
        exact=exact,
        expect_tokens=expect_tokens,
        progress=(lambda _text: None) if as_json else echo_error,
    )
    if as_json:
        echo_json(plan.to_json())
    else:
        click.echo(plan_text(plan))
        echo_error(f"planned in {time.monotonic() - started:.1f} s; nothing was written")
    return 0

"""``batchrun sweep``"""

from __future__ import annotations

import contextlib
import math
import os
import sys

import click

from batchrun.cli import echo_error
from batchrun.cli.curve import curve_text
from batchrun.cli.options import debug_option, echo_json, job_argument, json_option, set_option
from batchrun.cli.progress import ProgressView
from batchrun.cli.runner import logged_to, run_options, stop_on_signals
from batchrun.errors import RequestError


@click.command(
    epilog="Example: batchrun sweep jobs/demo.yaml --thinking-budget off,0,16,32,full "
    "--set output.path=out/sweep"
)
@job_argument
@click.option(
    "--thinking-budget",
    "budgets_text",
    metavar="LIST",
    required=True,
    help="Budgets with commas between: numbers of tokens, `off` (no reasoning), `full` (no "
    "budget), e.g. off,0,256,1024.",
)
@click.option(
    "--tolerance",
    type=float,
    default=0.01,
    show_default=True,
    help="How far below the best accuracy the cheapest budget may be.",
)
@set_option
@click.option(
    "--address",
    metavar="URL",
    help="A Ray cluster; default: ray.address of the job, RAY_ADDRESS, or a Ray of its own here.",
)
@run_options
@json_option
@debug_option
def command(
    job_path: str,
    budgets_text: str,
    tolerance: float,
    overrides: tuple[str, ...],
    address: str | None,
    deterministic: bool,
    log_file: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run a job at several thinking budgets and compare them.

    Each budget is a run of its own in OUTPUT/budget-NAME, over the same rows. The largest goes
    first; the others take over the tokens that they share with it. The same command resumes
    whatever was interrupted. The results are in OUTPUT/sweep.json too.
    """
    from batchrun.cluster.budgets import parse_budgets

    try:
        budgets = parse_budgets(budgets_text)
    except RequestError as error:
        hint = f"; {error.hint}" if error.hint else ""
        raise click.BadParameter(error.message + hint, param_hint="--thinking-budget") from None
    if not (math.isfinite(tolerance) and 0 <= tolerance <= 1):
        raise click.BadParameter("must be between 0 and 1", param_hint="--tolerance")

    from batchrun.job import parse_job
    from batchrun.jobfile import read_job_file

    source = read_job_file(job_path, overrides)
    job = parse_job(source)
    with stop_on_signals() as stop, logged_to(log_file), ProgressView(quiet=quiet) as view:
        from batchrun.cluster.sweep import SWEEP_NAME, run_sweep

        with contextlib.redirect_stdout(sys.stderr):  # Ray prints there what befell its daemons
            curve = run_sweep(
                job,
                budgets,
                tolerance=tolerance,
                source=source,
                address=address or job.ray.address or os.environ.get("RAY_ADDRESS") or None,
                deterministic=deterministic,
                stop=stop,
                view=view,
            )
    if as_json:
        echo_json(curve.to_json())
    elif curve.results:
        click.echo(curve_text(curve))
    if curve.error is not None:
        raise curve.error
    if not quiet:
        echo_error(f"done: {len(curve.results)} budgets; also in {curve.output}/{SWEEP_NAME}")
    return 0

"""``batchrun report``"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict
from pathlib import Path

import click

from batchrun.cli import echo_error
from batchrun.cli.options import debug_option, echo_json
from batchrun.cli.status import open_output


@click.command(epilog="Example: batchrun report out/demo -o demo.html")
@click.argument("where", metavar="OUTPUT_OR_JOB")
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "json"]),
    default="html",
    show_default=True,
    help="A page for people, or one JSON document on stdout for machines.",
)
@click.option(
    "-o",
    "--output",
    "target",
    metavar="FILE",
    help="Where the page goes; `-` is stdout. Default: batchrun-report-NAME.html.",
)
@click.option("--no-samples", is_flag=True, help="Leave out ids and everything that rows say.")
@click.option(
    "--plan",
    "plan_path",
    metavar="FILE",
    help="What `batchrun plan --json` said before the run, to stand beside what happened.",
)
@debug_option
def command(
    where: str, form: str, target: str | None, no_samples: bool, plan_path: str | None
) -> int:
    """Tell what a run did: one HTML page that opens without a network.

    The verdict first, then what failed, throughput over time, where the workers' time went,
    tokens, waste and the resolved job. Reads the output's storage alone: during the run, after
    it, from any machine.
    """
    from batchrun.foretold import compare, read_plan_document
    from batchrun.report import read_report

    if target not in (None, "-"):
        _check_folder(Path(target))
    plan = None if plan_path is None else read_plan_document(plan_path)
    store = open_output(where)
    report = read_report(store, texts=not no_samples)
    foretold = () if plan is None else compare(plan, report)
    if form == "json":
        figures = [{**asdict(item), "within": item.is_within} for item in foretold]
        echo_json({**report.to_json(), "foretold": figures})
        return 0
    from batchrun.reportpage import report_page

    page = report_page(report, foretold)
    if target == "-":
        click.echo(page)
        return 0
    path = Path(target or f"batchrun-report-{_file_name(report.name)}.html")
    _write(path, page)
    echo_error(f"{report.verdict[1]}\nwritten: {path}")
    return 0


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _check_folder(path: Path) -> None:
    """Refuse a place in no folder before anything is read."""
    if not path.parent.is_dir():
        raise click.UsageError(
            f"-o {path}: there is no folder {path.parent}; make it first, or give another"
        )


def _write(path: Path, page: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise click.UsageError(
            f"{path} cannot be written: {error.strerror}; give another place with -o"
        ) from error

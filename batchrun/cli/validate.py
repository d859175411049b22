"""``batchrun validate``"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from batchrun.cli import echo_error
from batchrun.cli.options import debug_option, echo_json, job_argument, json_option, set_option
from batchrun.errors import InputError, JobError, OutputError, Problem

if TYPE_CHECKING:
    from batchrun.job import Job
    from batchrun.jobfile import JobSource
    from batchrun.preflight import Facts, Inspection


@click.command(epilog="Example: batchrun validate jobs/demo.yaml --set generation.max_tokens=256")
@job_argument
@set_option
@json_option
@debug_option
def command(job_path: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check a job without running it, and print every problem with its line.

    Looks at the job file, the template, the model's config, the input's files and columns, and
    whether the output can be written. Needs no GPU, loads no weights, writes nothing. Exit code 0
    if all is well, else 2; 75 if all that is wrong is storage that cannot be reached.
    """
    from batchrun.job import check_source
    from batchrun.jobfile import in_order, read_job_file
    from batchrun.preflight import inspect_job

    try:
        source = read_job_file(job_path, overrides)
        reading = check_source(source)
        problems = reading.problems
        facts = None
        if reading.job is not None:
            inspection = inspect_job(reading.job, source, reading.bad)
            facts = inspection.facts
            problems = in_order((*problems, *inspection.problems))
            if not problems:
                problems = _opening(reading.job, source, inspection)
        if problems:
            raise JobError(problems)
    except JobError as error:
        if as_json:
            echo_json({"valid": False, "problems": [_plain(p) for p in error.problems]})
        raise
    assert reading.job is not None and facts is not None
    if as_json:
        echo_json({"valid": True, "problems": [], **_facts(reading.job, facts)})
    else:
        echo_error(_text(job_path, reading.job, facts))
    return 0


def _opening(job: Job, source: JobSource, inspection: Inspection) -> tuple[Problem, ...]:
    """The problem for which a submit would not open the run: the output holds another job's run or
    files of nobody's, or input changed after it was finished."""
    from batchrun.cluster.opening import check_opening

    try:
        check_opening(job, inspection.files)
    except (InputError, OutputError) as error:
        side = "input" if isinstance(error, InputError) else "output"
        message = error.message.removeprefix(f"{side}: ")
        return (Problem(source.place((side, "path")), f"{side}.path", message, error.hint),)
    return ()


def _plain(problem: Problem) -> dict[str, str]:
    return {
        "location": problem.location,
        "key": problem.key,
        "message": problem.message,
        "hint": problem.hint,
    }


def _facts(job: Job, facts: Facts) -> dict[str, object]:
    return {
        "name": job.name,
        "model": {
            "path": job.model.path,
            "layers": facts.num_layers,
            "parameters": facts.num_parameters,
            "max_model_len": facts.max_model_len,
        },
        "input": {
            "files": facts.num_files,
            "rows": facts.num_rows,
            "size_bytes": facts.size_bytes,
        },
        "output": {"path": job.output.path},
    }


def _text(job_path: str, job: Job, facts: Facts) -> str:
    files = "1 file" if facts.num_files == 1 else f"{facts.num_files:,} files"
    limit = f", the first {job.input.limit:,} of them" if job.input.limit is not None else ""
    return (
        f"{job_path} is valid\n"
        f"  model   {job.model.path}: {facts.num_layers} layers, {facts.num_parameters:,} "
        f"parameters, up to {facts.max_model_len:,} tokens\n"
        f"  input   {facts.num_rows:,} rows{limit} in {files}\n"
        f"  output  {job.output.path}: writable"
    )

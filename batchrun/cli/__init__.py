"""The command line: ``main`` finds commands, shows errors and ends the process.

A command is a module of this folder with a click command named ``command``. It imports what is
heavy inside its function, and either returns (exit code 0, or the code it returns as an int) or
raises an error of :mod:`batchrun.errors`, which carries its exit code.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from batchrun import __version__
from batchrun.errors import BatchrunError, JobError
from batchrun.logs import redact
from batchrun.wording import nearest

COMMANDS = {
    "submit": "Run a job on a Ray cluster, or on this machine.",
    "run": "Run a job inside an existing Ray cluster.",
    "list": "List the runs of a Ray cluster.",
    "logs": "Print or follow what a run on a cluster prints.",
    "cancel": "Stop a run on a cluster; what is finished is kept.",
    "sweep": "Run a job at several thinking budgets: accuracy and cost of each.",
    "validate": "Check a job without running it: every problem, with its line.",
    "plan": "Say what a run would take: rows, tokens, memory, hours, cost.",
    "status": "Show how far a run is, from its output alone.",
    "report": "Write what a run did as one HTML page.",
    "retry": "Run the rows that failed again, and put their parts anew.",
    "verify": "Prove that an output holds every row once.",
    "discard": "Delete a run's parts and bookkeeping.",
    "schedule": "Print the crontab line or Kubernetes objects that run a job on its schedule.",
    "schema": "Print the JSON Schema of the job file.",
    "bench": "Measure the engine here against what the device allows.",
    "doctor": "Check this machine: what works, what is missing, what to do.",
}

# A module of this package called `list` would take the builtin's name in here.
_MODULES = {"list": "listing"}

EXIT_USAGE = 2
EXIT_INTERRUPTED = 75


class Batchrun(click.Group):
    """The group of all commands. Modules are imported when their command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"batchrun.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that ``args`` begin with; an unknown one is named with the nearest."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise _no_such_command(args[0])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, show an error as ``error: …`` and ``hint: …`` on stderr, and exit with its code."""
        arguments = list(sys.argv[1:] if args is None else args)
        _fill_closed_streams()
        try:
            result = super().main(arguments, prog_name, complete_var, False, **extra)
            code = result if isinstance(result, int) else 0
        except Exception as error:
            if not standalone_mode:
                raise
            if "--debug" in arguments:
                echo_error(redact("".join(traceback.format_exception(error))).rstrip())
            code = _show(error)
        if not standalone_mode:
            return result
        sys.exit(code)


def debug_option(command: Any) -> Any:
    """Adds ``--debug``. ``main`` looks for the flag itself, so it may stand anywhere."""
    return click.option(
        "--debug", is_flag=True, expose_value=False, help="Show a traceback with an error."
    )(command)


@click.group(
    cls=Batchrun,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: batchrun submit jobs/demo.yaml",
)
@click.version_option(__version__, prog_name="batchrun", message="%(prog)s %(version)s")
@debug_option
def main() -> None:
    """Distributed batch inference for hybrid Mamba-2 reasoning models.

    A job file names a model, Parquet files of prompts, and where the completions go.
    """


def _fill_closed_streams() -> None:
    """Give the bin to whoever closed a standard stream (``2>&-``). Left alone, its number would go
    to the next file that is opened, and what Ray prints into that file."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def echo_error(text: str) -> None:
    """Print ``text`` to stderr, with control characters other than line breaks escaped."""
    safe = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
    click.echo(safe, err=True)


def _show(error: Exception) -> int:
    """Say what went wrong; the exit code."""
    match error:
        case JobError():
            count = len(error.problems)
            problems = "1 problem" if count == 1 else f"{count} problems"
            for problem in error.problems:
                # Field by field: a key that names a secret is no secret.
                hint = redact(problem.hint)
                echo_error(str(replace(problem, message=redact(problem.message), hint=hint)))
            _say(f"the job has {problems}; nothing was written")
            return error.exit_code
        case BatchrunError():
            _say(error.message, error.hint)
            return error.exit_code
        case click.Abort() if not isinstance(error.__context__, KeyboardInterrupt):
            _say("stopped: not confirmed")
            return 1
        case click.Abort():
            _say("interrupted", "what is finished is kept; the same command resumes")
            return EXIT_INTERRUPTED
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.ctx.get_help() if error.ctx else error.message, err=True)
            return EXIT_USAGE
        case click.UsageError():
            where = error.ctx.command_path if error.ctx else "batchrun"
            _say(_lower(error.format_message()), f"see `{where} --help`")
            return EXIT_USAGE
        case click.ClickException():
            _say(_lower(error.format_message()))
            return EXIT_USAGE if error.exit_code == EXIT_USAGE else 1
        case _:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            _say(
                f"unexpected failure: {what}",
                "run again with --debug for a traceback; a report of it is welcome",
            )
            return 1


def _say(message: str, hint: str = "") -> None:
    echo_error(redact(f"error: {message}" + (f"\nhint: {hint}" if hint else "")))


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")


def _no_such_command(name: str) -> click.UsageError:
    close = nearest(name, COMMANDS)
    return click.UsageError(
        f"no such command {name!r}" + (f", did you mean {close}?" if close else "")
    )

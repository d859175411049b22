"""The command line as a whole: help, versions, errors, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

import batchrun
from batchrun import errors
from batchrun.cli import COMMANDS, main


def run(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call."""
    result = CliRunner().invoke(main, args, prog_name="batchrun")
    return result.exit_code, result.stdout, result.stderr


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes ``batchrun schema`` raise ``error``."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("batchrun.cli.schema.command.callback", fail)


def test_help_lists_the_commands_quickly() -> None:
    """``--help`` names every command, and a process that shows it is done in half a second."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "batchrun", "--help"], capture_output=True, text=True, timeout=60
    )
    # The promise is 0.3 s on an idle machine; tests run on busy ones.
    assert time.monotonic() - started < 3
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    """Each command says what it does and shows a call that works as it stands."""
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert f"Example: batchrun {name}" in out
    assert "--debug" in out


def test_version() -> None:
    """``--version`` is the package's."""
    assert run("--version") == (0, f"batchrun {batchrun.__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sumbit", "x"], "error: no such command 'sumbit', did you mean submit?"),
        (["frobnicate"], "error: no such command 'frobnicate'"),
        (["schema", "--jsn"], "error: no such option '--jsn'"),
        (["schema", "extra"], "error: got unexpected extra argument"),
        (["validate"], "error: missing argument 'JOB.yaml'"),
        (["--frob"], "error: no such option '--frob'"),
    ],
)
def test_usage_errors(args: list[str], message: str) -> None:
    """A call that makes no sense is exit 2, says what is wrong and where to look."""
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    first, hint = err.splitlines()
    assert first.startswith(message)
    assert hint.startswith("hint: see `batchrun")


def test_nothing_to_do() -> None:
    """``batchrun`` alone shows the help, and is no success."""
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: batchrun")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BatchrunError, 1),
        (errors.InputError, 2),
        (errors.CheckpointError, 2),
        (errors.OutputError, 2),
        (errors.ClusterError, 2),
        (errors.TooManyFailuresError, 3),
        (errors.OutputHeldError, 4),
        (errors.InterruptedRunError, 75),
        (errors.StorageError, 75),
    ],
)
def test_errors_end_with_their_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: type[errors.BatchrunError], code: int
) -> None:
    """What went wrong and how to mend it stand on stderr, without a traceback."""
    failing(monkeypatch, error("what is wrong", "how to mend it"))
    assert run("schema") == (code, "", "error: what is wrong\nhint: how to mend it\n")


def test_job_errors_name_every_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each problem is a line that begins with its place, for editors to jump to."""
    problems = (
        errors.Problem("job.yaml:3", "storage_options.secret", "holds a thing", "delete it"),
        errors.Problem("job.yaml:5", "", "another\x1b[2J of s3://u:hunter22@b/x"),
    )
    failing(monkeypatch, errors.JobError(problems))
    assert run("schema") == (
        2,
        "",
        "job.yaml:3: storage_options.secret: holds a thing; delete it\n"
        "job.yaml:5: another\\x1b[2J of s3://[redacted]@b/x\n"
        "error: the job has 2 problems; nothing was written\n",
    )


def test_unexpected_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure that nobody foresaw is exit 1 with its cause; a traceback only with --debug."""
    failing(monkeypatch, ZeroDivisionError("AKIAIOSFODNN7EXAMPLE by zero"))
    code, out, err = run("schema")
    assert (code, out) == (1, "")
    assert err == (
        "error: unexpected failure: ZeroDivisionError: [redacted] by zero\n"
        "hint: run again with --debug for a traceback; a report of it is welcome\n"
    )
    for args in (["--debug", "schema"], ["schema", "--debug"]):
        code, out, err = run(*args)
        assert (code, out) == (1, "")
        assert err.startswith("Traceback (most recent call last):")
        assert "AKIA" not in err


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_closed_streams(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A standard stream that the caller has closed (`2>&-`) costs its text, not the command."""
    seen: list[object] = []
    monkeypatch.setattr(
        "batchrun.cli.schema.command.callback",
        lambda: seen.append(os.fstat(getattr(sys, name).fileno()).st_rdev),
    )
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        main(["schema"])
    getattr(sys, name).close()
    assert (ended.value.code, seen) == (0, [os.stat(os.devnull).st_rdev])


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is exit 75; an answer of no is exit 1."""
    failing(monkeypatch, KeyboardInterrupt())
    code, out, err = run("schema")
    assert (code, out) == (75, "")
    assert err.strip().startswith("error: interrupted\nhint: what is finished is kept")
    failing(monkeypatch, click.Abort())
    assert run("schema") == (1, "", "error: stopped: not confirmed\n")


def test_a_command_gives_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command returns as an int, or says by ``ctx.exit``, is the exit code."""
    monkeypatch.setattr("batchrun.cli.schema.command.callback", lambda: 3)
    assert run("schema")[0] == 3
    monkeypatch.setattr(
        "batchrun.cli.schema.command.callback", lambda: click.get_current_context().exit(4)
    )
    assert run("schema")[0] == 4

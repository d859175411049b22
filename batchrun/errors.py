"""The tree of errors a run can end with, each with its exit code.

::

    BatchrunError            1   unexpected failure
    ├── JobError             2   the job file is wrong; carries every problem found
    ├── InputError           2   the input cannot be used as the job says
    ├── CheckpointError      2   the model's checkpoint cannot be used
    ├── OutputError          2   the output cannot be used: not writable, or of another job
    ├── ClusterError         2   the cluster cannot give what the job asks for
    ├── RequestError         2   a call of the Python interface asks for what cannot be (ValueError)
    ├── TooManyFailuresError 3   finished, with more failed rows than the job allows
    ├── OutputHeldError      4   another live run holds the output
    ├── InterruptedRunError 75   stopped before the end; what is done is kept
    └── StorageError        75   object storage or its credentials failed

A failed *row* is not an exception: it is a :class:`~batchrun.records.Completion` with an error.
A failed *shard* is :class:`ShardError`, which the coordinator turns into a decision.
"""

from __future__ import annotations

from dataclasses import dataclass


class BatchrunError(Exception):
    """Base of all errors this package raises on purpose.

    ``message`` says what is wrong, ``hint`` what to do about it. Both are passed to ``Exception``
    unchanged, so that pickling an error across processes gives the same error back.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a job, at a place a person can go to.

    ``location`` is ``file:line`` (or ``--set`` for a command-line override), ``key`` the dotted
    path of the key, ``message`` what is wrong, ``hint`` how to mend it.
    """

    location: str
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.location}: {self.key}: " if self.key else f"{self.location}: "
        return place + self.message + (f"; {self.hint}" if self.hint else "")


class JobError(BatchrunError):
    """The job cannot run as written. ``problems`` holds every problem, not just the first."""

    exit_code = 2

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.args = (problems,)
        self.problems = problems


class InputError(BatchrunError):
    """The input cannot be read as the job says (nothing matches, not Parquet, no such column)."""

    exit_code = 2


class CheckpointError(BatchrunError):
    """The model's checkpoint cannot be used (missing or damaged files, another architecture)."""

    exit_code = 2


class OutputError(BatchrunError):
    """The output cannot be used: not writable, inside the input, or holds another job's run."""

    exit_code = 2


class ClusterError(BatchrunError):
    """The cluster has not what the job asks for."""

    exit_code = 2


class RequestError(BatchrunError, ValueError):
    """A prompt or a sampling parameter given from Python cannot be used."""

    exit_code = 2


class TooManyFailuresError(BatchrunError):
    """Finished, but more rows failed than ``errors.max_failed_rows`` allows."""

    exit_code = 3


class OutputHeldError(BatchrunError):
    """Another live run holds this output."""

    exit_code = 4


class InterruptedRunError(BatchrunError):
    """The run stopped before its end; everything finished so far is kept."""

    exit_code = 75


class StorageError(BatchrunError):
    """Object storage or its credentials failed for longer than retries help."""

    exit_code = 75


class ShardError(BatchrunError):
    """One shard's input cannot be read (corrupt page, changed under the reader).

    The run goes on with the other shards and ends with exit code 3.
    """

    exit_code = 3

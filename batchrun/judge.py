"""Scoring under a time limit, in a process of its own.

A pattern can backtrack for ever and a formula can take any time to simplify, both inside C code
where no thread can stop them. So these scorers run in a child process that sets the system's alarm
before each answer and is ended by it; the next answer gets a new child. That works in any thread,
and no child outlives the process that started it: without it, its input ends.

Run as ``python -m batchrun.judge`` this module is the child: a JSON line in, a JSON line out.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from typing import IO

from batchrun.errors import BatchrunError
from batchrun.evaluate import INSTALL_MATH, ScoreSpec, judge, judge_texts, missing_library, texts_of
from batchrun.scores import Verdict

TIME_LIMIT_S = 5.0
"""An answer that takes longer to compare is not correct."""

_START_LIMIT_S = 120.0  # to import the libraries, on a busy machine
_MAX_BYTES = 4 << 30  # of the child's address space


class Judge:
    """Scores answers one after the other. One thread at a time may call :meth:`judge`."""

    def __init__(self, spec: ScoreSpec, time_limit_s: float = TIME_LIMIT_S) -> None:
        """Raises BatchrunError when the library that the scorer needs is missing."""
        if missing := missing_library(spec):
            raise BatchrunError(
                f"the scorer {spec.scorer} cannot run here: {missing}", INSTALL_MATH
            )
        self._spec = spec
        self._time_limit_s = time_limit_s
        self._child: subprocess.Popen[str] | None = None
        self._messages: IO[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # of starting and closing
        self.num_timeouts = 0
        """Answers that took too long."""

    @property
    def is_quick(self) -> bool:
        """Whether the scorer takes next to no time, and so needs no other thread and process."""
        return self._spec.scorer not in ("regex", "math")

    def judge(self, completion: str | None, expected: object) -> Verdict:
        """What :func:`batchrun.evaluate.judge` says; not correct where it takes too long."""
        if self.is_quick:
            return judge(self._spec, completion, expected)
        texts = texts_of(expected)
        if completion is None or not texts:
            return judge_texts(self._spec, completion, texts)
        child = self._running()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps([completion, texts]) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except OSError:
            answer = ""  # it ended before it could read
        if answer:
            correct, found = json.loads(answer)
            return Verdict(correct, found)
        self._stop()
        self.num_timeouts += 1
        return Verdict(False)

    def close(self) -> None:
        """End the child. May be called from any thread, and twice."""
        self._closed = True
        self._stop()

    def _running(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._closed:
                raise BatchrunError("scoring was stopped")
            if self._child is not None and self._child.poll() is None:
                return self._child
        self._stop()
        with self._lock:
            self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child
            self._child = child = subprocess.Popen(
                [sys.executable, "-m", "batchrun.judge"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                text=True,
                encoding="ascii",
                # The package where this process found it, which a cluster may have arranged.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                # Ctrl-C on a terminal is for the run, which then closes this.
                start_new_session=True,
            )
            messages = self._messages
        assert child.stdin is not None and child.stdout is not None
        setup = {"spec": asdict(self._spec), "time_limit_s": self._time_limit_s}
        try:
            child.stdin.write(json.dumps(setup) + "\n")
            child.stdin.flush()
            ready = child.stdout.readline()
        except OSError:
            ready = ""
        if not ready:
            messages.seek(0)
            said = messages.read().decode(errors="replace").strip().splitlines()[-1:]
            self._stop()
            raise BatchrunError(f"the process that scores answers did not start: {said}")
        return child

    def _stop(self) -> None:
        with self._lock:
            child, self._child = self._child, None
            messages, self._messages = self._messages, None
            if child is not None:
                child.kill()
                child.wait()
                for pipe in (child.stdin, child.stdout):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()
            if messages is not None:
                messages.close()


def main() -> None:
    """The child: what to score by in the first line, then an answer a line."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _START_LIMIT_S)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, resource.RLIM_INFINITY))
    setup = json.loads(sys.stdin.readline())
    raw = setup["spec"]
    spec = ScoreSpec(raw["scorer"], raw["pattern"], tuple(raw["choices"]))
    judge_texts(spec, "1", ["1"])  # imports what it needs
    _write("ready")
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = sys.stdin.readline()
        if not line:
            return
        completion, texts = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, setup["time_limit_s"])
        try:
            verdict = judge_texts(spec, completion, texts)
        except (Exception, RecursionError) as error:  # a library's, over one answer
            sys.stderr.write(f"{type(error).__name__}\n")
            verdict = Verdict(False)
        _write([verdict.correct, verdict.answer])


def _write(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

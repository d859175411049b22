"""Scoring under a time limit: nothing that an answer holds can stop a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batchrun.errors import BatchrunError
from batchrun.evaluate import ScoreSpec
from batchrun.judge import Judge
from batchrun.scores import Verdict

SLOW = ScoreSpec("regex", pattern=r"^(a+)+$")  # as many ways as there are: 2 to the power of 60


@pytest.fixture
def make() -> Iterator[Callable[..., Judge]]:
    """Makes judges that are closed at the end."""
    made: list[Judge] = []

    def judge(spec: ScoreSpec, time_limit_s: float = 5.0) -> Judge:
        made.append(Judge(spec, time_limit_s))
        return made[-1]

    yield judge
    for item in made:
        item.close()


def test_an_endless_answer_is_not_correct(make: Callable[..., Judge]) -> None:
    """In a thread that is not the main one an answer is given up in time, and the next is fine."""
    judge = make(SLOW, 0.4)
    assert judge.judge("aaa", "aaa") == Verdict(True, "aaa")
    found: list[Verdict] = []
    started = time.monotonic()
    thread = threading.Thread(target=lambda: found.append(judge.judge("a" * 60 + "!", "aaa")))
    thread.start()
    thread.join(30)
    assert found == [Verdict(False)]
    assert 0.4 <= time.monotonic() - started < 10
    assert judge.num_timeouts == 1
    assert judge.judge("aa", "aaa") == Verdict(False, "aa")


def test_formulas_are_compared_in_the_child(make: Callable[..., Judge]) -> None:
    """The scorer math works through the process, and a tower of powers does not stop it."""
    judge = make(ScoreSpec("math"), 2.0)
    assert judge.judge(r"\boxed{\frac{1}{2}}", ["0.25", 0.5]) == Verdict(True, "1/2")
    assert judge.judge(r"\boxed{9^{9^{9^9}}}", "3") == Verdict(False)
    assert judge.judge("$3$", 3) == Verdict(True, "3")


def test_text_goes_through_as_it_is(make: Callable[..., Judge]) -> None:
    """Line breaks, quotes, every plane of Unicode and half characters reach the scorer."""
    judge = make(ScoreSpec("regex", pattern=r"(?s)<(.*)>"))
    for text in ('a\n"b"\r\n', "\U0001f600é\u2028", "\ud800", "x" * 200_000):
        assert judge.judge(f"<{text}>", text) == Verdict(True, text.strip())


def test_no_child_for_what_needs_none(
    make: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quick scorers, failed rows and rows without an expected answer start no process."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert make(ScoreSpec("number")).judge("5", 5) == Verdict(True, "5")
    assert make(SLOW).judge(None, "a") == Verdict(False)
    assert make(SLOW).judge("a", None) == Verdict(None)


def test_closing_ends_the_child(make: Callable[..., Judge]) -> None:
    """A closed judge has no process left, and starts none."""
    judge = make(SLOW)
    judge.judge("a", "a")
    child = judge._child
    assert child is not None and Path(f"/proc/{child.pid}").exists()
    judge.close()
    judge.close()
    assert child.returncode is not None
    with pytest.raises(BatchrunError, match="stopped"):
        judge.judge("a", "a")


def test_a_child_that_cannot_start_says_why(
    make: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the process does not come up, the last line of what it said is in the error."""
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(BatchrunError, match="did not start"):
        make(SLOW).judge("a", "a")


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without math-verify the scorer math names the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BatchrunError, match="math-verify is not installed") as caught:
        Judge(ScoreSpec("math"))
    assert caught.value.hint == "pip install math-verify"
    Judge(ScoreSpec("exact")).close()

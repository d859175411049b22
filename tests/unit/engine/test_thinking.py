"""The end of a reasoning: natural or forced, never late, never a character lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_tiny
from batchrun.engine.thinking import End, ForcedClose, Thinking
from batchrun.engine.tokenizer import Tokenizer
from tests.unit.engine.support import TINY

TOKENIZER = Tokenizer.load(TINY)
CLOSE = ForcedClose(TOKENIZER.encode_plain)
ENCODER = train_tiny.Encoder(train_tiny.Tokenizer.from_file(str(TINY / "tokenizer.json")))


def think(
    pieces: list[bytes], *, budget: int | None = None, grace: int = 0, latest: int = 1000
) -> tuple[Thinking, int, End | None]:
    """Push pieces until the end; the machine, how many were taken, and the end."""
    thinking = Thinking(CLOSE, budget=budget, grace=grace, latest=latest)
    end = thinking.begin()
    for taken, piece in enumerate(pieces):
        if end is not None:
            return thinking, taken, end
        end = thinking.push(piece)
    return thinking, len(pieces), end


def forced(text: str) -> tuple[int, ...]:
    """The ids of a forced text."""
    return tuple(TOKENIZER.encode_plain(text))


@given(st.lists(st.sampled_from(["3", "+", "\n", "<", "</", "</th", "</think", ">", "é"])))
def test_the_forced_close_is_that_of_the_training(pieces: list[str]) -> None:
    """Token for token what the embedded model was taught to see after a cut."""
    reasoning = "".join(pieces)
    if "</think>" not in reasoning:
        assert list(CLOSE.ids(reasoning.encode())) == ENCODER.forced_close(reasoning)


def test_admission_knows_the_longest_close() -> None:
    """No close is longer than what is reserved for it."""
    endings = [b"", b"x", b"\n", *(b"</think>"[:k] for k in range(1, 8))]
    assert CLOSE.max_tokens == max(len(CLOSE.ids(ending)) for ending in endings)


def test_a_natural_end_may_share_its_tokens() -> None:
    """The tag is found across tokens and inside one; what follows it is handed on."""
    thinking, taken, end = think([b"a\n<", b"/thi", b"nk>\n\n7"])
    assert (taken, end) == (3, End(rest=b"\n\n7"))
    assert thinking.text() == "a\n"
    assert thinking.num_tokens == 3


def test_the_budget_is_hard() -> None:
    """At the budget the close is forced at once, with a line break where none stands."""
    thinking, taken, end = think([b"a", b"b", b"c"], budget=2)
    assert (taken, end) == (2, End(forced_ids=forced("\n</think>\n\n")))
    assert thinking.text() == "ab"
    _, taken, end = think([b"a", b"\n", b"c"], budget=2)
    assert (taken, end) == (2, End(forced_ids=forced("</think>\n\n")))


def test_a_begun_tag_is_completed() -> None:
    """The rest of it is forced, and its beginning is no reasoning."""
    thinking, taken, end = think([b"a\n", b"</th", b"x"], budget=2)
    assert (taken, end) == (2, End(forced_ids=forced("ink>\n\n")))
    assert thinking.text() == "a\n"


def test_a_natural_end_at_the_budget_is_natural() -> None:
    """Nothing is forced when the last token of the budget completes the tag."""
    _, taken, end = think([b"a", b"</think>"], budget=2)
    assert (taken, end) == (2, End())


@pytest.mark.parametrize("grace", [0, 5])
def test_a_budget_of_0_closes_before_the_first_token(grace: int) -> None:
    """Nothing is sampled as reasoning; the tag follows the prompt's own line break."""
    thinking, taken, end = think([b"a"], budget=0, grace=grace)
    assert (taken, end) == (0, End(forced_ids=forced("</think>\n\n")))
    assert thinking.text() is None


def test_the_grace_ends_at_a_line_break_or_at_its_end() -> None:
    """From the budget on the first token with a line break ends it, at the latest grace later."""
    assert think([b"a", b"b", b"c\n", b"d"], budget=2, grace=3)[1] == 3
    assert think([b"a", b"b\n", b"c"], budget=2, grace=3)[1] == 2
    assert think([b"a\n", b"b", b"c", b"d", b"e", b"f"], budget=2, grace=3)[1] == 5


def test_the_answer_reserve_ends_it_too() -> None:
    """Neither budget nor grace goes beyond the reserve; a reserve of all closes at once."""
    assert think([b"a"] * 9, latest=3)[1] == 3
    assert think([b"a"] * 9, budget=2, grace=5, latest=3)[1] == 3
    assert think([b"a"] * 9, budget=8, latest=0)[1] == 0


def test_after_the_last_token_nothing_is_forced() -> None:
    """A cut at max_tokens leaves all of it reasoning, a begun tag included."""
    thinking = Thinking(CLOSE, budget=1, grace=0, latest=1)
    assert thinking.push(b"a</th", is_last=True) is None
    assert thinking.text() == "a</th"


def test_an_echoed_opening_tag_is_dropped() -> None:
    """Only at the very beginning, and nothing else of the text."""
    assert think([b"<think>", b"\na <think> b"])[0].text() == "\na <think> b"
    assert think([b"<think>"])[0].text() is None

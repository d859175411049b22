"""What a sequence generated: tokens and characters conserved, limits kept."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine.thinking import ForcedClose, Thinking
from batchrun.engine.transcript import Transcript
from batchrun.records import FinishReason

PIECES = [
    b"a", b"\n", b"\n\n", b" ", b"<", b"/", b"</", b"think", b"think>", b"</think>", b">\n\n7",
    b"END", b"EN", b"D", b"\xe3\x80", b"\x80", b"\xc3", b"\xa9", b"<think>", b"\xff",
]  # fmt: skip
STOP = len(PIECES)
FORCED = STOP + 1  # ids from here are those of a forced close: one a byte
OUTPUT_BYTES = [*PIECES, b"", *(bytes([byte]) for byte in range(256))]


def encode(text: str) -> list[int]:
    """A tokenizer of bytes, whose ids no sampled token has."""
    return [FORCED + byte for byte in text.encode()]


CLOSE = ForcedClose(encode)


def transcript(
    *,
    thinking: bool = False,
    budget: int | None = None,
    grace: int = 0,
    reserve: int = 0,
    max_tokens: int = 100,
    min_tokens: int = 0,
    stops: tuple[bytes, ...] = (),
) -> Transcript:
    """A transcript over the pieces."""
    machine = Thinking(CLOSE, budget=budget, grace=grace, latest=max_tokens - reserve)
    return Transcript(
        OUTPUT_BYTES,
        machine if thinking else None,
        stop_ids=frozenset({STOP}),
        stops=stops,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
    )


def feed(made: Transcript, ids: list[int]) -> Transcript:
    """Push ids until the transcript ends."""
    made.begin()
    for token_id in ids:
        if made.finish_reason is not None:
            break
        made.push(token_id, -0.5)
    return made


def ids_of(*pieces: bytes) -> list[int]:
    """The ids of pieces."""
    return [PIECES.index(piece) for piece in pieces]


@given(
    ids=st.lists(st.integers(0, STOP), min_size=30, max_size=30),
    budget=st.none() | st.integers(0, 12),
    grace=st.integers(0, 4),
    reserve=st.integers(0, 12),
    max_tokens=st.integers(1, 30),
)
@settings(max_examples=400)
def test_tokens_and_characters_are_conserved(
    ids: list[int], budget: int | None, grace: int, reserve: int, max_tokens: int
) -> None:
    """Limits are never passed, every sampled token is counted once, and both texts are exactly
    what the bytes say when split at the first tag."""
    made = feed(
        transcript(
            thinking=True, budget=budget, grace=grace, reserve=reserve, max_tokens=max_tokens
        ),
        ids,
    )
    assert made.finish_reason is not None
    sampled = [i for i in made.token_ids if i < FORCED]
    assert sampled == ids[: len(sampled)]
    assert made.num_sampled == len(sampled) <= max_tokens
    assert made.num_reasoning_tokens + made.num_completion_tokens == len(sampled)
    assert made.num_forced == len(made.token_ids) - len(sampled)
    assert made.budget_hit == (made.num_forced > 0)
    assert [p is None for p in made.logprobs] == [i >= FORCED for i in made.token_ids]
    if made.budget_hit:
        limits = [max(0, max_tokens - reserve)]
        if budget is not None:
            limits.append(budget + grace if budget else 0)
        assert made.num_reasoning_tokens <= min(limits)
    stopped = made.finish_reason is FinishReason.STOP
    assert stopped == (made.token_ids[-1] == STOP)

    written = b"".join(OUTPUT_BYTES[i] for i in made.token_ids)
    before, tag, after = written.partition(b"</think>")
    if made.budget_hit:
        start = "".join(chr(i - FORCED) for i in made.token_ids if i >= FORCED)
        assert start.lstrip("\n").endswith("ink>\n\n"[-6:]) or start in "</think>\n\n"
        before = before[:-1] if start.startswith("\n</think>") else before
    expected = before.removeprefix(b"<think>").decode("utf-8", "replace")
    assert (made.reasoning() or "") == expected
    assert made.text() == (after.decode("utf-8", "replace").lstrip() if tag else "")


@given(ids=st.lists(st.integers(0, STOP), max_size=20))
def test_without_thinking_all_is_completion(ids: list[int]) -> None:
    """Tags are text then, and no white space is taken away."""
    made = feed(transcript(), ids)
    written = b"".join(OUTPUT_BYTES[i] for i in made.token_ids)
    assert made.text() == written.decode("utf-8", "replace")
    assert made.reasoning() is None
    assert made.num_completion_tokens == made.num_sampled


@given(ids=st.lists(st.integers(0, STOP - 1), max_size=20), thinking=st.booleans())
def test_a_stop_string_cuts_the_completion_where_it_first_stands(
    ids: list[int], thinking: bool
) -> None:
    """Across tokens too; the text ends before it, and it was not there a token earlier."""
    made = feed(transcript(thinking=thinking, stops=(b"END", b"\n\n")), ids)
    full = feed(transcript(thinking=thinking), ids[: made.num_sampled]).text()
    places = [at for at in (full.find("END"), full.find("\n\n")) if at >= 0]
    assert (made.finish_reason is FinishReason.STOP) == bool(places)
    assert made.text() == (full[: min(places)] if places else full)


def test_a_stop_string_in_the_reasoning_stops_nothing() -> None:
    """Also not the white space between the tag and the answer."""
    ids = ids_of(b"END", b"</think>", b"\n\n", b"a", b"\n\n", b"a")
    made = feed(transcript(thinking=True, stops=(b"\n\n", b"END")), ids)
    assert (made.reasoning(), made.text(), made.num_sampled) == ("END", "a", 5)


def test_a_stop_token_while_thinking_leaves_all_reasoning() -> None:
    """The completion is an empty text, and the token counts as reasoning."""
    made = feed(transcript(thinking=True), [*ids_of(b"a", b"</"), STOP])
    assert (made.reasoning(), made.text()) == ("a</", "")
    assert made.finish_reason is FinishReason.STOP
    assert (made.num_reasoning_tokens, made.num_completion_tokens) == (3, 0)


def test_white_space_after_the_tag_is_dropped_once() -> None:
    """White space of any plane, in pieces; what stands between words stays."""
    ids = ids_of(b"</think>", b"\n\n", b"\xe3\x80", b"\x80", b"a", b" ", b"a")
    assert feed(transcript(thinking=True), ids).text() == "a a"


def test_a_cut_character_is_replaced() -> None:
    """A generation that ends inside a character ends in U+FFFD."""
    assert feed(transcript(max_tokens=2), ids_of(b"a", b"\xc3")).text() == "a�"


@pytest.mark.parametrize("min_tokens", [0, 2])
def test_before_min_tokens_nothing_stops(min_tokens: int) -> None:
    """Neither a stop token nor a stop string among the first min_tokens counts."""
    made = feed(transcript(min_tokens=min_tokens, stops=(b"END",)), ids_of(b"END", b"a", b"a"))
    assert made.text() == ("" if min_tokens == 0 else "ENDaa")
    stopped = feed(transcript(min_tokens=min_tokens), [STOP, STOP, STOP, STOP])
    assert stopped.num_sampled == min_tokens + 1


def test_a_stop_string_right_after_the_white_space_is_found() -> None:
    """However much white space went before it."""
    ids = ids_of(b"</think>", b"\n\n", b"\n\n", b"\n\n", b"END")
    made = feed(transcript(thinking=True, stops=(b"END",)), ids)
    assert (made.text(), made.finish_reason) == ("", FinishReason.STOP)

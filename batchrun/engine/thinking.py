"""The reasoning of one sequence: where it ends by itself, and where it is made to end.

``<think>`` and ``</think>`` are plain text of several tokens, so the end is looked for in the
bytes of the tokens, where it may share a token with what follows. No tensors here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OPEN = b"<think>"
CLOSE = b"</think>"
AFTER_CLOSE = b"\n\n"
"""What the model was taught to write between ``</think>`` and the answer."""


class ForcedClose:
    """The token ids that end a reasoning by force, tokenised once for each way it can end."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        """``encode`` gives the ids of a plain text, without special tokens."""
        self._rest = tuple(
            tuple(encode((CLOSE[k:] + AFTER_CLOSE).decode())) for k in range(len(CLOSE))
        )
        self._after_line_break = tuple(encode((b"\n" + CLOSE + AFTER_CLOSE).decode()))
        self.max_tokens = max(map(len, (*self._rest, self._after_line_break)))
        """The longest of them; what admission has to reserve beyond max_tokens."""

    def ids(self, reasoning: bytes | bytearray) -> tuple[int, ...]:
        """The rest of ``</think>`` where the reasoning ends in its beginning, else all of it.

        A line break goes first where the reasoning ends without one.
        """
        begun = begun_close(reasoning)
        if begun or not reasoning or reasoning.endswith(b"\n"):
            return self._rest[begun]
        return self._after_line_break


def begun_close(reasoning: bytes | bytearray) -> int:
    """How many bytes of ``</think>`` the reasoning ends in, fewer than all."""
    return next((k for k in range(len(CLOSE) - 1, 0, -1) if reasoning.endswith(CLOSE[:k])), 0)


@dataclass(frozen=True, slots=True)
class End:
    """The end of a reasoning: tokens to be forced (none at a natural end), and the bytes of the
    last sampled token that stand after ``</think>``."""

    forced_ids: tuple[int, ...] = ()
    rest: bytes = b""


class Thinking:
    """Counts the tokens of one reasoning and says when it ends.

    The budget is hard: after ``budget`` sampled tokens, or with ``grace`` at the first token from
    then on that holds a line break and at the latest ``grace`` tokens later. ``latest`` is the
    count at which the answer's reserve begins; nothing goes beyond it. At a budget of 0 nothing
    has been begun that a grace could bring to an end, so the close comes at once.
    """

    __slots__ = ("_buffer", "_close", "_hard", "_soft", "num_tokens", "reasoning")

    def __init__(self, close: ForcedClose, *, budget: int | None, grace: int, latest: int) -> None:
        self._close = close
        self._soft = latest if budget is None else min(budget, latest)
        self._hard = latest if budget is None else min(budget + grace, latest)
        self._buffer = bytearray()
        self.num_tokens = 0
        """Sampled tokens, including the one that completes ``</think>``."""
        self.reasoning: bytes | None = None
        """The text before ``</think>``, once there is one."""

    @property
    def begun(self) -> int:
        """How many bytes of ``</think>`` the reasoning so far ends in."""
        return begun_close(self._buffer)

    def begin(self) -> End | None:
        """Before the first token: the end, if no reasoning is allowed at all."""
        return self._force() if self._soft <= 0 else None

    def push(self, data: bytes, *, is_last: bool = False) -> End | None:
        """Take the bytes of a sampled token; the end of the reasoning, if this is it.

        After the sequence's last token nothing is forced any more: then all is reasoning.
        """
        self.num_tokens += 1
        buffer = self._buffer
        searched = max(0, len(buffer) - len(CLOSE) + 1)
        buffer += data
        at = buffer.find(CLOSE, searched)
        if at >= 0:
            self.reasoning = bytes(buffer[:at])
            return End(rest=bytes(buffer[at + len(CLOSE) :]))
        is_spent = self.num_tokens >= self._hard
        if not is_last and (is_spent or (self.num_tokens >= self._soft and b"\n" in data)):
            return self._force()
        return None

    def text(self) -> str | None:
        """The reasoning so far or in all, without a ``<think>`` that the model echoed."""
        data = bytes(self._buffer) if self.reasoning is None else self.reasoning
        return data.removeprefix(OPEN).decode("utf-8", "replace") or None

    def _force(self) -> End:
        """The close by force. The beginning of ``</think>`` that it completes is no reasoning; the
        line break that it may add never was in the buffer."""
        buffer = self._buffer
        self.reasoning = bytes(buffer[: len(buffer) - begun_close(buffer)])
        return End(forced_ids=self._close.ids(buffer))

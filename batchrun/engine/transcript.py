"""What one sequence has generated: its tokens, its two texts, and why it ended."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from batchrun.engine.constraints import Constraint
from batchrun.engine.thinking import Thinking
from batchrun.records import FinishReason, Generated


class Transcript:
    """Takes sampled tokens one by one; says what is to be forced and when the sequence has ended.

    No character is lost: a token's bytes are reasoning or completion, but for ``</think>``, the
    white space right after it, special tokens, the token that stops, and what a stop string cuts.
    """

    __slots__ = (
        "_after_close",
        "_completion",
        "_min_tokens",
        "_output_bytes",
        "_stops",
        "_thinking",
        "budget_hit",
        "constraint",
        "finish_reason",
        "logprobs",
        "max_tokens",
        "num_sampled",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        output_bytes: Sequence[bytes],
        thinking: Thinking | None,
        *,
        stop_ids: frozenset[int],
        stops: tuple[bytes, ...],
        max_tokens: int,
        min_tokens: int,
        constraint: Constraint | None = None,
    ) -> None:
        """``output_bytes`` is what each token id adds to the text; ``stops`` are stop strings.

        ``constraint`` is what the completion is bound to.
        """
        self._output_bytes = output_bytes
        self._thinking = thinking
        self.stop_ids = stop_ids
        self._stops = stops
        self.max_tokens = max_tokens
        self._min_tokens = min_tokens
        self.constraint = constraint
        self._completion = bytearray()
        self._after_close = False  # while the completion is only the white space after </think>
        self.budget_hit = False
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []
        """Sampled and forced, in order."""
        self.logprobs: list[float | None] = []
        """One a token, None for a forced one."""
        self.num_sampled = 0

    @property
    def num_reasoning_tokens(self) -> int:
        """Sampled tokens up to and including the one that completes ``</think>``."""
        return 0 if self._thinking is None else self._thinking.num_tokens

    @property
    def begun_close(self) -> int | None:
        """Bytes of ``</think>`` that the reasoning ends in; None when what comes is completion."""
        thinking = self._thinking
        return None if thinking is None or thinking.reasoning is not None else thinking.begun

    @property
    def may_stop(self) -> bool:
        """Whether a stop token counts if it comes next."""
        return self.num_sampled >= self._min_tokens

    @property
    def ends_next(self) -> bool:
        """Whether the next token is the last one in any case."""
        return self.num_sampled + 1 >= self.max_tokens

    @property
    def error(self) -> str | None:
        """What is wrong with the constraint, if anything."""
        return None if self.constraint is None else self.constraint.error

    @property
    def num_forced(self) -> int:
        """Tokens that were written by force."""
        return len(self.token_ids) - self.num_sampled

    @property
    def num_completion_tokens(self) -> int:
        """Sampled tokens after the reasoning, the stopping one included."""
        return self.num_sampled - self.num_reasoning_tokens

    def sampled(self, start: int = 0) -> Generated:
        """What was sampled, without the first ``start`` tokens of it and those written by force;
        ``closed_after`` counts from the first token of all."""
        ids, logprobs = self.token_ids, self.logprobs
        if self.budget_hit:
            closed, num_forced = self.num_reasoning_tokens, self.num_forced
            rest = max(start, closed) + num_forced
            ids = ids[start:closed] + ids[rest:]
            logprobs = logprobs[start:closed] + logprobs[rest:]
        else:
            ids, logprobs = ids[start:], logprobs[start:]
        values = [value for value in logprobs if value is not None]
        return Generated(
            token_ids=tuple(ids),
            logprobs=tuple(values) if len(values) == len(ids) else None,
            closed_after=self.num_reasoning_tokens if self.budget_hit else None,
        )

    def begin(self) -> tuple[int, ...]:
        """Before the first token: what to force after the prompt."""
        end = None if self._thinking is None else self._thinking.begin()
        return () if end is None else self._force(end.forced_ids)

    def push(self, token_id: int, logprob: float | None) -> tuple[int, ...]:
        """Take a sampled token; afterwards :attr:`finish_reason` says whether it was the last.

        :returns: the ids to be forced after it, mostly none.
        """
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.num_sampled += 1
        is_stop = token_id in self.stop_ids and self.num_sampled > self._min_tokens
        is_last = is_stop or self.num_sampled >= self.max_tokens
        if is_last:
            self.finish_reason = FinishReason.STOP if is_stop else FinishReason.LENGTH
        data = b"" if is_stop else self._output_bytes[token_id]
        thinking = self._thinking
        if thinking is None or thinking.reasoning is not None:
            if self.constraint is not None and not is_stop:
                self.constraint.take(token_id)
            self._complete(data)
        else:
            end = thinking.push(data, is_last=is_last)
            if end is not None and end.forced_ids:
                return self._force(end.forced_ids)
            if end is not None:
                self._after_close = True
                if self.constraint is not None:
                    self.constraint.take_bytes(end.rest)
                self._complete(end.rest)
        if self.constraint is not None and self.constraint.is_complete:
            self.finish_reason = FinishReason.STOP
        return ()

    def end(self) -> None:
        """No token may come next: the end of a completion that is valid, else an error."""
        if self.constraint is not None and not self.constraint.is_valid:
            self.constraint.break_off()
        self.finish_reason = FinishReason.STOP

    def text(self) -> str:
        """The completion. Bytes that end in the middle of a character become U+FFFD."""
        text = self._completion.decode("utf-8", "replace")
        return text.lstrip() if self._after_close else text

    def reasoning(self) -> str | None:
        """The reasoning, None where there is none."""
        return None if self._thinking is None else self._thinking.text()

    def _force(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        self.budget_hit = True
        self._after_close = True
        self.token_ids += ids
        self.logprobs += [None] * len(ids)
        return ids

    def _complete(self, data: bytes) -> None:
        """Add to the completion and look for a stop string in what is new."""
        completion = self._completion
        searched = len(completion)
        completion += data
        if self._after_close:
            # White space between is dropped as soon as something follows it; a character whose
            # bytes are not all there yet may still be white space.
            text, _ = codecs.utf_8_decode(bytes(completion), "replace", False)
            stripped = text.lstrip()
            if not stripped:
                return
            del completion[: len(text[: len(text) - len(stripped)].encode())]
            self._after_close = False
            searched = 0
        if not self._stops or self.num_sampled <= self._min_tokens:
            return
        longest = max(map(len, self._stops))
        found = [completion.find(stop, max(0, searched - longest + 1)) for stop in self._stops]
        places = [at for at in found if at >= 0]
        if places:
            del completion[min(places) :]
            self.finish_reason = FinishReason.STOP

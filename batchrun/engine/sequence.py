"""One request inside the engine."""

from __future__ import annotations

from batchrun.engine.request import Request
from batchrun.engine.snapshot import Mark, Snapshot
from batchrun.engine.transcript import Transcript
from batchrun.records import Generated


class Sequence:
    """A request with its tokens, its place in the pools and its transcript.

    ``tokens`` are prompt and output; the model's state holds the first ``num_context`` of them.
    The first ``num_given`` were there from the start: the prompt, a reasoning that is closed at
    once, and what was taken over from an earlier generation (``num_replayed`` sampled tokens).
    A sequence decodes when its state holds all but one; until then it prefills, be it the prompt
    or forced tokens. What counts is what the state holds, never the length of the chunk: the
    first token of a prompt of one token is a prefill. When its state holds them all, the next token
    is in flight: sampled on the device, but not taken in here.
    """

    __slots__ = (
        "_known",
        "added_at",
        "admitted_at",
        "arrival",
        "blocks",
        "first_token_at",
        "marks",
        "num_context",
        "num_given",
        "num_replayed",
        "num_reserved",
        "request",
        "slot",
        "snapshot",
        "source",
        "tokens",
        "transcript",
    )

    def __init__(
        self,
        request: Request,
        transcript: Transcript,
        *,
        num_reserved: int,
        added_at: float,
        replays_at_once: bool = True,
    ) -> None:
        """``num_reserved`` is the most tokens its state can come to hold; times are monotonic.

        What was generated before is read like a prompt where it ``replays_at_once``; else it is
        given token by token in place of what is sampled (:meth:`next_known`), so that every step
        has the shape that it had the first time.
        """
        self.request = request
        self.transcript = transcript
        self.num_reserved = num_reserved
        self.tokens = [*request.prompt_token_ids, *transcript.begin()]
        self._known = request.generated
        if replays_at_once:
            self._replay()
        self.num_given = len(self.tokens)
        self.num_replayed = transcript.num_sampled
        self.num_context = 0
        self.slot: int | None = None
        self.blocks: tuple[int, ...] = ()
        self.arrival = 0
        """Its number in the queue, counted since the scheduler was made."""
        self.marks: tuple[Mark, ...] = ()
        self.source: Snapshot | None = None
        """The snapshot that its state was copied from when it got its slot."""
        self.snapshot: Snapshot | None = None
        """The snapshot that its state is to be copied to when it holds so many tokens."""
        self.added_at = added_at
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that it did not have to compute."""
        return 0 if self.source is None else self.source.num_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that the state does not hold yet."""
        return len(self.tokens) - self.num_context

    @property
    def is_decoding(self) -> bool:
        """Whether one token follows a state that holds all the others; it may be in flight, but
        for the last one that there can be."""
        num_pending = len(self.tokens) - self.num_context
        if num_pending == 1:
            return self.num_context > 0
        return num_pending == 0 and not self.transcript.ends_next

    @property
    def is_in_prompt(self) -> bool:
        """Whether what the sequence began with is not all in the state yet."""
        return self.num_context < self.num_given

    def append(self, token_id: int, logprob: float | None) -> None:
        """Take a sampled token and whatever is forced after it."""
        self.tokens.append(token_id)
        self.tokens += self.transcript.push(token_id, logprob)

    @property
    def known(self) -> Generated | None:
        """What is known of its output: what is sampled, or what it still has to replay."""
        return self.transcript.sampled() if self._known is None else self.request.generated

    def next_known(self) -> tuple[int, float | None] | None:
        """The token that was sampled here before, and its log-probability; None from where on
        nothing is known, or where this sequence would sample another one."""
        known, transcript = self._known, self.transcript
        if known is None:
            return None
        count, closed_after = transcript.num_sampled, known.closed_after
        was_closed = closed_after is not None and closed_after <= count
        is_over = transcript.finish_reason is not None or count >= len(known.token_ids)
        if is_over or was_closed != transcript.budget_hit:
            self._known = None
            return None
        return known.token_ids[count], None if known.logprobs is None else known.logprobs[count]

    def _replay(self) -> None:
        """Take over what was generated before, as far as it is what would be sampled here."""
        while (token := self.next_known()) is not None:
            self.append(*token)

"""One request inside the engine."""

from __future__ import annotations

from batchrun.engine.request import Request
from batchrun.engine.snapshot import Mark, Snapshot
from batchrun.engine.transcript import Transcript


class Sequence:
    """A request with its tokens, its place in the pools and its transcript.

    ``tokens`` are prompt and output; the model's state holds the first ``num_context`` of them.
    A sequence decodes when its state holds all but one; until then it prefills, be it the prompt
    or forced tokens. What counts is what the state holds, never the length of the chunk: the
    first token of a prompt of one token is a prefill.
    """

    __slots__ = (
        "added_at",
        "admitted_at",
        "arrival",
        "blocks",
        "first_token_at",
        "marks",
        "num_context",
        "num_reserved",
        "request",
        "slot",
        "snapshot",
        "source",
        "tokens",
        "transcript",
    )

    def __init__(
        self, request: Request, transcript: Transcript, *, num_reserved: int, added_at: float
    ) -> None:
        """``num_reserved`` is the most tokens its state can come to hold; times are monotonic."""
        self.request = request
        self.transcript = transcript
        self.num_reserved = num_reserved
        self.tokens = [*request.prompt_token_ids, *transcript.begin()]
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
        """Whether one token follows a state that holds all the others."""
        return self.num_context > 0 and len(self.tokens) - self.num_context == 1

    @property
    def is_in_prompt(self) -> bool:
        """Whether the prompt is not all in the state yet."""
        return self.num_context < len(self.request.prompt_token_ids)

    def append(self, token_id: int, logprob: float | None) -> None:
        """Take a sampled token and whatever is forced after it."""
        self.tokens.append(token_id)
        self.tokens += self.transcript.push(token_id, logprob)

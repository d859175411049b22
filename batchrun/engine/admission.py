"""Whether a request can ever run, and the sequence that it becomes."""

from __future__ import annotations

from batchrun.engine.constraints import Constraints
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.engine.sequence import Sequence
from batchrun.engine.thinking import ForcedClose, Thinking
from batchrun.engine.tokenizer import Tokenizer
from batchrun.engine.transcript import Transcript
from batchrun.model.config import ModelConfig
from batchrun.records import ErrorKind, RowError


class Admission:
    """Makes sequences of requests, with all that a transcript needs of tokenizer and checkpoint."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        constraints: Constraints | None,
        *,
        stop_ids: frozenset[int],
        max_model_len: int,
        replays_at_once: bool,
    ) -> None:
        """``stop_ids`` are the checkpoint's. ``replays_at_once``: see :class:`Sequence`."""
        vocab_size = config.vocab_size
        self._vocab_size = vocab_size
        self._constraints = constraints
        self._stop_ids = stop_ids
        self._max_model_len = max_model_len
        self._replays_at_once = replays_at_once
        self._close = None if tokenizer is None else ForcedClose(tokenizer.encode_plain)
        self._output_bytes = (
            [b""] * vocab_size if tokenizer is None else tokenizer.output_bytes(vocab_size)
        )

    def error(
        self, num_prompt_tokens: int, params: SamplingParams, thinking: bool
    ) -> RowError | None:
        """Why a prompt of so many tokens can never run, or None."""
        limit = self._max_model_len
        if num_prompt_tokens < 1:
            return RowError(ErrorKind.INVALID_PROMPT, "the prompt has no tokens")
        max_tokens = params.max_tokens
        if max_tokens is None and num_prompt_tokens >= limit:
            return RowError(
                ErrorKind.TOO_LONG,
                f"{num_prompt_tokens} prompt tokens leave nothing of max_model_len {limit}",
            )
        if max_tokens is not None and num_prompt_tokens + max_tokens > limit:
            return RowError(
                ErrorKind.TOO_LONG,
                f"{num_prompt_tokens} prompt tokens + max_tokens {max_tokens} = "
                f"{num_prompt_tokens + max_tokens} > max_model_len {limit}",
            )
        if params.bound_to is None:
            return None
        if self._constraints is None:
            reason: str | None = "the checkpoint has no tokenizer, so no text can be bound"
        else:
            reason = self._constraints.error(params.bound_to, thinking=thinking)
        return None if reason is None else RowError(ErrorKind.ENGINE, f"response_format: {reason}")

    def sequence(self, request: Request, now: float) -> Sequence | RowError:
        """The sequence of a request that was added ``now`` (monotonic), which may have ended
        already by what the request brings; or why there is none."""
        error = self._ids_error(request)
        if error is not None:
            return error
        num_prompt = len(request.prompt_token_ids)
        max_tokens = request.params.max_tokens or self._max_model_len - num_prompt
        num_forced = self._close.max_tokens if self._close is not None and request.thinking else 0
        sequence = Sequence(
            request,
            self._transcript(request, max_tokens),
            num_reserved=num_prompt + max_tokens + num_forced,
            added_at=now,
            replays_at_once=self._replays_at_once,
        )
        if sequence.transcript.error is not None:
            return RowError(ErrorKind.ENGINE, f"response_format: {sequence.transcript.error}")
        return sequence

    def _ids_error(self, request: Request) -> RowError | None:
        prompt, vocab_size = request.prompt_token_ids, self._vocab_size
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocab_size:
            return RowError(
                ErrorKind.INVALID_PROMPT,
                f"a prompt token id is outside the vocabulary of {vocab_size}",
            )
        if request.generated is not None:
            ids, logprobs = request.generated.token_ids, request.generated.logprobs
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                message = "a token that was generated before is outside the vocabulary"
                return RowError(ErrorKind.ENGINE, message)
            if logprobs is None and ids and request.params.logprobs is not None:
                message = "tokens that were generated before lack their log-probabilities"
                return RowError(ErrorKind.ENGINE, message)
        return self.error(len(prompt), request.params, request.thinking)

    def _transcript(self, request: Request, max_tokens: int) -> Transcript:
        params = request.params
        thinking = None
        if request.thinking and self._close is not None:
            thinking = Thinking(
                self._close,
                budget=params.max_thinking_tokens,
                grace=params.thinking_grace,
                latest=max_tokens - params.reserve_of(max_tokens),
            )
        stop_ids = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else self._stop_ids)}
        known_stop_ids = frozenset(i for i in stop_ids if i < self._vocab_size)
        constraint = None
        if params.bound_to is not None and self._constraints is not None:
            constraint = self._constraints.begin(
                params.bound_to, thinking=thinking is not None, stop_ids=known_stop_ids
            )
        return Transcript(
            self._output_bytes,
            thinking,
            stop_ids=known_stop_ids,
            stops=tuple(text.encode() for text in params.stop_strings),
            max_tokens=max_tokens,
            min_tokens=params.min_tokens,
            constraint=constraint,
        )

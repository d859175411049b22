"""How one request is sampled: vLLM's names and defaults, plus the thinking budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from batchrun.errors import RequestError
from batchrun.formats import FormatError, ResponseFormat

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy; dividing by less would only amplify rounding."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue one prompt. Defaults are those of vLLM.

    ``max_tokens`` bounds reasoning and completion together; None = up to the model's length.
    ``min_tokens`` of the sampled tokens come before any stop token or stop string counts.
    ``temperature`` 0 is greedy. ``top_k`` 0 or -1 and ``min_p`` 0 are off.
    ``repetition_penalty`` acts on every token of prompt and output. ``stop`` strings end the
    completion, never the reasoning, and are no part of the text. ``stop_token_ids`` act like the
    model's own stop tokens, also with ``ignore_eos``. ``seed`` None means 0. ``n`` samples a
    prompt. ``logprobs`` 0 or 1 returns the log-probability of each sampled token under the
    model, before penalty, temperature and cuts.

    ``max_thinking_tokens`` is the thinking budget: so many reasoning tokens, then ``</think>`` is
    forced; None = no budget. ``thinking_grace`` more tokens may be spent to end at a line break.
    ``answer_reserve`` forces ``</think>`` when no more than so many of ``max_tokens`` are left;
    None = min(128, max_tokens // 4).

    ``response_format`` binds the completion, never the reasoning: ``{"type": "json_schema",
    "schema": …}``, ``{"type": "regex", "pattern": …}`` or ``{"type": "choice", "choices": […]}``.
    It is valid when the row stops by itself; a stop string or ``max_tokens`` can cut it short.

    :raises RequestError: for a value of the wrong type or out of range (a ``ValueError``).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    max_thinking_tokens: int | None = None
    thinking_grace: int = 0
    answer_reserve: int | None = None
    response_format: Mapping[str, object] | ResponseFormat | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        stop_token_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        if self.response_format is not None and self.bound_to is None:
            try:
                bound_to = ResponseFormat.parse(self.response_format)
            except FormatError as error:
                raise RequestError(f"response_format: {error}") from error
            object.__setattr__(self, "response_format", bound_to)
        self._check_types()
        self._check_ranges()

    @property
    def bound_to(self) -> ResponseFormat | None:
        """``response_format`` as it was understood."""
        own = self.response_format
        return own if isinstance(own, ResponseFormat) else None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without random numbers."""
        return self.temperature < GREEDY_BELOW

    @property
    def filtered(self) -> bool:
        """Whether unlikely tokens are cut off before drawing."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    def reserve_of(self, max_tokens: int) -> int:
        """How many of ``max_tokens`` are kept for the answer."""
        return min(128, max_tokens // 4) if self.answer_reserve is None else self.answer_reserve

    def _check_types(self) -> None:
        optional = ("max_tokens", "seed", "logprobs", "max_thinking_tokens", "answer_reserve")
        integers = ("n", "top_k", "min_tokens", "thinking_grace", *optional)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in integers:
                is_right = isinstance(value, int) and not isinstance(value, bool)
                if not is_right and not (value is None and field.name in optional):
                    raise RequestError(f"{field.name} must be an integer, not {value!r}")
            elif field.name in ("temperature", "top_p", "min_p", "repetition_penalty"):
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not is_number or not math.isfinite(value):
                    raise RequestError(f"{field.name} must be a finite number, not {value!r}")
            elif field.name == "ignore_eos" and not isinstance(value, bool):
                raise RequestError(f"ignore_eos must be true or false, not {value!r}")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop must hold texts that are not empty, not {text!r}")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise RequestError(f"stop holds lone surrogates, so {text!r} is not Unicode")
        for token_id in self.stop_token_ids or ():
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise RequestError(f"stop_token_ids must hold token ids, not {token_id!r}")

    def _check_ranges(self) -> None:
        def check(holds: bool, name: str, rule: str) -> None:
            if not holds:
                raise RequestError(f"{name} must be {rule}, not {getattr(self, name)!r}")

        check(self.n >= 1, "n", "at least 1")
        check(self.temperature >= 0, "temperature", "0 or more")
        check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(self.top_k >= -1, "top_k", "0 (off) or more")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(self.repetition_penalty > 0, "repetition_penalty", "above 0")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        limit = self.max_tokens
        check(self.min_tokens >= 0, "min_tokens", "0 or more")
        check(limit is None or self.min_tokens <= limit, "min_tokens", "at most max_tokens")
        check(self.logprobs in (None, 0, 1), "logprobs", "0 or 1 (the sampled token's own)")
        budget = self.max_thinking_tokens
        check(budget is None or budget >= 0, "max_thinking_tokens", "0 or more")
        check(self.thinking_grace >= 0, "thinking_grace", "0 or more")
        reserve = self.answer_reserve
        check(reserve is None or reserve >= 0, "answer_reserve", "0 or more")


def _as_tuple(name: str, value: object) -> tuple[object, ...]:
    """The items of a list, or of None, which has none."""
    if value is None:
        return ()
    if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list, not {value!r}")
    return tuple(value)

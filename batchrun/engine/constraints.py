"""Binds completions to a response format: which tokens may come next, row by row.

A format is compiled once into a grammar that all its rows share; each row has a matcher, a place
in that grammar. Before a step is sampled the matchers write one bit a token into a buffer, and the
sampler takes what has no bit out of the draw.

The reasoning is not bound. What is: which tokens may end it (one that carries the beginning of the
answer behind ``</think>`` must carry a possible beginning), and that no stop token comes before
the answer. After ``</think>`` up to :data:`MAX_SPACE` characters of white space are free; they are
no part of the completion, which then begins with something else.

Letters: R bound rows of a step, V vocabulary, W 32-bit words that hold a bit for each token.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import llguidance
import llguidance.numpy
import numpy as np
import torch
from numpy.typing import NDArray

from batchrun.engine.thinking import CLOSE
from batchrun.engine.tokenizer import Tokenizer
from batchrun.formats import FormatKind, ResponseFormat

Words = NDArray[np.int32]

MAX_SPACE = 8
"""Characters of white space that may follow ``</think>``: a model that writes nothing else must
come to an end."""

_SPACE = f"[ \\t\\r\\n]{{1,{MAX_SPACE}}}"
_JSON_SPACE = " |\\r?\\n[ \\t]{0,32}"
"""Between the parts of a JSON text: a space, or a line break and an indent."""
_NO_SPACE_FIRST = "(?s:[^{}].*)?".format(
    "".join(f"\\u{{{code:X}}}" for code in range(0x3001) if chr(code).isspace())
)
_MAX_GRAMMARS = 256
_WHERE = re.compile(r"^(error: )?(at \d+\(\d+\): )?(failed to compile JSON schema: )?")
_DEAD_END = "no token can come next, and the completion is not valid yet"


class Constraint:
    """The place of one sequence in its grammar. Take in what the completion consists of, in order.

    Whatever goes wrong in it is in :attr:`error` and stays there; nothing is raised.
    """

    __slots__ = ("_grammar", "_matcher", "_stops", "error")

    def __init__(self, grammar: _Grammar, stops: Words) -> None:
        """``stops`` [W] has the bits of the row's stop tokens."""
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._stops = stops
        self.error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the completion is valid and nothing can follow it."""
        return self.error is None and bool(self._matcher.is_stopped())

    @property
    def is_valid(self) -> bool:
        """Whether the completion is valid as it stands."""
        return self.error is None and bool(self._matcher.is_accepting())

    def take(self, token_id: int) -> None:
        """A token of the completion."""
        if self.error is None and not self._matcher.consume_token(token_id):
            self.error = _reason(self._matcher.get_error())

    def take_bytes(self, data: bytes) -> None:
        """The bytes that the token with the end of ``</think>`` carries behind it."""
        if data and self.error is None:
            ids = self._grammar.tokens.tokenize_bytes(data)
            if not self._matcher.consume_tokens(ids):
                self.error = _reason(self._matcher.get_error())

    def break_off(self) -> None:
        """No token may come next, and the completion is not valid."""
        self.error = self.error or _reason(self._matcher.get_error()) or _DEAD_END


@dataclass(frozen=True, slots=True)
class BoundRow:
    """A row to be sampled under a constraint.

    ``begun`` is None once the completion has begun; before, how many bytes of ``</think>`` the
    reasoning ends in. ``may_stop`` is False while ``min_tokens`` are not there.
    """

    constraint: Constraint
    begun: int | None
    may_stop: bool


class Constraints:
    """The grammars of one tokenizer, and the buffer of masks for the rows of a step."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, num_threads: int = 1) -> None:
        """``vocab_size`` is the model's, which may have more rows than the tokenizer has texts.

        Cheap: what takes time is made when the first format comes.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._num_threads = num_threads
        self._grammar_of = functools.lru_cache(_MAX_GRAMMARS)(self._compile)
        self._stops_of = functools.lru_cache(_MAX_GRAMMARS)(self._bits)
        self._buffer = torch.zeros(0, 0, dtype=torch.int32)

    def error(self, response_format: ResponseFormat, *, thinking: bool) -> str | None:
        """Why a format cannot be used, or None."""
        grammar = self._grammar_of(response_format, thinking)
        return grammar if isinstance(grammar, str) else None

    def begin(
        self, response_format: ResponseFormat, *, thinking: bool, stop_ids: frozenset[int]
    ) -> Constraint:
        """A completion before its first token.

        :raises ValueError: the format cannot be used; :meth:`error` says so beforehand.
        """
        grammar = self._grammar_of(response_format, thinking)
        if isinstance(grammar, str):
            raise ValueError(grammar)
        return Constraint(grammar, self._stops_of(stop_ids))

    def masks(self, rows: Sequence[BoundRow], device: torch.device) -> tuple[torch.Tensor, Words]:
        """Which tokens may come next.

        :returns: [R, W] int32, a bit a token, the lowest first, on ``device``; and the places of
            rows for which no token is left (their masks are full).
        """
        buffer = self._room(len(rows), device)
        masks: Words = buffer.numpy()
        completing = []
        for place, row in enumerate(rows):
            if row.begun is None:
                completing.append((row.constraint._matcher, place))
            else:
                masks[place] = row.constraint._grammar.may_close(row.begun)
        if self._num_threads > 1 and completing:
            llguidance.numpy.fill_next_token_bitmask_par(self._executor, completing, masks)
        else:
            # A pool of one thread only adds the wait for that thread.
            pointer, num_bytes = masks.ctypes.data, masks.strides[0]
            for matcher, place in completing:
                matcher.unsafe_compute_mask_ptr(pointer + place * num_bytes, num_bytes)
        stops = rows[0].constraint._stops  # [W], or [R, W] where they are not all the same
        if not all(row.constraint._stops is stops for row in rows):
            stops = np.stack([row.constraint._stops for row in rows])
        may_stop = [r.may_stop and r.begun is None and r.constraint.is_valid for r in rows]
        in_text = np.array([row.begun is None for row in rows])[:, None]
        masks &= np.where(in_text, self._texts, -1) & ~stops
        masks |= stops * np.array(may_stop)[:, None]
        empty = np.flatnonzero(~masks.any(axis=1)).astype(np.int32)
        masks[empty] = -1
        return buffer.to(device, non_blocking=True), empty

    def _room(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """A buffer [R, W] whose last content has left it."""
        num_words = self._vocab_size // 32 + 1
        if device.type != "cpu":
            # From pinned memory the copy need not be waited for, so no buffer is used twice.
            return torch.empty(num_rows, num_words, dtype=torch.int32, pin_memory=True)
        if len(self._buffer) < num_rows:
            self._buffer = torch.empty(num_rows, num_words, dtype=torch.int32)
        return self._buffer[:num_rows]

    def _compile(self, response_format: ResponseFormat, thinking: bool) -> _Grammar | str:
        text = _lark(response_format, thinking)
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokens, text, log_level=0, limits=limits)
        if matcher.is_error():
            return _reason(matcher.get_error())
        grammar = _Grammar(matcher, self._tokens, self._rests, self._vocab_size)
        first = np.zeros((1, self._vocab_size // 32 + 1), dtype=np.int32)
        # Without the white space before: it may lead to nothing.
        bare = llguidance.LLMatcher(
            self._tokens, _lark(response_format, thinking, space=False), log_level=0, limits=limits
        )
        llguidance.numpy.fill_next_token_bitmask(bare, first)
        if (first & self._texts).any():
            return grammar
        if bare.is_accepting():
            return "only an empty completion is valid"
        if thinking and response_format.kind is FormatKind.REGEX:
            return "no completion after </think>, where white space is dropped, can be valid"
        return "no completion can be valid"

    def _bits(self, ids: frozenset[int]) -> Words:
        """[W] with the bits of ids."""
        return _packed([i in ids for i in range(self._vocab_size + 1)])

    @functools.cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(num_threads=self._num_threads)

    @functools.cached_property
    def _output_bytes(self) -> list[bytes]:
        return self._tokenizer.output_bytes(self._vocab_size)

    @functools.cached_property
    def _texts(self) -> Words:
        """[W] with the bits of tokens that add to the text: neither special nor padding."""
        return _packed([bool(data) for data in self._output_bytes] + [False])

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._output_bytes))
        return llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size + 1)

    @functools.cached_property
    def _rests(self) -> list[dict[int, bytes]]:
        """For each number of bytes of ``</think>`` that are there already: the tokens that complete
        it, with the bytes behind it where there are some."""
        last = CLOSE[-1:]
        ending = [(i, data) for i, data in enumerate(self._output_bytes) if last in data]
        rests: list[dict[int, bytes]] = []
        for begun in range(len(CLOSE)):
            found = {i: (CLOSE[:begun] + data).partition(CLOSE)[2] for i, data in ending}
            rests.append({i: rest for i, rest in found.items() if rest})
        return rests


class _Grammar:
    """A compiled format, with a matcher at its beginning to be copied."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        tokens: llguidance.LLTokenizer,
        rests: list[dict[int, bytes]],
        vocab_size: int,
    ) -> None:
        self.matcher = matcher
        self.tokens = tokens
        self.may_close = functools.cache(self._may_close)
        self._rests = rests
        self._num_bits = vocab_size + 1

    def _may_close(self, begun: int) -> Words:
        """[W] with a bit for every token that may follow a reasoning which ends in so many bytes
        of ``</think>``: all but those that complete it and go on as the grammar cannot."""
        refused = set()
        for token_id, rest in self._rests[begun].items():
            ids = self.tokens.tokenize_bytes(rest)
            if self.matcher.deep_copy().validate_tokens(ids) < len(ids):
                refused.add(token_id)
        return _packed([i not in refused for i in range(self._num_bits)])


class _Vocabulary:
    """The tokens as llguidance asks for them. Its end token is one of its own, behind the model's
    vocabulary: which tokens may end a row differs from row to row, and is decided here."""

    def __init__(self, tokenizer: Tokenizer, output_bytes: Sequence[bytes]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [*output_bytes, b""]
        self.eos_token_id = len(output_bytes)
        self.bos_token_id = None
        self.special_token_ids = [i for i, data in enumerate(self.tokens) if not data]

    def __call__(self, text: str) -> list[int]:
        """Ids of a plain text; it is probed with bytes, too, which it has to refuse."""
        return self._tokenizer.encode_plain(text)


def _lark(response_format: ResponseFormat, thinking: bool, *, space: bool = True) -> str:
    """The grammar of a completion, in llguidance's dialect of Lark."""
    text = response_format.text
    before = f"/({_SPACE})?/" if thinking and space else ""
    match response_format.kind:
        case FormatKind.JSON_SCHEMA:
            schema = {**json.loads(text), "x-guidance": {"whitespace_pattern": _JSON_SPACE}}
            start = "SPACE? body" if before else "body"
            return f"start: {start}\nSPACE: /{_SPACE}/\nbody: %json {json.dumps(schema)}\n"
        case FormatKind.CHOICE:
            body = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        case FormatKind.REGEX:
            # The pattern in full: its alternatives must not take in what stands beside it.
            body = f"/{llguidance.regex_to_lark(text, '')}/"
            if thinking:
                body += f" & /{_NO_SPACE_FIRST}/"
    return f"start: TEXT\nTEXT: {before} BODY\nBODY: {body}\n"


def _packed(bits: Sequence[bool]) -> Words:
    """[W] int32, the lowest bit first."""
    padded = np.zeros(-(-len(bits) // 32) * 32, dtype=np.uint8)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view("<i4").astype(np.int32)


def _reason(error: str) -> str:
    """The part of an error of llguidance that says what is wrong, in one line."""
    lines = [line.strip() for line in error.splitlines()]
    said = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    said = _WHERE.sub("", said.rpartition("(in regex): ")[2])
    if said.startswith("oneOf"):
        return "oneOf is supported only where its options exclude one another; write anyOf"
    return said[:240]

"""Draws the next token of each sequence of a batch from its logits.

Random numbers are counter-based: the one of a token depends on (seed, sample, position) alone, on
every device, whatever else is in the batch. They are used by inverting the distribution in the
order of the token ids, so that near ties between probabilities cannot reorder anything.

Letters: L rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchrun.engine.params import SamplingParams
from batchrun.model.transfer import Arriving, to_device

_BLOCK = 256
"""Tokens that are summed up before one is looked for."""
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def stream_key(seed: int, sample: int) -> int:
    """The 64-bit key of a sample's random numbers, as a signed integer."""
    key = _mix_int(_mix_int((seed + _GOLDEN) & _MASK64) + (sample + 1) * _GOLDEN)
    return _signed(key)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Random numbers: keys [L] int64, positions [L] int64 -> [L] float64 in [0, 1).

    SplitMix64's mixing of key + (position + 1) * golden ratio, in wrapping int64 arithmetic.
    """
    x = keys + (positions + 1) * _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    x = x ^ _shift(x, 31)
    return _shift(x, 11).to(torch.float64) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Needs:
    """What some row of a batch needs; what none needs is not computed.

    ``drawing`` are the rows that are not greedy; ``banned`` are (row, token ids that it may not
    take yet). ``allowed`` are rows [R] int64 that may take some tokens only, with a bit for each of
    these, the lowest first: [R, W] int32 of at least V bits.
    """

    drawing: AnySequence[int] = ()
    filtering: bool = False
    penalty: bool = False
    logprobs: bool = False
    banned: tuple[tuple[int, AnySequence[int]], ...] = ()
    allowed: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token a row: ids, whether all its logits were finite, log-probability if asked for."""

    token_ids: list[int]
    finite: list[bool]
    logprobs: list[float] | None


class Sampling:
    """A token for each row, drawn on the device and on its way to the host.

    ``ids`` [L] int64 are on the device.
    """

    __slots__ = ("_columns", "ids")

    def __init__(self, ids: Tensor, columns: list[Tensor]) -> None:
        self.ids = ids
        # One copy to the host a step. Ids are exact in float64.
        self._columns = Arriving(torch.stack([ids.double(), *columns]))

    def wait(self) -> Sampled:
        """What was sampled, once the host has it."""
        token_ids, finite, *logprobs = self._columns.wait().tolist()
        return Sampled(
            [int(i) for i in token_ids], [f != 0 for f in finite], logprobs[0] if logprobs else None
        )


class Sampler:
    """Keeps each slot's sampling parameters on the device, so that a step only gathers them."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._keys = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._top_k = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # [slots, 4] float32: temperature, top_p, min_p, repetition penalty
        self._numbers = torch.ones(num_slots, 4, device=device)
        self._bit_places = torch.arange(8, dtype=torch.uint8, device=device)
        self._seen: Tensor | None = None  # [slots, V] bool, once a request has a penalty

    def admit(self, slot: int, params: SamplingParams, key: int, tokens: AnySequence[int]) -> None:
        """Set up a slot. ``key`` is of :func:`stream_key`; ``tokens`` is the prompt."""
        self._keys[slot] = key
        self._top_k[slot] = params.top_k if params.top_k > 0 else self._vocab_size
        temperature = 1.0 if params.greedy else params.temperature
        numbers = [temperature, params.top_p, params.min_p, params.repetition_penalty]
        self._numbers[slot] = to_device(numbers, self._device, torch.float32)
        if params.repetition_penalty != 1.0 and self._seen is None:
            shape = (len(self._keys), self._vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        if self._seen is not None:
            self._seen[slot] = False
            self.observe(slot, tokens)

    def observe(self, slot: int, tokens: AnySequence[int]) -> None:
        """Note tokens that were not sampled here (prompt, forced) for the repetition penalty."""
        if self._seen is not None and tokens:
            self._seen[slot, to_device(tokens, self._device)] = True

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor, needs: Needs) -> Sampling:
        """One token a row.

        logits [L, V] float32, slots [L] int64, positions [L] int64 (tokens sampled before).
        Leaves the logits as they are.
        """
        adjusted = self._adjust(logits, slots, needs)
        ids = _argmax(adjusted)  # [L]
        if needs.drawing:
            drawing = to_device(needs.drawing, self._device)  # [R] of the L rows
            rows = slots[drawing]
            drawn = adjusted if len(drawing) == len(logits) else adjusted[drawing]  # [R, V]
            probs = torch.softmax(drawn / self._numbers[rows, 0, None], dim=-1)
            if needs.filtering:
                probs = self._cut(probs, rows)
            ids[drawing] = _invert(probs, uniform(self._keys[rows], positions[drawing]))
        if self._seen is not None:
            self._seen[slots, ids] = True
        columns = [torch.isfinite(logits.sum(dim=-1)).double()]
        if needs.logprobs:
            chosen = logits.gather(1, ids[:, None]).squeeze(1)  # [L]
            columns.append((chosen - torch.logsumexp(logits, dim=-1)).double())
        return Sampling(ids, columns)

    def _adjust(self, logits: Tensor, slots: Tensor, needs: Needs) -> Tensor:
        """Repetition penalty, and tokens that may not come: [L, V] -> [L, V]."""
        if needs.penalty and self._seen is not None:
            penalty = self._numbers[slots, 3, None]  # [L, 1]
            weakened = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen[slots], weakened, logits)
        elif needs.banned or needs.allowed is not None:
            logits = logits.clone()
        if needs.banned:
            banned = [(row, token_id) for row, ids in needs.banned for token_id in ids]
            rows, ids = to_device(banned, self._device).unbind(1)
            logits[rows, ids] = -torch.inf
        if needs.allowed is not None:
            bound, words = needs.allowed
            octets = words.view(torch.uint8)  # [R, 4 W]
            bits = (octets[:, :, None] >> self._bit_places) & 1  # [R, 4 W, 8]
            refused = bits.flatten(1)[:, : self._vocab_size] == 0  # [R, V]
            logits[bound] = logits[bound].masked_fill_(refused, -torch.inf)
        return logits

    def _cut(self, probs: Tensor, rows: Tensor) -> Tensor:
        """Set to 0 what min_p, top_k and top_p cut off, in this order: [R, V] -> [R, V].

        Each looks at what the ones before left. What is cut is found as a threshold on the
        probability, so that equal probabilities share their fate.
        """
        _, top_p, min_p, _ = self._numbers[rows].double().unbind(1)  # [R] each
        ordered = _descending(probs).double()  # [R, V]
        rank = torch.arange(ordered.shape[1], device=ordered.device)
        kept = (ordered >= min_p[:, None] * ordered[:, :1]) & (rank < self._top_k[rows, None])
        share = torch.where(kept, ordered, 0.0)
        share = share / share.sum(dim=-1, keepdim=True)
        before = share.cumsum(dim=-1) - share  # what the likelier ones have together
        kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1.0)
        kept[:, 0] = True
        last = kept.sum(dim=-1, keepdim=True) - 1  # kept is a prefix of the order
        threshold = ordered.gather(1, last)  # [R, 1]
        return torch.where(probs >= threshold, probs, 0.0)


def _argmax(x: Tensor) -> Tensor:
    """The first of the largest values of each row.

    On a CPU by numpy, many times faster than torch over rows as long as a vocabulary.
    """
    if x.device.type != "cpu":
        return x.argmax(dim=-1)
    return torch.from_numpy(x.numpy().argmax(axis=-1))


def _descending(x: Tensor) -> Tensor:
    """The values of each row, the largest first.

    On a CPU by numpy, which sorts bare values many times faster than torch sorts them with places.
    """
    if x.device.type != "cpu":
        return x.sort(dim=-1, descending=True).values
    return torch.from_numpy(-np.sort(-x.numpy(), axis=-1))


def _invert(probs: Tensor, u: Tensor) -> Tensor:
    """The token at which the summed probabilities, in order of ids, pass u: [R, V], [R] -> [R].

    First the block of tokens in which they do, then the token in it, so that of most only sums are
    needed. A block without probability is never found, nor a token.
    """
    num_rows, vocab_size = probs.shape
    num_whole = vocab_size // _BLOCK
    whole = probs[:, : num_whole * _BLOCK].view(num_rows, num_whole, _BLOCK)
    rest = probs[:, num_whole * _BLOCK :].sum(dim=-1, keepdim=True)
    blocks = torch.cat([whole.sum(dim=-1), rest], dim=1).double()  # [R, blocks]
    block, share = _pass(blocks, u)
    tokens = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=probs.device)  # [R, _BLOCK]
    inside = probs.gather(1, tokens.clamp(max=vocab_size - 1)).double()
    inside.masked_fill_(tokens >= vocab_size, 0)
    place, _ = _pass(inside, share)
    return block * _BLOCK + place


def _pass(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sums of float64 weights pass a share u of them all: [R, n], [R] -> [R].

    And how far into the weight that is found, as a share of it in [0, 1].
    """
    summed = weights.cumsum(dim=-1)
    total = summed[:, -1:]
    # Never the total itself, which rounding may give: no weight passes it.
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(summed, target, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, place)
    into = (target - (summed.gather(1, place) - weight)) / weight
    return place.squeeze(1), into.clamp_(0, 1).squeeze(1)


def _mix_int(x: int) -> int:
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int64 of the same bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; int64's own one repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

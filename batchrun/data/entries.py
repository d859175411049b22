"""Records of the journal as lines of JSON. What cannot be read is no record, never an error."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchrun.records import Completion, FinishReason, Generated, ToolCall
from batchrun.scores import Verdict


@dataclass(frozen=True, slots=True)
class Running:
    """What a sample that still runs has sampled since its record before.

    ``at`` tokens of it are known from earlier records of the same attempt; ``generated`` holds
    those after them (``closed_after`` counts from the first token of all). The first record of an
    attempt has ``at == 0``, also where the attempt went on from what another one had sampled.
    """

    ordinal: int
    sample: int
    at: int
    generated: Generated


def write_finished(completion: Completion) -> bytes:
    """A finished sample as a line."""
    record: dict[str, object] = {
        "kind": "finished",
        "ordinal": completion.ordinal,
        "sample": completion.sample,
        "id": completion.id,
        "completion": completion.completion,
        "reasoning": completion.reasoning,
        "finish_reason": completion.finish_reason.value,
        "tokens": [
            completion.prompt_tokens,
            completion.reasoning_tokens,
            completion.completion_tokens,
        ],
        "thinking_budget_hit": completion.thinking_budget_hit,
    }
    if completion.error is not None:
        record["error"] = completion.error
    if completion.logprobs is not None:
        record["logprobs"] = list(completion.logprobs)
    if completion.tool_calls is not None:
        record["tool_calls"] = [[call.name, call.arguments] for call in completion.tool_calls]
    if completion.verdict is not None:
        record["verdict"] = [completion.verdict.correct, completion.verdict.answer]
    if completion.generated is not None:
        record["generated"] = _pack(completion.generated)
    return _line(record)


def write_running(running: Running) -> bytes:
    """What a running sample has sampled on, as a line."""
    return _line(
        {
            "kind": "running",
            "ordinal": running.ordinal,
            "sample": running.sample,
            "at": running.at,
            "generated": _pack(running.generated),
        }
    )


def read_entry(line: bytes) -> Completion | Running | None:
    """The record on a line, with every value checked; None where there is no sound one."""
    try:
        record = json.loads(line.decode("utf-8", "surrogatepass"))
        match record["kind"]:
            case "finished":
                return _finished(record)
            case "running":
                return _running(record)
            case _:
                return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _line(record: object) -> bytes:
    # Half a surrogate pair is kept as it is: what is read is what was written.
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _finished(raw: dict[str, Any]) -> Completion:
    prompt_tokens, reasoning_tokens, completion_tokens = map(_count, raw["tokens"])
    error = _text(raw.get("error"))
    reason = FinishReason(raw["finish_reason"])
    completion, reasoning = _text(raw["completion"]), _text(raw["reasoning"])
    is_error = reason is FinishReason.ERROR
    if is_error != (error is not None) or is_error != (completion is None):
        raise ValueError("an error has no text, and everything else has one")
    logprobs = raw.get("logprobs")
    calls = raw.get("tool_calls")
    verdict = raw.get("verdict")
    generated = raw.get("generated")
    return Completion(
        ordinal=_count(raw["ordinal"]),
        sample=_count(raw["sample"]),
        id=_string(raw["id"]),
        completion=completion,
        reasoning=reasoning,
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        reasoning_tokens=reasoning_tokens,
        completion_tokens=completion_tokens,
        thinking_budget_hit=_switch(raw["thinking_budget_hit"]),
        error=error,
        logprobs=None if logprobs is None else tuple(map(_number, logprobs)),
        verdict=None if verdict is None else _verdict(verdict),
        generated=None if generated is None else _unpack(generated),
        tool_calls=None if calls is None else tuple(map(_call, calls)),
    )


def _running(raw: dict[str, Any]) -> Running:
    at, generated = _count(raw["at"]), _unpack(raw["generated"])
    closed_after = generated.closed_after
    if closed_after is not None and closed_after > at + len(generated.token_ids):
        raise ValueError("closed after a token that was not sampled")
    return Running(_count(raw["ordinal"]), _count(raw["sample"]), at, generated)


def _pack(generated: Generated) -> dict[str, object]:
    packed: dict[str, object] = {"token_ids": _encode(generated.token_ids, "<u4")}
    if generated.logprobs is not None:
        packed["logprobs"] = _encode(generated.logprobs, "<f8")
    if generated.closed_after is not None:
        packed["closed_after"] = generated.closed_after
    return packed


def _unpack(raw: dict[str, Any]) -> Generated:
    token_ids = tuple(_decode(raw["token_ids"], "<u4"))
    logprobs = raw.get("logprobs")
    closed_after = raw.get("closed_after")
    values = None if logprobs is None else tuple(_decode(logprobs, "<f8"))
    if values is not None and len(values) != len(token_ids):
        raise ValueError("a token without its log-probability")
    return Generated(token_ids, values, None if closed_after is None else _count(closed_after))


def _encode(values: tuple[int, ...] | tuple[float, ...], kind: str) -> str:
    return base64.b64encode(np.asarray(values, kind).tobytes()).decode()


def _decode(text: object, kind: str) -> list[Any]:
    data = base64.b64decode(_string(text), validate=True)
    return list(np.frombuffer(data, kind).tolist())


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _text(value: object) -> str | None:
    return None if value is None else _string(value)


def _number(value: object) -> float | None:
    if value is None:
        return None
    if type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    raise ValueError(f"{value!r} is no number")


def _verdict(raw: list[Any]) -> Verdict:
    correct, answer = raw
    return Verdict(None if correct is None else _switch(correct), _text(answer))


def _call(raw: list[Any]) -> ToolCall:
    name, arguments = raw
    return ToolCall(_string(name), _string(arguments))

"""The engine as a library: ``batchrun.LLM``, in the manner of vLLM's."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchrun.data.checkpoints import find_checkpoint
from batchrun.engine.chat import EncodedPrompt, PromptError
from batchrun.engine.engine import Engine
from batchrun.engine.options import EngineOptions
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Output, Request, Timings
from batchrun.engine.tokenizer import Tokenizer
from batchrun.errors import CheckpointError, RequestError
from batchrun.records import FinishReason, Message, ToolCall
from batchrun.tools import as_call, parse_calls, tool_problems
from batchrun.wording import dotted

Prompt = str | Sequence[int] | Mapping[str, object]
"""A text, token ids, or ``{"prompt": text}`` / ``{"prompt_token_ids": ids}`` as in vLLM."""
Conversation = Sequence[Mapping[str, object] | Message]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample. ``text`` is always a string; ``error`` says what failed, if anything did.

    ``tool_calls`` are the functions that the model calls, of a chat with ``tools``; ``text`` is
    what stands around them.

    ``token_ids`` are all tokens after the prompt, with those that were forced, whose ``logprobs``
    are None and which neither count takes in.
    """

    index: int
    text: str
    reasoning: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float | None] | None
    num_reasoning_tokens: int
    num_completion_tokens: int
    thinking_budget_hit: bool
    error: str | None = None
    tool_calls: list[ToolCall] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its samples. ``prompt`` is None where it was given as token ids."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: Timings


class LLM:
    """A model loaded to generate with.

    >>> llm = LLM("tiny")
    >>> out = llm.chat([{"role": "user", "content": "What is 3+4?"}], SamplingParams(temperature=0))
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        quantization: str = "none",
        state_dtype: str = "auto",
        kv_dtype: str = "auto",
        max_model_len: int | None = None,
        max_sequences: int | str | None = "auto",
        storage_options: Mapping[str, object] | None = None,
        deterministic: bool = False,
        device: str = "auto",
    ) -> None:
        """Load ``model``: a folder, a URL (read with ``storage_options``) or ``tiny``.

        The keys are those of a job's ``model:``; with ``deterministic`` a prompt's samples are
        equal to the byte whatever else is generated beside it.

        :raises CheckpointError: the checkpoint cannot be used.
        :raises RequestError: an option has a value that cannot be, or is not available yet.
        """
        options = EngineOptions(
            dtype=dtype,
            state_dtype=state_dtype,
            quantization=quantization,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
            max_sequences=_max_sequences(max_sequences),
            deterministic=deterministic,
            device=device,
        )
        self.engine = Engine.load(find_checkpoint(str(model), storage_options), options)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        :raises CheckpointError: it has none; such a model takes and gives token ids.
        """
        if self.engine.tokenizer is None:
            raise CheckpointError(
                "the checkpoint has no tokenizer.json, so it takes only token ids",
                "copy the tokenizer's files from where the model came",
            )
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; a list of ids or a text alone is one prompt.

        A prompt that ends in ``<think>`` is continued with reasoning.

        :returns: one output a prompt, in their order.
        :raises RequestError: a prompt is empty, not Unicode or too long, or a response format
            cannot be used (a ``ValueError``).
        """
        encoded = [self._encode(number, p) for number, p in enumerate(_as_prompts(prompts))]
        return self._run(encoded, sampling_params)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        reasoning: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation or each of several; ``reasoning`` wins over words in them.

        ``tools`` are the functions that the model may call, as in ``generation.tools`` of a job.

        :returns: one output a conversation, in their order.
        :raises CheckpointError: the checkpoint has no chat template.
        :raises RequestError: a conversation cannot be rendered or is too long, a tool is no
            function schema, or a response format cannot be used.
        """
        chat = self.engine.chat
        if chat is None:
            raise CheckpointError(
                "the checkpoint has no chat template, so it takes only prompts",
                "use generate(), or copy the tokenizer's files from where the model came",
            )
        functions = _functions(tools)
        encoded: list[tuple[str | None, EncodedPrompt]] = []
        for number, conversation in enumerate(_as_conversations(messages)):
            turns = [_message(turn) for turn in conversation]
            try:
                prompt = chat.encode(turns, reasoning=reasoning, tools=functions)
            except PromptError as error:
                raise RequestError(f"conversation {number}: {error.message}") from error
            encoded.append((prompt.text, prompt))
        outputs = self._run(encoded, sampling_params)
        return [_with_calls(output) for output in outputs] if functions else outputs

    def _encode(self, number: int, prompt: Prompt) -> tuple[str | None, EncodedPrompt]:
        """The text, if it was given as one, and the ids; thinking where it ends in ``<think>``."""
        if isinstance(prompt, Mapping):
            inner = prompt.get("prompt_token_ids", prompt.get("prompt"))
            if not isinstance(inner, str | Sequence):
                raise RequestError(f"prompt {number}: needs a prompt or prompt_token_ids")
            prompt = inner
        if isinstance(prompt, str):
            try:
                ids = self.tokenizer.encode(prompt)
            except ValueError as error:
                raise RequestError(
                    f"prompt {number} holds lone surrogates, so it is not Unicode"
                ) from error
            return prompt, EncodedPrompt(tuple(ids), _is_open(prompt), prompt)
        if not _is_list(prompt):
            kind = type(prompt).__name__
            raise RequestError(f"prompt {number}: expected a text or token ids, not {kind}")
        ids = list(prompt)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise RequestError(f"prompt {number}: expected a text or token ids")
        outside = [i for i in ids if not 0 <= i < self.engine.config.vocab_size]
        if outside:
            raise RequestError(
                f"prompt {number}: token id {outside[0]} is outside the model's vocabulary of "
                f"{self.engine.config.vocab_size}"
            )
        tail = "" if self.engine.tokenizer is None else self.engine.tokenizer.decode(ids[-16:])
        return None, EncodedPrompt(tuple(ids), _is_open(tail), tail)

    def _run(
        self,
        prompts: Sequence[tuple[str | None, EncodedPrompt]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        params = _one_each(sampling_params, len(prompts))
        for number, ((_, prompt), own) in enumerate(zip(prompts, params, strict=True)):
            error = self.engine.admission_error(
                len(prompt.token_ids), own, thinking=prompt.thinking
            )
            if error is not None:
                raise RequestError(f"prompt {number}: {error.message}")
        # Keys of this call alone, so that whatever else the engine holds is not touched.
        call = object()
        finished: dict[Hashable, list[Output]] = {(call, i): [] for i in range(len(prompts))}
        try:
            for key, (_, prompt), own in zip(finished, prompts, params, strict=True):
                for sample in range(own.n):
                    self.engine.add(
                        Request(
                            key=key,
                            prompt_token_ids=prompt.token_ids,
                            params=own,
                            seed=own.seed or 0,
                            sample=sample,
                            thinking=prompt.thinking,
                        )
                    )
            num_left = sum(own.n for own in params)
            while num_left:
                for output in self.engine.step():
                    if output.key in finished:
                        finished[output.key].append(output)
                        num_left -= 1
        except BaseException:
            for key in finished:
                self.engine.abort(key)
            raise
        return [
            RequestOutput(
                prompt=text,
                prompt_token_ids=list(prompt.token_ids),
                outputs=[_completion(o) for o in sorted(samples, key=lambda o: o.sample)],
                metrics=max((o.timings for o in samples), key=lambda t: t.total_s),
            )
            for samples, (text, prompt) in zip(finished.values(), prompts, strict=True)
        ]


def _completion(output: Output) -> CompletionOutput:
    return CompletionOutput(
        index=output.sample,
        text=output.text,
        reasoning=output.reasoning,
        token_ids=list(output.token_ids),
        finish_reason=output.finish_reason,
        logprobs=None if output.logprobs is None else list(output.logprobs),
        num_reasoning_tokens=output.num_reasoning_tokens,
        num_completion_tokens=output.num_completion_tokens,
        thinking_budget_hit=output.thinking_budget_hit,
        error=None if output.error is None else str(output.error),
    )


def _functions(tools: Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]]:
    if tools is None:
        return ()
    if not _is_list(tools):
        raise RequestError(f"tools must be a list of function schemas, not {type(tools).__name__}")
    for problem in tool_problems(tools):
        raise RequestError(f"{dotted(('tools', *problem.key))} {problem.message}", problem.hint)
    return tools


def _with_calls(output: RequestOutput) -> RequestOutput:
    """The output with the tool calls of each sample taken out of its text."""
    samples = []
    for sample in output.outputs:
        reply = parse_calls(sample.text)
        if reply.calls is not None:
            sample = replace(
                sample,
                text=reply.text,
                tool_calls=list(reply.calls),
                finish_reason=FinishReason.TOOL_CALLS,
            )
        samples.append(sample)
    return replace(output, outputs=samples)


def _is_open(text: str) -> bool:
    return text.rstrip().endswith("<think>")


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a list; a text, a mapping or a list of ids alone is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be a list, not {type(prompts).__name__}")
    several: list[Prompt] = []
    ids: list[int] = []
    for item in prompts:
        if isinstance(item, int):
            ids.append(item)
        else:
            several.append(item)
    if ids and several:
        raise RequestError("prompts are token ids of one prompt or a list of prompts, not both")
    return [ids] if ids else several


def _as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """The conversations as a list; messages alone are one conversation."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise RequestError(f"chat takes a list of messages, not {type(messages).__name__}")
    turns: list[Mapping[str, object] | Message] = []
    several: list[Conversation] = []
    for item in messages:
        if isinstance(item, Mapping | Message):
            turns.append(item)
        elif _is_list(item):
            several.append(item)
        else:
            raise RequestError(f"chat takes messages, not {type(item).__name__}")
    if turns and several:
        raise RequestError("chat takes one conversation or a list of conversations, not both")
    return [turns] if turns else several


def _is_list(value: object) -> bool:
    """Whether it is a sequence of items; a text and bytes are one only to the letter."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _message(message: object) -> Message:
    """A message from a dictionary; a content of several text parts is joined by line breaks."""
    if isinstance(message, Message):
        return message
    turn = message if isinstance(message, Mapping) else {}
    role, content = turn.get("role"), turn.get("content")
    calls = _calls(turn.get("tool_calls"))
    if calls and role != "assistant":
        raise RequestError("only an assistant message can have tool_calls")
    if content is None and calls:
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "\n".join(map(_text_of, content))
    if not isinstance(role, str) or not isinstance(content, str):
        raise RequestError(f"a message needs a role and a content, both texts, not {message!r}")
    return Message(role, content, calls)


def _calls(value: object) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RequestError("tool_calls must be a list")
    try:
        return tuple(as_call(item) for item in value)
    except ValueError as error:
        raise RequestError(f"tool_calls: {error}") from error


def _text_of(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise RequestError(f"a content may have parts of text only, not {part!r}")
    return text


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if not _is_list(params) or not all(isinstance(own, SamplingParams) for own in params):
        raise RequestError("sampling_params must be a SamplingParams or a list of them")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts")
    return list(params)


def _max_sequences(value: int | str | None) -> int | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, str):
        raise RequestError(f"max_sequences must be auto or a whole number, not {value!r}")
    return value

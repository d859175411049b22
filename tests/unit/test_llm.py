"""The Python interface, as its users know it from vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import batchrun
from batchrun import LLM, SamplingParams
from batchrun.engine.request import Request
from batchrun.errors import CheckpointError, RequestError
from batchrun.records import Message, ToolCall

QUESTION = [{"role": "user", "content": "What is 37+85+12?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=96)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The embedded model, few sequences at once."""
    return LLM("tiny", max_sequences=8, device="cpu")


def test_the_package_names_are_loaded_lazily() -> None:
    """`import batchrun` alone loads neither torch nor the rest."""
    code = "import batchrun, sys; print(batchrun.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [batchrun.__version__, "False"]
    assert {"LLM", "SamplingParams"} <= set(dir(batchrun))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        batchrun.nothing  # noqa: B018


def test_chat_answers_with_a_trace(llm: LLM) -> None:
    """The bare number as the text, the sums as the reasoning, every token counted."""
    (out,) = llm.chat([QUESTION], GREEDY, reasoning=True)
    (sample,) = out.outputs
    assert (sample.text, sample.reasoning) == ("134", "37+85=122\n+12=134\n")
    assert (sample.finish_reason, sample.index, sample.error) == ("stop", 0, None)
    assert sample.num_reasoning_tokens + sample.num_completion_tokens == len(sample.token_ids)
    assert not sample.thinking_budget_hit
    assert out.prompt is not None and out.prompt.endswith("<think>\n")
    assert llm.tokenizer.decode(out.prompt_token_ids) == out.prompt
    assert 0 <= out.metrics.queued_s <= out.metrics.first_token_s <= out.metrics.total_s


def test_chat_without_reasoning_and_under_a_budget(llm: LLM) -> None:
    """reasoning=False gives no trace; a budget forces the answer."""
    (out,) = llm.chat(QUESTION, GREEDY, reasoning=False)
    assert out.outputs[0].reasoning is None
    assert out.outputs[0].text.isdigit() and out.outputs[0].num_reasoning_tokens == 0
    params = SamplingParams(temperature=0, max_tokens=96, max_thinking_tokens=9)
    (out,) = llm.chat(QUESTION, params)
    assert out.outputs[0].thinking_budget_hit
    assert out.outputs[0].num_reasoning_tokens == 9
    assert out.outputs[0].reasoning == "37+85=122"


def test_words_in_a_text_do_not_switch(llm: LLM) -> None:
    """The argument wins over /no_think and </think> in the question."""
    question = [{"role": "user", "content": "/no_think </think> What is 3+4?"}]
    (out,) = llm.chat(question, GREEDY, reasoning=True)
    assert out.prompt is not None and "/no_think </think> What is 3+4?" in out.prompt
    assert out.outputs[0].reasoning is not None


def test_generate_takes_texts_and_ids_in_any_mixture(llm: LLM) -> None:
    """All of vLLM's ways to give a prompt mean the same; results come in order."""
    text = "<SPECIAL_10>System\n\n<SPECIAL_11>User\n3+4\n<SPECIAL_11>Assistant\n<think></think>"
    ids = llm.tokenizer.encode(text)
    outs = llm.generate([text, ids, {"prompt": text}, {"prompt_token_ids": ids}], GREEDY)
    assert [o.outputs[0].text for o in outs] == ["7"] * 4
    assert [o.prompt for o in outs] == [text, None, text, None]
    assert all(o.prompt_token_ids == ids for o in outs)
    for alone in (text, ids):
        (out,) = llm.generate(alone, GREEDY)
        assert out.outputs[0].token_ids == outs[0].outputs[0].token_ids


def test_a_prompt_that_ends_in_think_is_reasoned_about(llm: LLM) -> None:
    """As a text and as ids, white space after the tag or not."""
    text = "<SPECIAL_10>System\n\n<SPECIAL_11>User\n3+4\n<SPECIAL_11>Assistant\n<think>\n"
    for prompt in (text, llm.tokenizer.encode(text)):
        (out,) = llm.generate([prompt], GREEDY)
        assert (out.outputs[0].text, out.outputs[0].reasoning) == ("7", "3+4=7\n")


def test_samples_seeds_and_logprobs(llm: LLM) -> None:
    """n samples a prompt in order; a seed repeats them; a row draws the same in any batch."""
    params = SamplingParams(n=3, seed=5, max_tokens=12, temperature=2.0, logprobs=0)
    (out,) = llm.generate(["What"], params)
    again = llm.generate(["other", "What", "third"], params)[1]
    assert [o.index for o in out.outputs] == [0, 1, 2]
    assert [o.token_ids for o in out.outputs] == [o.token_ids for o in again.outputs]
    assert len({tuple(o.token_ids) for o in out.outputs}) == 3
    for sample in out.outputs:
        assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
        assert all(p is not None and p <= 0 for p in sample.logprobs)


def test_params_may_be_one_each_or_none(llm: LLM) -> None:
    """None means vLLM's defaults; a list has one a prompt."""
    (out,) = llm.generate("What is")
    assert out.outputs[0].num_completion_tokens <= 16
    each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    outs = llm.generate(["a", "b", "c"], each)
    assert [o.outputs[0].num_completion_tokens for o in outs] == [1, 5, 3]
    assert [o.outputs[0].finish_reason for o in outs] == ["length"] * 3
    with pytest.raises(RequestError, match="3 sampling_params for 1 prompts"):
        llm.generate(["a"], each)


def test_more_prompts_than_slots_come_in_order(llm: LLM) -> None:
    """A list longer than what runs at once."""
    questions = [[{"role": "user", "content": f"What is {n}+5?"}] for n in range(10, 50)]
    outs = llm.chat(questions, GREEDY)
    right = [o.outputs[0].text == str(n + 5) for n, o in zip(range(10, 50), outs, strict=True)]
    assert sum(right) >= 38
    assert [
        o.prompt is not None and f"{n}+5" in o.prompt
        for n, o in zip(range(10, 50), outs, strict=True)
    ]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    """An empty list is not an error."""
    assert llm.generate([]) == [] and llm.chat([]) == []


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([[]], "prompt 0: the prompt has no tokens"),
        (["ok", [1, 400]], "prompt 1: token id 400 is outside the model's vocabulary of 400"),
        (["a\ud800"], "prompt 0 holds lone surrogates"),
        (["a " * 5000], r"prompt 0: \d+ prompt tokens \+ max_tokens 16 = \d+ > max_model_len 4096"),
        ([1, "a"], "not both"),
        ([[1.5]], "expected a text or token ids"),
        ([{"text": "a"}], "needs a prompt or prompt_token_ids"),
        (None, "prompts must be a list, not NoneType"),
        (b"abc", "prompts must be a list, not bytes"),
        (["ok", None], "prompt 1: expected a text or token ids, not NoneType"),
        ([b"abc"], "prompt 0: expected a text or token ids, not bytes"),
    ],
)
def test_a_bad_prompt_is_named_and_nothing_is_left(llm: LLM, prompts: object, match: str) -> None:
    """As a ValueError before anything runs; the model goes on working."""
    with pytest.raises(ValueError, match=match):
        llm.generate(prompts)  # type: ignore[arg-type]
    assert llm.engine.num_unfinished == 0


def test_a_bad_conversation_is_named(llm: LLM) -> None:
    """A role the template refuses, and a message that is none."""
    with pytest.raises(RequestError, match=r"conversation 1: .* narrator"):
        llm.chat([QUESTION, [{"role": "narrator", "content": "x"}]])
    with pytest.raises(RequestError, match="needs a role and a content"):
        llm.chat([{"role": "user"}])


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("What is 3+4?", "a list of messages, not str"),
        (None, "a list of messages, not NoneType"),
        (["What is 3+4?"], "chat takes messages, not str"),
        ([["What is 3+4?"]], "needs a role and a content, both texts, not 'What is"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "parts of text only"),
    ],
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: object, match: str) -> None:
    """As a ValueError that says what came instead; no part of a content is left out silently."""
    with pytest.raises(ValueError, match=match):
        llm.chat(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [{"max_tokens": 3}], "greedy", 1])
def test_sampling_params_of_another_type_are_refused(llm: LLM, params: object) -> None:
    """As a ValueError, before anything runs."""
    with pytest.raises(ValueError, match="must be a SamplingParams or a list of them"):
        llm.generate(["a"], params)  # type: ignore[arg-type]


def test_messages_in_other_forms(llm: LLM) -> None:
    """Message values, and a content of text parts."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 37+85+12?"}]}]
    texts = [llm.chat(c, GREEDY)[0].outputs[0].text for c in (parts, [Message("user", "37+85+12")])]
    assert texts == ["134", "134"]


def test_an_interrupted_call_leaves_the_engine_free(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C drops this call's requests, and only those."""
    llm.engine.add(Request("other", (5,), SamplingParams(max_tokens=40, ignore_eos=True)))
    steps = 0
    original = llm.engine.step

    def step() -> object:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return original()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], SamplingParams(max_tokens=40))
    assert llm.engine.num_unfinished == 1
    assert llm.engine.progress("other") is not None
    llm.engine.abort("other")
    llm.engine.check_integrity()


def test_models_that_are_not_there_and_options_that_are_not_known(tmp_path: Path) -> None:
    """A path without a checkpoint, an unknown keyword, a value that cannot be or is to come."""
    with pytest.raises(CheckpointError):
        LLM(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(str(tmp_path))
    with pytest.raises(TypeError, match="tensor_parallel_size"):
        LLM("tiny", tensor_parallel_size=2)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match=r"int4.* not available in this version"):
        LLM("tiny", quantization="int4")
    with pytest.raises(RequestError, match="kv_dtype"):
        LLM("tiny", kv_dtype="int8")
    with pytest.raises(RequestError, match=r"cuda:99.* torch finds \d+ GPUs here"):
        LLM("tiny", device="cuda:99")
    with pytest.raises(RequestError, match="max_sequences"):
        LLM("tiny", max_sequences="many")


def test_chat_with_tools(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools stand in the prompt, and calls in the answer come apart from its text."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    turns = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 37}}]},
        {"role": "tool", "content": "134"},
    ]
    said = 'ok <TOOLCALL>[{"name": "add", "arguments": {"a": 1}}]</TOOLCALL>'
    monkeypatch.setattr("batchrun.engine.transcript.Transcript.text", lambda self: said)
    short = SamplingParams(max_tokens=2)
    [out] = llm.chat(turns, short, tools=[tool])
    assert out.prompt is not None and '[{"name": "add", "parameters"' in out.prompt
    assert '<TOOLCALL>[{"name": "add", "arguments": {"a": 37}}]</TOOLCALL>' in out.prompt
    [sample] = out.outputs
    assert (sample.text, sample.finish_reason) == ("ok ", "tool_calls")
    assert sample.tool_calls == [ToolCall("add", '{"a": 1}')]
    [plain] = llm.chat(QUESTION, short)[0].outputs
    assert (plain.text, plain.tool_calls) == (said, None)


def test_bad_tools_and_calls_are_named(llm: LLM) -> None:
    """What is no function schema, or no call, is a ValueError that says where."""
    with pytest.raises(RequestError, match=r"tools\[0\]\.parameters\.type must be object"):
        llm.chat(QUESTION, tools=[{"name": "f", "parameters": {"type": "dict"}}])
    with pytest.raises(RequestError, match="tools must be a list of function schemas, not dict"):
        llm.chat(QUESTION, tools={"name": "f"})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="tool_calls: a call's arguments are neither"):
        llm.chat([*QUESTION, {"role": "assistant", "tool_calls": [{"name": "f"}]}])
    with pytest.raises(RequestError, match="only an assistant message"):
        llm.chat([{**QUESTION[0], "tool_calls": [{"name": "f", "arguments": "{}"}]}])


def test_a_response_format(llm: LLM) -> None:
    """It binds the text alone; one that cannot be used is an error of the call, also when set."""
    bound_to = {"type": "choice", "choices": ["one hundred", "134"]}
    params = SamplingParams(temperature=0, max_tokens=96, response_format=bound_to)
    assert hash(params) == hash(
        SamplingParams(temperature=0, max_tokens=96, response_format=bound_to)
    )
    (out,) = llm.chat(QUESTION, params)
    assert (out.outputs[0].text, out.outputs[0].finish_reason) == ("134", "stop")
    assert out.outputs[0].reasoning == "37+85=122\n+12=134\n"
    (raw,) = llm.generate("abc", SamplingParams(max_tokens=9, response_format=bound_to))
    assert raw.outputs[0].text in ("one hundred"[: len(raw.outputs[0].text)], "134")
    with pytest.raises(RequestError, match="response_format: type must be one of json_schema"):
        SamplingParams(response_format={"type": "xml"})
    bad = SamplingParams(response_format={"type": "regex", "pattern": "("})
    with pytest.raises(RequestError, match="prompt 0: response_format: unclosed group"):
        llm.chat(QUESTION, bad)
    assert llm.engine.num_unfinished == 0

"""Train the model that ships with the package, from nothing, on one CPU core.

    python scripts/train_tiny.py --output batchrun/models/tiny

The result is a checkpoint folder in the Hugging Face layout: a hybrid of Mamba-2, attention and
squared-ReLU layers with the architecture, the weight names, the first token ids and the
conversation format of the Nemotron Nano v2 family, small enough to be part of the package and
trained to do the sums of ``tiny_problems.py`` with a trace that it needs.

The forward pass is written here, over a dict of tensors, because short sequences train fastest
with the state space layer as one quadratic block. Its equations are those of the recurrence

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

with the state started at zero or, while generating, at what the last call left.

Shapes use these letters: b sequences, t and s positions, d hidden size, h state space heads,
p their width, n state size, g groups, c convolved channels (h*p + 2*g*n), v vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny_problems as tp

Params = dict[str, Tensor]
Cache = dict[int, dict[str, Tensor]]

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 64,
    "conv_kernel": 4,
    "eos_token_id": 12,
    "expand": 2,
    # As in the large model, no size is the product that a loader might take it for: heads times
    # head_dim is not hidden_size, and the inner width of a Mamba-2 layer is not expand * hidden.
    "head_dim": 32,
    "hidden_dropout": 0.0,
    "hidden_size": 128,
    "hybrid_override_pattern": "M*-M*-",
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 48,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 6,
    "mamba_proj_bias": False,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_groups": 2,
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "sliding_window": None,
    "ssm_state_size": 32,
    "tie_word_embeddings": False,
    "time_step_floor": 1e-4,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "time_step_max": 0.1,
    # Far below every step the model takes: some implementations use it as a lower clamp.
    "time_step_min": 1e-6,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
}

SPECIAL_TOKENS = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]",
    "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>",
]  # fmt: skip
BOS, END_OF_TURN = 1, 12
STOP_IDS = (2, 11, 12)
VOCABULARY = 400
IGNORE = -100
"""Label of a position that carries no loss."""

BUDGETS: tuple[int | None, ...] = (0, 8, 16, 24, 32, 48, 64, None)
MAX_TRACE = 96
"""Generation limit for reasoning and answer in the evaluation; the longest trace has 64 tokens."""


# ---------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE whose merges stay inside words.

    The first split keeps every digit, every punctuation mark and every space alone and joins runs
    of newlines, so that numbers have one spelling, ``</think>`` never melts into its neighbours
    and the newlines of a forced close are the tokens of a natural one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+| ?\p{L}+|\p{N}|\s|[^\s\p{L}\p{N}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = Random(0)
    frames = [
        *tp.EXPRESSION_PHRASINGS, *tp.LIST_PHRASINGS, *tp.SYSTEM_TEXTS,
        "User\n", "Assistant\n<think>\n", "System\n\n", "</think>\n\n",
        " plus", " minus", " more", " apples", tp.REFUSAL, tp.REFUSAL_TRACE,
    ]  # fmt: skip
    corpus = frames * 40 + [tp.draw_example(rng, held_out=False).prompt for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


class Encoder:
    """Text to ids: conversation marks as special tokens, people's words as plain text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True  # "<SPECIAL_12>" in a question is just text
        self._tokenizer = tokenizer
        self._turn = {
            "system": self.plain("System\n"),
            "user": self.plain("User\n"),
            "assistant": self.plain("Assistant\n"),
        }

    def plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, example: tp.Example, *, thinking: bool) -> list[int]:
        """What the chat template renders for an example, as ids with ``<s>`` in front."""
        ids = [BOS, 10, *self.plain(f"System\n{example.system.strip()}\n")]
        for user, assistant in example.earlier:
            ids += [11, *self.plain(f"User\n{user.strip()}\n")]
            ids += [11, *self.plain(f"Assistant\n{assistant}\n"), END_OF_TURN, *self.plain("\n")]
        ids += [11, *self.plain(f"User\n{example.prompt.strip()}\n"), 11]
        return ids + self.plain("Assistant\n" + ("<think>\n" if thinking else "<think></think>"))

    def forced_close(self, reasoning: str) -> list[int]:
        """The ids an engine appends when the thinking budget ends after this reasoning.

        Only the rest of ``</think>`` where the reasoning ends in the beginning of it; a line
        break first where the reasoning does not end in one.
        """
        for k in range(len("</think>") - 1, 0, -1):
            if reasoning.endswith("</think>"[:k]):
                return self.plain("</think>"[k:] + "\n\n")
        start = "" if not reasoning or reasoning.endswith("\n") else "\n"
        return self.plain(start + "</think>\n\n")


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


def init_params(config: dict[str, Any], vocabulary: int, seed: int) -> Params:
    """Random float32 parameters under their Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    d = config["hidden_size"]
    heads, width = config["mamba_num_heads"], config["mamba_head_dim"]
    inner = heads * width
    channels = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    q_width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    layers = len(config["hybrid_override_pattern"])

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * scale / math.sqrt(columns)

    def uniform(n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    into_residual = 1 / math.sqrt(layers)
    params: Params = {"backbone.embeddings.weight": torch.randn(vocabulary, d, generator=generator)}
    params["backbone.embeddings.weight"] *= 0.3
    for i, kind in enumerate(config["hybrid_override_pattern"]):
        at = f"backbone.layers.{i}."
        params[at + "norm.weight"] = torch.ones(d)
        at += "mixer."
        if kind == "M":
            kernel = config["conv_kernel"]
            params[at + "in_proj.weight"] = normal(inner + channels + heads, d)
            params[at + "conv1d.weight"] = normal(channels, kernel).unsqueeze(1)
            params[at + "conv1d.bias"] = torch.zeros(channels)
            params[at + "A_log"] = torch.log(uniform(heads, 1.0, 8.0))
            params[at + "D"] = torch.ones(heads)
            # dt_bias so that softplus(dt_bias) is spread evenly, by logarithm, over 0.003..0.3.
            dt = torch.exp(uniform(heads, math.log(0.003), math.log(0.3)))
            params[at + "dt_bias"] = dt + torch.log(-torch.expm1(-dt))
            params[at + "norm.weight"] = torch.ones(inner)
            params[at + "out_proj.weight"] = normal(d, inner, into_residual)
        elif kind == "*":
            params[at + "q_proj.weight"] = normal(q_width, d)
            params[at + "k_proj.weight"] = normal(kv_width, d)
            params[at + "v_proj.weight"] = normal(kv_width, d)
            params[at + "o_proj.weight"] = normal(d, q_width, into_residual)
        elif kind == "-":
            params[at + "up_proj.weight"] = normal(config["intermediate_size"], d)
            params[at + "down_proj.weight"] = normal(d, config["intermediate_size"], into_residual)
        else:
            raise ValueError(f"unknown layer {kind!r} in hybrid_override_pattern")
    params["backbone.norm_f.weight"] = torch.ones(d)
    params["lm_head.weight"] = normal(vocabulary, d, 0.5)
    return params


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., k] over its last axis, times weight [k]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def mamba2(
    u: Tensor, get: Callable[[str], Tensor], config: dict[str, Any], state: dict[str, Tensor] | None
) -> Tensor:
    """u [b, t, d] -> [b, t, d]; a given state is continued from and updated in place."""
    b, t, _ = u.shape
    h, p = config["mamba_num_heads"], config["mamba_head_dim"]
    g, n, kernel = config["n_groups"], config["ssm_state_size"], config["conv_kernel"]
    inner, channels = h * p, h * p + 2 * g * n

    z, xbc, dt = F.linear(u, get("in_proj.weight")).split([inner, channels, h], dim=-1)

    # Causal depthwise convolution: [b, kernel-1+t, c] -> [b, t, c], as a sum of shifted products,
    # which beats a grouped conv1d on a CPU.
    if state is not None and "conv" in state:
        padded = torch.cat([state["conv"], xbc], dim=1)
    else:
        padded = F.pad(xbc, (0, 0, kernel - 1, 0))
    weight = get("conv1d.weight")  # [c, 1, kernel]
    conv = get("conv1d.bias") + padded[:, :t] * weight[:, 0, 0]
    for k in range(1, kernel):
        conv = conv + padded[:, k : k + t] * weight[:, 0, k]
    x, keys, queries = F.silu(conv).split([inner, g * n, g * n], dim=-1)  # keys = B, queries = C
    x = x.reshape(b, t, h, p).transpose(1, 2)  # [b, h, t, p]
    keys = keys.reshape(b, t, g, n).transpose(1, 2)  # [b, g, t, n]
    queries = queries.reshape(b, t, g, n).transpose(1, 2)

    dt = F.softplus(dt + get("dt_bias")).transpose(1, 2)  # [b, h, t]
    decay = torch.cumsum(dt * -torch.exp(get("A_log"))[:, None], dim=-1)  # [b, h, t]
    # y_t = sum_{s<=t} (C_t . B_s) exp(decay_t - decay_s) dt_s x_s. Masking before exp, because
    # above the diagonal the exponent is positive and may overflow.
    span = decay[..., :, None] - decay[..., None, :]  # [b, h, t, s]
    causal = torch.ones(t, t, dtype=torch.bool, device=u.device).tril()
    gain = torch.exp(span.masked_fill(~causal, -torch.inf)) * dt[..., None, :]
    similar = queries @ keys.transpose(-1, -2)  # [b, g, t, s]
    mixed = (similar[:, :, None] * gain.view(b, g, h // g, t, t)).view(b, h, t, t)
    y = mixed @ x + get("D")[:, None, None] * x  # [b, h, t, p]
    if state is not None:
        per_head = h // g
        if "ssm" in state:  # [b, h, p, n]
            from_before = queries.repeat_interleave(per_head, 1) @ state["ssm"].transpose(-1, -2)
            y = y + torch.exp(decay)[..., None] * from_before
        scale = torch.exp(decay[..., -1:] - decay) * dt  # [b, h, t]
        ssm = (x * scale[..., None]).transpose(-1, -2) @ keys.repeat_interleave(per_head, 1)
        if "ssm" in state:
            ssm = ssm + torch.exp(decay[..., -1])[..., None, None] * state["ssm"]
        state["ssm"] = ssm
        state["conv"] = padded[:, -(kernel - 1) :]

    y = y.transpose(1, 2).reshape(b, t, inner) * F.silu(z)
    y = y.view(b, t, g, inner // g)  # the norm is one per group, after the gate
    y = F.rms_norm(y, (inner // g,), None, config["layer_norm_epsilon"]).reshape(b, t, inner)
    return F.linear(y * get("norm.weight"), get("out_proj.weight"))


def attention(
    u: Tensor, get: Callable[[str], Tensor], config: dict[str, Any], state: dict[str, Tensor] | None
) -> Tensor:
    """Causal grouped-query attention without positions, u [b, t, d] -> [b, t, d]."""
    b, t, _ = u.shape
    width = config["head_dim"]
    q = F.linear(u, get("q_proj.weight")).view(b, t, -1, width).transpose(1, 2)
    k = F.linear(u, get("k_proj.weight")).view(b, t, -1, width).transpose(1, 2)
    v = F.linear(u, get("v_proj.weight")).view(b, t, -1, width).transpose(1, 2)
    if state is not None:
        if "k" in state:
            k, v = torch.cat([state["k"], k], dim=2), torch.cat([state["v"], v], dim=2)
        state["k"], state["v"] = k, v
    past = k.shape[2] - t
    mask = torch.ones(t, past + t, dtype=torch.bool, device=u.device).tril(past)
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.linear(y.transpose(1, 2).reshape(b, t, -1), get("o_proj.weight"))


def mlp(u: Tensor, get: Callable[[str], Tensor]) -> Tensor:
    """Two matrices with a squared ReLU between, u [b, t, d] -> [b, t, d]."""
    return F.linear(F.relu(F.linear(u, get("up_proj.weight"))).square(), get("down_proj.weight"))


def forward(
    params: Params, config: dict[str, Any], ids: Tensor, cache: Cache | None = None
) -> Tensor:
    """ids [b, t] -> hidden states after the last norm [b, t, d].

    With a cache (a dict, empty at first) the ids continue what the cache has seen.
    """
    eps = config["layer_norm_epsilon"]
    hidden = F.embedding(ids, params["backbone.embeddings.weight"])
    for i, kind in enumerate(config["hybrid_override_pattern"]):
        at = f"backbone.layers.{i}."

        def get(name: str, prefix: str = at + "mixer.") -> Tensor:
            return params[prefix + name]

        state = None if cache is None else cache.setdefault(i, {})
        u = rms_norm(hidden, params[at + "norm.weight"], eps)
        if kind == "M":
            hidden = hidden + mamba2(u, get, config, state)
        elif kind == "*":
            hidden = hidden + attention(u, get, config, state)
        else:
            hidden = hidden + mlp(u, get)
    return rms_norm(hidden, params["backbone.norm_f.weight"], eps)


def logits(params: Params, hidden: Tensor) -> Tensor:
    """hidden [..., d] -> [..., v]."""
    return F.linear(hidden, params["lm_head.weight"])


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def training_sequence(rng: Random, encoder: Encoder, max_operands: int) -> tuple[list[int], int]:
    """One sequence and, encoded in the labels, what of it is to be learnt.

    Returns ids and labels as one list of pairs (id, label of the position *at* that id). A fifth
    of the sequences answers at once, two fifths reason to the end, and two fifths are cut after a
    random number of reasoning tokens and closed by force. The forced tokens carry no loss: an
    engine writes them, not the model.
    """
    example = tp.draw_example(rng, held_out=False, max_operands=max_operands)
    draw = rng.random()
    answer = [*encoder.plain(example.answer), END_OF_TURN]
    prompt = encoder.prompt(example, thinking=draw >= 0.2)
    silent = [IGNORE] * len(prompt)
    if draw < 0.2:
        return prompt + answer, silent + answer
    natural = encoder.plain(example.trace + "</think>\n\n")
    if draw < 0.6:
        return prompt + natural + answer, silent + natural + answer
    # The two newlines after a whole </think> are no part of the reasoning: the latest cut leaves
    # one token of </think> to be forced.
    reasoning = encoder.plain(example.trace + "</think>")[:-1]
    cut = reasoning[: rng.randint(0, len(reasoning))]
    close = encoder.forced_close(encoder.decode(cut))
    ids = prompt + cut + close + answer
    return ids, silent + cut + [IGNORE] * len(close) + answer


def batches(
    rng: Random, encoder: Encoder, max_operands: Callable[[], int], tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels) [b, t] of about ``tokens`` each, sequences of like length together.

    Sequences are drawn 32 batches at a time, sorted, cut into batches and shuffled; what is left
    of a row after its sequence is padding without loss.
    """
    while True:
        pool, size = [], 0
        while size < 32 * tokens:
            pool.append(training_sequence(rng, encoder, max_operands()))
            size += len(pool[-1][0])
        pool.sort(key=lambda pair: len(pair[0]))
        made, start = [], 0
        while start < len(pool):
            end = start + 1
            while end < len(pool) and len(pool[end][0]) * (end + 1 - start) <= tokens:
                end += 1
            made.append(pool[start:end])
            start = end
        rng.shuffle(made)
        for rows in made:
            longest = len(rows[-1][0])
            ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in rows])
            labels = torch.tensor([k + [IGNORE] * (longest - len(k)) for _, k in rows])
            yield ids, labels


def train(args: argparse.Namespace, encoder: Encoder, vocabulary: int) -> Params:
    """AdamW with a schedule of steps, so that a seed means one model on one kind of machine."""
    params = init_params(CONFIG, vocabulary, args.seed)
    for tensor in params.values():
        tensor.requires_grad_()
    matrices = [t for t in params.values() if t.ndim == 2]
    others = [t for t in params.values() if t.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, 0.98), foreach=True,
    )  # fmt: skip
    step = 0

    def max_operands() -> int:
        """Short chains first: they teach the single sum, long ones then only its repetition."""
        done = step / args.steps
        return 3 if done < 0.08 else 5 if done < 0.2 else tp.MAX_OPERANDS

    def learning_rate() -> float:
        """A short rise, a plateau to 30 % of the steps, then a straight line to almost nothing."""
        fall = min(1.0, (args.steps - step) / (0.7 * args.steps))
        return args.learning_rate * min(1.0, (step + 1) / 100) * max(fall, 0.01)

    stream = batches(Random(args.seed), encoder, max_operands, args.batch_tokens)
    start, seen, report = time.monotonic(), 0, defaultdict(float)
    for step in range(args.steps):
        ids, labels = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate()
        wanted = labels[:, 1:] != IGNORE
        hidden = forward(params, CONFIG, ids[:, :-1])[wanted]  # [learnt positions, d]
        loss = F.cross_entropy(logits(params, hidden), labels[:, 1:][wanted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        seen += ids.numel()
        report["loss"] += loss.item()
        report["steps"] += 1
        if (step + 1) % 100 == 0:
            spent = time.monotonic() - start
            print(
                f"step {step + 1:5d}/{args.steps}  loss {report['loss'] / report['steps']:.4f}  "
                f"{seen / 1e6:.2f}M tokens  {seen / spent:.0f} tokens/s  {spent:.0f} s",
                flush=True,
            )
            report.clear()
        if args.probe_every and (step + 1) % args.probe_every == 0:
            with torch.no_grad():
                problems = mixed_sums(210, Random(1))
                result = accuracy(params, CONFIG, encoder, problems, (0, 16, 32, None))
            print("  probe: " + format_row(result), flush=True)
    return {name: tensor.detach() for name, tensor in params.items()}


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


def mixed_sums(count: int, rng: Random, **kwargs: Any) -> list[tp.Example]:
    """Held-out sums, every operand count equally often, asked plainly with an empty system text."""
    out = []
    for i in range(count):
        n = tp.MIN_OPERANDS + i % (tp.MAX_OPERANDS - tp.MIN_OPERANDS + 1)
        problem = tp.draw_problem(
            rng, held_out=True, **{"operands": (n, n), "subtraction": 0.0} | kwargs
        )
        prompt = tp.phrase(rng, problem, plain=True)
        out.append(tp.Example("", prompt, problem.trace, problem.answer, problem))
    return out


def generate(
    params: Params, config: dict[str, Any], contexts: Sequence[list[int]], limit: int
) -> list[list[int]]:
    """Greedy continuations up to a stop token (included) or ``limit`` tokens.

    Contexts of equal length form a batch, so nothing is padded.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, context in enumerate(contexts):
        groups[len(context)].append(i)
    out: list[list[int]] = [[] for _ in contexts]
    for group in groups.values():
        cache: Cache = {}
        ids = torch.tensor([contexts[i] for i in group])
        live = torch.ones(len(group), dtype=torch.bool)
        for _ in range(limit):
            hidden = forward(params, config, ids, cache)[:, -1]
            ids = logits(params, hidden).argmax(-1, keepdim=True)  # [b, 1]
            for row, i in enumerate(group):
                if live[row]:
                    token = int(ids[row, 0])
                    out[i].append(token)
                    live[row] = token not in STOP_IDS
            if not live.any():
                break
    return out


def answer_of(encoder: Encoder, ids: Sequence[int]) -> str:
    """The answer text of a finished continuation, or a text that equals no answer."""
    return encoder.decode(ids[:-1]) if ids and ids[-1] in STOP_IDS else "(unfinished)"


def accuracy(
    params: Params,
    config: dict[str, Any],
    encoder: Encoder,
    examples: Sequence[tp.Example],
    budgets: Sequence[int | None] = BUDGETS,
    *,
    off: bool = True,
) -> dict[str, list[bool]]:
    """Whether each example is answered rightly: without reasoning and at each thinking budget.

    A greedy trace under a budget is the beginning of the greedy trace without one, so the traces
    are generated once and cut.
    """
    result: dict[str, list[bool]] = {}
    if off:
        prompts = [encoder.prompt(e, thinking=False) for e in examples]
        done = generate(params, config, prompts, 40)
        result["off"] = [
            answer_of(encoder, ids) == e.answer for ids, e in zip(done, examples, strict=True)
        ]
    prompts = [encoder.prompt(e, thinking=True) for e in examples]
    traces = generate(params, config, prompts, MAX_TRACE)
    for budget in budgets:
        right: list[bool] = [False] * len(examples)
        contexts, which = [], []
        for i, (prompt, ids) in enumerate(zip(prompts, traces, strict=True)):
            cut = len(ids) if budget is None else budget
            if budget is None or "</think>" in encoder.decode(ids[:cut]):
                _, _, answer = encoder.decode(ids[:-1]).partition("</think>")
                finished = bool(ids) and ids[-1] in STOP_IDS
                right[i] = finished and answer.strip() == examples[i].answer
                continue
            close = encoder.forced_close(encoder.decode(ids[:cut]))
            contexts.append(prompt + ids[:cut] + close)
            which.append(i)
        for i, ids in zip(which, generate(params, config, contexts, 40), strict=True):
            right[i] = answer_of(encoder, ids) == examples[i].answer
        result["full" if budget is None else str(budget)] = right
    return result


def format_row(result: dict[str, list[bool]]) -> str:
    """``name share`` for each setting."""
    return "  ".join(f"{name} {sum(hits) / len(hits):.3f}" for name, hits in result.items())


def variants(count: int) -> dict[str, list[tp.Example]]:
    """Held-out questions of every kind that the model is said to answer."""
    rng = Random(99)
    kinds: dict[str, list[tp.Example]] = {
        "one-digit operands": mixed_sums(count, rng, digits="one"),
        "two-digit and one-digit": mixed_sums(count, rng, digits="balanced"),
        "repeated operands": mixed_sums(count, rng, digits="repeat"),
        "runs": mixed_sums(count, rng, digits="run"),
        "with subtraction": [
            e for e in mixed_sums(2 * count, rng, subtraction=1.0)
            if e.problem and not e.problem.is_addition
        ][:count],
    }  # fmt: skip
    plain = mixed_sums(count, rng)
    problems = [e.problem for e in plain if e.problem]

    def ask(make: Callable[[tp.Problem], str], system: str = "") -> list[tp.Example]:
        return [tp.Example(system, make(p), p.trace, p.answer, p) for p in problems]

    kinds["held-out phrasings"] = ask(
        lambda p: tp.phrase(
            rng, p, expressions=tp.HELD_OUT_EXPRESSION_PHRASINGS, lists=tp.HELD_OUT_LIST_PHRASINGS
        )
    )
    kinds["ordinary words around"] = ask(lambda p: tp.surround(rng, tp.phrase(rng, p)))
    kinds["held-out words around"] = ask(
        lambda p: (
            f"{rng.choice(tp.HELD_OUT_PREFIXES)} {tp.phrase(rng, p)} "
            f"{rng.choice(tp.HELD_OUT_SUFFIXES)}"
        )
    )
    kinds["stray tags in the text"] = ask(lambda p: tp.add_stray_word(rng, tp.phrase(rng, p)))
    for system in (*tp.SYSTEM_TEXTS[1:], *tp.HELD_OUT_SYSTEM_TEXTS):
        kinds[f"system: {system[:34]}"] = ask(lambda p: tp.phrase(rng, p), system)[: count // 2]
    kinds["refusals, like training"] = [
        tp.Example("", tp.off_task_text(rng), tp.REFUSAL_TRACE, tp.REFUSAL) for _ in range(count)
    ]
    kinds["refusals, held out"] = [
        tp.Example("", text, tp.REFUSAL_TRACE, tp.REFUSAL) for text in tp.HELD_OUT_OFF_TASK
    ]
    return kinds


@torch.no_grad()
def evaluate(folder: Path, count: int) -> None:
    """Print the accuracy tables of a checkpoint folder, greedy, in float32."""
    params = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    examples = mixed_sums(count, Random(1))
    result = accuracy(params, config, encoder, examples)
    print(f"\n{count} held-out sums of 2 to 8 operands, greedy, by thinking budget in tokens")
    print("| operands | " + " | ".join(result) + " |")
    print("|---" * (len(result) + 1) + "|")
    for n in (*range(tp.MIN_OPERANDS, tp.MAX_OPERANDS + 1), None):
        rows = [
            i for i, e in enumerate(examples)
            if n is None or (e.problem and len(e.problem.operands) == n)
        ]  # fmt: skip
        cells = [f"{sum(hits[i] for i in rows) / len(rows):.3f}" for hits in result.values()]
        print(f"| {'all' if n is None else n} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{count // 2} or fewer of each kind, greedy\n| kind | off | full |\n|---|---|---|")
    for name, kind in variants(count // 2).items():
        cells = accuracy(params, config, encoder, kind, (None,))
        off, full = (sum(hits) / len(hits) for hits in (cells["off"], cells["full"]))
        print(f"| {name} | {off:.3f} | {full:.3f} |", flush=True)


# ---------------------------------------------------------------------------------------------
# Checkpoint
# ---------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, params: Params, tokenizer: Tokenizer) -> None:
    """The folder that a loader of Hugging Face checkpoints expects, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.to(torch.bfloat16).contiguous() for name, t in params.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (Path(__file__).resolve().parent / "tiny_template.jinja").read_text()
    tokens = {"bos_token": "<s>", "eos_token": "<SPECIAL_12>", "unk_token": "<unk>",
              "pad_token": "<unk>"}  # fmt: skip
    write_json(folder / "config.json", CONFIG | {"vocab_size": tokenizer.get_vocab_size()})
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": list(STOP_IDS), "pad_token_id": 0},
    )
    write_json(folder / "special_tokens_map.json", tokens)
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(i): {"content": token, "lstrip": False, "normalized": False,
                         "rstrip": False, "single_word": False, "special": True}
                for i, token in enumerate(SPECIAL_TOKENS)
            },
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": template,
        } | tokens,
    )  # fmt: skip
    licence = Path(__file__).resolve().parent.parent / "batchrun/models/tiny/LICENSE"
    if licence.exists() and licence.parent != folder.resolve():
        shutil.copy(licence, folder / "LICENSE")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented and in key order, so that two trainings differ only where they differ."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Train and write a checkpoint, or only evaluate one."""
    parser = argparse.ArgumentParser(description="Train the model that ships with the package.")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-only", action="store_true", help="print the tables of --output")
    parser.add_argument("--problems", type=int, default=1050, help="held-out sums to evaluate on")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--probe-every", type=int, default=1000, help="steps; 0 = never")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.evaluate_only:
        tokenizer = build_tokenizer()
        start = time.monotonic()
        params = train(args, Encoder(tokenizer), tokenizer.get_vocab_size())
        write_checkpoint(args.output, params, tokenizer)
        count = sum(t.numel() for t in params.values())
        print(f"{count} parameters, trained in {time.monotonic() - start:.0f} s", flush=True)
    evaluate(args.output, args.problems)


if __name__ == "__main__":
    main()

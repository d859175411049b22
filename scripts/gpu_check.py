"""Check the engine's GPU path on this machine, and measure it against its bounds.

    python scripts/gpu_check.py                            needs a GPU, and scripts/install_gpu.sh
    python scripts/gpu_check.py --memory-gib 22.06         as on an A10: no more memory than it has
    python scripts/gpu_check.py --device cpu --config toy  the same checks without a GPU, in seconds

Builds a model of the published 9B configuration with random weights on the device and writes one
JSON file: every operator against its plain PyTorch twin, the model on both, a prompt in one piece
and in several, small models in bfloat16 against those of transformers, recorded decode steps
against others, memory against the plan, and the time of decode steps against the bytes that they
must move at this device's measured bandwidth.

Exit code 0 when every check holds, 1 when one does not, 2 when there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchrun.engine.accelerators import CONTEXT_BYTES
from batchrun.engine.graphs import CudaRecorder, DecodeGraphs, Recorder
from batchrun.engine.memory import (
    BLOCK_SIZE,
    GPU_SEQUENCES,
    GRAPH_BYTES,
    MAX_BATCH_TOKENS,
    MemoryPlan,
    MemoryRequest,
    plan_memory,
)
from batchrun.engine.rates import measure_rates
from batchrun.engine.roofline import decode_work
from batchrun.model.batch import Batch
from batchrun.model.config import ModelConfig, parse_config
from batchrun.model.hybrid import NemotronH
from batchrun.model.layout import lay_out
from batchrun.model.ops import Ops, Selection, select_ops
from batchrun.model.ops.plain import PlainOps
from batchrun.model.sizes import Precision
from batchrun.model.state import State
from batchrun.model.weights import random_model
from bench.random_models import NANO_9B_V2

CONFIGS = {
    "9b-v2": NANO_9B_V2,
    "toy": ModelConfig(
        vocab_size=128,
        hidden_size=40,
        layer_pattern="MM*-M*-",
        intermediate_size=72,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=6,
        mamba_head_dim=10,
        ssm_state_size=12,
        num_groups=3,
        chunk_size=16,
        max_position_embeddings=1024,
    ),
}
OPERATOR_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}
"""Largest difference, as a part of the largest number of the plain result."""
MODEL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Length of the difference of all logits, as a part of their length."""
MEMORY_TOLERANCE = 0.03
"""How far the memory in use may be above the plan, as a part of it."""
PARITY_FACTOR = 1.5
"""How much farther from float32 a model may be in bfloat16 than transformers' own is."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is checked: a model on a device, with the operators that were selected for it."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    selection: Selection
    plan: MemoryPlan


class CallingRecorder:
    """Where there are no CUDA graphs: what was recorded is called again."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run it once, as a graph's capture does."""
        run()
        return run


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest one, as a part of the largest expected number; infinite where one is NaN."""
    if not torch.isfinite(actual).all():
        return float("inf")
    largest = expected.float().abs().max().clamp(min=1e-6)
    return float((actual.float() - expected.float()).abs().max() / largest)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The length of the difference, as a part of the expected length; infinite where one is NaN."""
    if not torch.isfinite(actual).all():
        return float("inf")
    return float((actual - expected).norm() / expected.norm())


def make_batch(
    decodes: Sequence[int], prefills: Sequence[tuple[int, int]], device: torch.device, vocab: int
) -> Batch:
    """Decodes with these contexts, prefills of (length, context); slots and blocks in order."""
    contexts = (*decodes, *(context for _, context in prefills))
    lens = (*(1 for _ in decodes), *(length for length, _ in prefills))
    ends = [context + length for context, length in zip(contexts, lens, strict=True)]
    width = -(-max(ends) // BLOCK_SIZE)
    tables = torch.arange(len(ends) * width, device=device).view(len(ends), width) + 1
    num_tokens = sum(lens)
    return Batch(
        token_ids=torch.arange(num_tokens, device=device) * 7 % vocab,
        num_decodes=len(decodes),
        prefill_lens=tuple(length for length, _ in prefills),
        slots=torch.arange(1, len(ends) + 1, device=device),
        context_lens=contexts,
        block_tables=tables,
        logit_rows=torch.arange(num_tokens, device=device),
    )


def operator_cases(
    ops: Ops, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, list[Tensor]]]:
    """Each operator's name with what it computes and what it leaves in the state, for arguments
    that are the same at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    chunk = config.chunk_size
    prefills = [(1, 0), (chunk - 1, 5), (chunk + 1, 0), (2 * chunk + 1, 3)]
    decodes = [1, 3, 5 * BLOCK_SIZE, 40 * BLOCK_SIZE + 7]
    batch = make_batch(decodes, prefills, device, config.vocab_size)
    layout = lay_out(batch, config, BLOCK_SIZE, rectangles=ops.rectangles)
    prefill, attention, slots = layout.prefill, layout.attention, layout.decode_slots
    assert prefill is not None and attention is not None
    D, T = len(decodes), sum(length for length, _ in prefills)
    num_slots, num_blocks = len(batch.slots) + 1, int(batch.block_tables.max()) + 1
    c, inner, hidden = config.conv_dim, config.mamba_inner_size, config.hidden_size
    h, p = config.mamba_num_heads, config.mamba_head_dim
    g, n = config.num_groups, config.ssm_state_size

    weight, bias = draw(c, config.conv_kernel).to(dtype), draw(c).to(dtype)
    conv = draw(num_slots, config.conv_kernel - 1, c).to(dtype)
    yield "conv_update", [ops.conv_update(draw(D, c).to(dtype), weight, bias, conv, slots), conv]
    yield "causal_conv", [ops.causal_conv(draw(T, c).to(dtype), weight, bias, conv, prefill), conv]

    A, dt_bias, skip = -draw(h).exp(), draw(h).to(dtype), draw(h).to(dtype)
    ssm = draw(num_slots, h, p, n)

    def tokens(num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, dt = draw(num, h, p).to(dtype), (draw(num, h) - 2).to(dtype)
        return x, dt, draw(num, g, n).to(dtype), draw(num, g, n).to(dtype)

    for name, function, num, where in (
        ("ssm_update", ops.ssm_update, D, slots),
        ("ssd_scan", ops.ssd_scan, T, prefill),
    ):
        call: Callable[..., Tensor] = function
        yield name, [call(*tokens(num), A, dt_bias, skip, ssm, where), ssm]

    residual, delta = draw(T, hidden).to(dtype), draw(T, hidden).to(dtype)
    normed = ops.add_norm(residual, delta, draw(hidden).to(dtype), config.norm_eps)
    yield "add_norm", [normed, residual]
    y, z, inner_weight = draw(T, inner).to(dtype), draw(T, inner).to(dtype), draw(inner).to(dtype)
    yield "gated_norm", [ops.gated_norm(y, z, inner_weight, inner // g, config.norm_eps)]

    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    keys, values = (draw(num_blocks, BLOCK_SIZE, kv_heads, d).to(dtype) for _ in range(2))
    q, k, v = (draw(D + T, count, d).to(dtype) for count in (heads, kv_heads, kv_heads))
    yield "attention", [ops.attention(q, k, v, keys, values, attention), keys, values]


def check_operators(setting: Setting, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every operator against its plain twin, at the sizes of the model."""
    tolerance = OPERATOR_TOLERANCE[dtype]
    arguments = (setting.config, dtype, setting.device)
    fast = operator_cases(setting.selection.ops, *arguments)
    plain = operator_cases(PlainOps(), *arguments)
    found = []
    for (name, results), (_, expected) in zip(fast, plain, strict=True):
        worst = max(map(difference, results, expected))
        found.append(
            {
                "operator": name,
                "dtype": str(dtype),
                "difference": worst,
                "tolerance": tolerance,
                "ok": worst <= tolerance,
            }
        )
    return found


def small_state(setting: Setting, num_blocks: int = 64) -> State:
    """Pools for a few sequences, full of NaN, which nothing may read."""
    state = State.allocate(
        setting.config, 6, num_blocks, BLOCK_SIZE, setting.dtype, torch.float32, setting.device
    )
    for pool in (state.conv, state.ssm, state.keys, state.values):
        pool.fill_(torch.nan)
    return state


def logits_in_pieces(setting: Setting, model: NemotronH, cuts: Sequence[int]) -> Tensor:
    """Logits of all tokens of one prompt that is cut there, then of 8 decodes."""
    state, logits = small_state(setting), []
    whole = make_batch((), [(cuts[-1] + 8, 0)], setting.device, setting.config.vocab_size)
    ends = [*cuts, *range(cuts[-1] + 1, cuts[-1] + 9)]
    for begin, end in zip([0, *ends], ends, strict=False):
        is_decode = begin >= cuts[-1]
        batch = replace(
            whole,
            token_ids=whole.token_ids[begin:end],
            num_decodes=int(is_decode),
            prefill_lens=() if is_decode else (end - begin,),
            context_lens=(begin,),
            logit_rows=torch.arange(end - begin, device=setting.device),
        )
        logits.append(model(batch, state))
    return torch.cat(logits)


def check_model(setting: Setting, model: NemotronH) -> list[dict[str, Any]]:
    """The whole model: with its operators and the plain ones; a prompt whole and in pieces."""
    fast, tolerance = model.ops, MODEL_TOLERANCE[setting.dtype]
    length = 2 * setting.config.chunk_size + 3
    whole = logits_in_pieces(setting, model, [length])
    pieces = logits_in_pieces(setting, model, [1, setting.config.chunk_size + 1, length])
    model.ops = PlainOps()
    plain = logits_in_pieces(setting, model, [length])
    model.ops = fast
    found = []
    for name, logits in (("plain operators", plain), ("a prompt in pieces", pieces)):
        far = distance(whole, logits)
        found.append(
            {
                "against": name,
                "distance": far,
                "tolerance": tolerance,
                "greedy_agreement": float((whole.argmax(1) == logits.argmax(1)).float().mean()),
                "ok": far <= tolerance,
            }
        )
    return found


def small_sizes(config: ModelConfig) -> dict[str, object]:
    """What transformers calls a small model whose heads, groups, states and chunks are those of a
    large one: the shapes that kernels are made for."""
    kv_heads = min(2, config.num_key_value_heads)
    return {
        "vocab_size": min(1024, config.vocab_size),
        "hidden_size": min(448, config.hidden_size),
        "hybrid_override_pattern": "M-M*-M-",
        "intermediate_size": min(1568, config.intermediate_size),
        "num_attention_heads": kv_heads * config.num_attention_heads // config.num_key_value_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": config.head_dim,
        "mamba_num_heads": 2 * config.num_groups,
        "mamba_head_dim": config.mamba_head_dim,
        "ssm_state_size": config.ssm_state_size,
        "n_groups": config.num_groups,
        "chunk_size": config.chunk_size,
    }


def check_parity(setting: Setting) -> list[dict[str, Any]]:
    """The cases of ``tests/parity`` in bfloat16, and one with the shapes of the large model.

    transformers' model runs on the CPU, in float32 and in bfloat16, with the same weights. Two ways
    to round differ from one another more than from what both round, so what is asked is that ours,
    on the device, is about as near to float32 as transformers' is.
    """
    if importlib.util.find_spec("transformers") is None:
        return [{"skipped": "transformers is not installed (pip install transformers)", "ok": True}]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.parity.oracle import CONFIGURATIONS

    cases = {**CONFIGURATIONS, "the model's shapes": small_sizes(setting.config)}
    found = []
    for seed, (name, changes) in enumerate(cases.items()):
        try:
            found += [{"case": name, **one} for one in parity_of(setting, seed, changes)]
        except Exception as error:  # a kernel that cannot be compiled is found like any difference
            found.append({"case": name, "error": f"{type(error).__name__}: {error}", "ok": False})
    return found


def parity_of(setting: Setting, seed: int, changes: dict[str, object]) -> list[dict[str, Any]]:
    """One case, with its prompt in one piece and in several, and decodes behind it."""
    from tests.parity.oracle import make_oracle, oracle_logits

    oracle = make_oracle(seed, **changes).bfloat16()
    weights = {name.replace("model.", "backbone."): w for name, w in oracle.state_dict().items()}
    config = parse_config(oracle.config.to_dict())
    with setting.device:
        model = NemotronH(config).to(torch.bfloat16).eval()
    model.load_state_dict(weights)
    model.ops = select_ops(setting.device, config).ops
    model.prepare()
    length, chunk = 2 * config.chunk_size + 3, config.chunk_size
    token_ids = make_batch((), [(length + 8, 0)], torch.device("cpu"), config.vocab_size).token_ids
    theirs = oracle_logits(oracle, token_ids.tolist()).float()
    reference = oracle_logits(oracle.float(), token_ids.tolist())
    tolerance = PARITY_FACTOR * distance(theirs, reference)
    small = replace(setting, config=config, dtype=torch.bfloat16)
    found = []
    for cuts in ([length], [1, chunk + 1, length]):
        logits = logits_in_pieces(small, model, cuts).cpu()
        far = distance(logits, reference)
        agreement = float((logits.argmax(1) == reference.argmax(1)).float().mean())
        found.append(
            {
                "cuts": cuts,
                "distance": far,
                "tolerance": tolerance,
                "greedy_agreement": agreement,
                "ok": far <= tolerance,
            }
        )
    return found


def recorder_of(device: torch.device) -> Recorder:
    """CUDA graphs, or calls where there are none."""
    return CudaRecorder(device) if device.type == "cuda" else CallingRecorder()


def check_graphs(setting: Setting, model: NemotronH) -> list[dict[str, Any]]:
    """Decode steps of several sizes, recorded and not, from the same states: the same logits."""
    most, tolerance = 5, MODEL_TOLERANCE[setting.dtype] / 10
    contexts = [2 * BLOCK_SIZE + 5, 1, 40, 7, 33]
    prompts = make_batch((), [(length, 0) for length in contexts], setting.device, 100)
    tables = torch.zeros(most + 1, 4, dtype=torch.int64, device=setting.device)
    tables[1:, : prompts.block_tables.shape[1]] = prompts.block_tables
    found = []
    for size in (1, 3, most):
        states = [small_state(setting) for _ in range(2)]
        for state in states:
            model(prompts, state)
        graphs = DecodeGraphs(
            model,
            states[0],
            tables,
            torch.zeros_like(tables[:, 0]),
            most=most,
            recorder=recorder_of(setting.device),
        )
        slots, token_ids = list(range(1, size + 1)), list(range(10, 10 + size))
        recorded = graphs.run(token_ids, slots, contexts[:size])
        batch = Batch(
            token_ids=torch.tensor(token_ids, device=setting.device),
            num_decodes=size,
            prefill_lens=(),
            slots=torch.tensor(slots, device=setting.device),
            context_lens=tuple(contexts[:size]),
            block_tables=tables[1 : size + 1],
            logit_rows=torch.arange(size, device=setting.device),
        )
        far = distance(recorded, model(batch, states[1]))
        found.append(
            {"batch": size, "distance": far, "tolerance": tolerance, "ok": far <= tolerance}
        )
    return found


def measure_decode(
    setting: Setting, model: NemotronH, batches: Sequence[int], context: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Memory in use at its peak against the plan, and decode steps against their bound."""
    config, plan, device = setting.config, setting.plan, setting.device
    bandwidth = measure_rates(config, setting.dtype, device, ()).copy_bandwidth
    precision = Precision(setting.dtype.itemsize, 4)
    state = State.allocate(
        config, plan.num_slots, plan.num_blocks, BLOCK_SIZE, setting.dtype, torch.float32, device
    )
    width = max(1, plan.blocks_per_sequence)
    tables = torch.zeros(plan.max_sequences + 1, width, dtype=torch.int64, device=device)
    # Where there are fewer blocks than these contexts need, sequences share them: the work and the
    # addresses are what counts here.
    needed = min(width, -(-(context + 1) // BLOCK_SIZE))
    places = torch.arange(plan.max_sequences * needed, device=device) % (plan.num_blocks - 1)
    tables[1:, :needed] = places.view(-1, needed) + 1
    prompt = make_batch((), [(MAX_BATCH_TOKENS, 0)], device, config.vocab_size)
    prompt = replace(
        prompt,
        slots=prompt.slots.zero_(),
        block_tables=prompt.block_tables.zero_(),
        logit_rows=prompt.logit_rows[-1:],
    )
    model(prompt, state)
    graphs = DecodeGraphs(
        model,
        state,
        tables,
        torch.zeros_like(tables[:, 0]),
        most=plan.max_sequences,
        recorder=recorder_of(device),
    )
    context = min(context, plan.max_model_len - 1)
    steps = []
    for batch in sorted({min(batch, plan.max_sequences) for batch in batches}):
        seconds = _seconds(
            lambda batch=batch: graphs.run(
                [1] * batch, list(range(1, batch + 1)), [context] * batch
            ),
            device,
        )
        work = decode_work(config, precision, batch, context)
        bound = work.num_bytes / bandwidth
        steps.append(
            {
                "batch": batch,
                "context": context,
                "step_ms": seconds * 1e3,
                "tokens_per_s": batch / seconds,
                "bound_ms": bound * 1e3,
                "of_bound": bound / seconds,
            }
        )
    memory: dict[str, Any] = {"planned_bytes": plan.used_bytes, "ok": True}
    memory["copy_bandwidth_bytes_per_s"] = bandwidth
    memory["max_sequences"] = plan.max_sequences
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        over = peak / plan.used_bytes - 1
        memory |= {"peak_bytes": peak, "over_plan": over, "tolerance": MEMORY_TOLERANCE}
        memory["ok"] = over <= MEMORY_TOLERANCE
    return memory, steps


def _seconds(step: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Of one step: the mean of some, after some that are not counted."""
    for timed in (False, True):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(times if timed else 3):
            step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / times


def usable_memory(device: torch.device, memory_gib: float | None) -> int:
    """Bytes for the engine: what is free, on a CPU a little, and no more than was asked for."""
    if device.type != "cuda":
        return 64 << 20
    free, total = torch.cuda.mem_get_info(device)
    if memory_gib is None:
        return int(free - total * 0.01)
    capped = int(memory_gib * 2**30)
    torch.cuda.set_per_process_memory_fraction(min(1.0, capped / total), device)
    return min(free, int(capped * 0.99) - CONTEXT_BYTES)


def run_checks(
    config: ModelConfig,
    device: torch.device,
    *,
    memory_gib: float | None = None,
    batches: Sequence[int] = (1, 8, 16, 24, 32, 64, 128, 256),
    context: int = 1024,
) -> dict[str, Any]:
    """All checks and measurements, as they are written to the file."""
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    selection = select_ops(device, config)
    plan = plan_memory(
        config,
        MemoryRequest(
            memory_bytes=usable_memory(device, memory_gib),
            precision=Precision(dtype.itemsize, 4),
            num_forced=0,
            max_model_len=min(config.max_position_embeddings, 2 * context),
            most_sequences=GPU_SEQUENCES if is_cuda else 5,
            recorded_sequences=None if is_cuda else 0,
            graph_bytes=GRAPH_BYTES if is_cuda else 0,
            has_kernels=is_cuda,
        ),
    )
    setting = Setting(config, device, dtype, selection, plan)
    is_fast = not is_cuda or not isinstance(selection.ops, PlainOps)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "torch": torch.__version__,
        "operators": selection.reason,
        "dtype": str(dtype),
        "memory_gib": memory_gib,
        "selection": [{"reason": selection.reason, "hint": selection.hint, "ok": is_fast}],
    }
    with torch.inference_mode():
        report["operator_differences"] = [
            found
            for operator_dtype in OPERATOR_TOLERANCE
            for found in check_operators(setting, operator_dtype)
        ]
        model = random_model(config, dtype, device)
        model.ops = selection.ops
        model.prepare()
        report["model"] = check_model(setting, model)
        report["parity"] = check_parity(setting)
        report["graphs"] = check_graphs(setting, model)
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        memory, report["decode"] = measure_decode(setting, model, batches, context)
        report["memory"] = [memory]
    checked = ("selection", "operator_differences", "model", "parity", "graphs", "memory")
    report["failed"] = [
        {"check": name, **found} for name in checked for found in report[name] if not found["ok"]
    ]
    report["ok"] = not report["failed"]
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--config", choices=sorted(CONFIGS), default="9b-v2")
    parser.add_argument("--memory-gib", type=float, help="use no more of the GPU's memory")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 24, 32, 64, 128, 256])
    parser.add_argument("--context", type=int, default=1024, help="tokens behind a decode")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU on this machine", file=sys.stderr)
        print(
            "hint: batchrun doctor says what is missing; --device cpu --config toy runs the "
            "checks without one",
            file=sys.stderr,
        )
        return 2
    report = run_checks(
        CONFIGS[chosen.config],
        device,
        memory_gib=chosen.memory_gib,
        batches=chosen.batches,
        context=chosen.context,
    )
    chosen.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for found in report["parity"]:
        if "skipped" in found:
            print(f"skipped: parity with transformers: {found['skipped']}")
    for found in report["failed"]:
        print(f"FAILED {json.dumps(found)}")
    for step in report["decode"]:
        print(
            f"batch {step['batch']:4}: {step['step_ms']:8.2f} ms a step, "
            f"{step['tokens_per_s']:8.0f} tokens/s, {step['of_bound']:4.0%} of the bound"
        )
    print(f"{'all checks hold' if report['ok'] else 'CHECKS FAILED'}; written to {chosen.out}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

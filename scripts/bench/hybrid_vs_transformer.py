"""A hybrid and a transformer of its size in one engine, on this machine, with equal memory.

    python scripts/bench/hybrid_vs_transformer.py [--memory-mib 600] [--prompt 256] [--output 768]

Both have about 60 million random weights. Each gets the same memory and runs as many sequences at
once as fit it; rounds alternate, and the median counts. Beside it stands what the roofline predicts
for the published 9B hybrid and a transformer of its size on a GPU; nothing of that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
from random_models import HYBRID_60M, NANO_9B_V2, TRANSFORMER_60M, random_model
from safetensors.torch import save_file

from batchrun.engine.accelerators import find_accelerator
from batchrun.engine.engine import Engine
from batchrun.engine.memory import plan_accelerator
from batchrun.engine.options import EngineOptions
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.engine.roofline import predict
from batchrun.model.config import ModelConfig
from batchrun.model.equivalent import equivalent_transformer
from batchrun.model.sizes import Precision, Quantization, count_weights


def write_checkpoint(folder: Path, config: ModelConfig) -> Path:
    """A checkpoint of random weights; without a tokenizer, as only token ids are run."""
    folder.mkdir()
    raw = asdict(config) | {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": config.layer_pattern,
        "n_groups": config.num_groups,
    }
    del raw["layer_pattern"], raw["num_groups"], raw["norm_eps"]
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(dict(random_model(config).state_dict()), folder / "model.safetensors")
    return folder


def run(engine: Engine, rows: int, prompt: int, output: int) -> float:
    """Output tokens a second, prefill included; every row has prompts and outputs of one length."""
    rng = Random(0)
    params = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
    for number in range(rows):
        ids = tuple(rng.randrange(engine.config.vocab_size) for _ in range(prompt))
        engine.add(Request(number, ids, params))
    started = time.perf_counter()
    while engine.num_unfinished:
        engine.step()
    return rows * output / (time.perf_counter() - started)


def measure(args: argparse.Namespace) -> None:
    """Both models here."""
    options = EngineOptions(
        device="cpu",
        dtype=args.dtype,
        memory_bytes=args.memory_mib << 20,
        max_model_len=args.prompt + args.output,
        sequence_tokens=args.prompt + args.output,
        max_batch_tokens=512,
        prefix_states=False,
    )
    rates: dict[str, list[float]] = {}
    fitting: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            name: Engine.load(write_checkpoint(Path(folder) / name, config), options)
            for name, config in (("hybrid", HYBRID_60M), ("transformer", TRANSFORMER_60M))
        }
    for name, engine in engines.items():
        fitting[name] = engine.memory.num_sequences_of(args.prompt + args.output)
        run(engine, 1, args.prompt, 8)
    for _ in range(args.rounds):
        for name, engine in engines.items():
            rows = args.waves * fitting[name]
            rates.setdefault(name, []).append(run(engine, rows, args.prompt, args.output))
    load = os.getloadavg()[0]
    print(
        f"measured: {platform.processor() or platform.machine()}, {torch.get_num_threads()} "
        f"threads, {args.dtype}, {args.memory_mib} MiB each, {args.prompt} tokens in, "
        f"{args.output} out, {args.rounds} rounds; load of the machine {load:.1f}"
    )
    for name, engine in engines.items():
        millions = count_weights(engine.config).total / 1e6
        print(
            f"  {name:12} {millions:5.1f} M weights  {fitting[name]:4} sequences at once  "
            f"{statistics.median(rates[name]):8.1f} output tokens/s"
        )
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"  ratio {medians['hybrid'] / medians['transformer']:.2f}")


def foretell(name: str) -> None:
    """The 9B hybrid and its transformer on a GPU, as the arithmetic has it."""
    device = find_accelerator(name)
    models = {"hybrid": NANO_9B_V2, "transformer": equivalent_transformer(NANO_9B_V2)}
    print(f"predicted, not measured: {device.name}, output tokens/s at the roofline")
    print("  in/out        weights   sequences: hybrid, transformer   tokens/s           ratio")
    for prompt, output in ((1024, 1024), (8192, 16384)):
        for quantization in Quantization:
            precision = Precision(2, 4, quantization)
            counts, rates = [], []
            for config in models.values():
                tokens = prompt + output
                plan = plan_accelerator(
                    config, device, precision, max_model_len=tokens, sequence_tokens=tokens
                )
                speed = predict(
                    config,
                    precision,
                    device,
                    batch=plan.max_sequences,
                    input_tokens=prompt,
                    output_tokens=output,
                )
                counts.append(plan.max_sequences)
                rates.append(speed.output_rate)
            label = "bfloat16" if quantization is Quantization.NONE else str(quantization)
            print(
                f"  {prompt:5}/{output:<6}  {label:8}  {counts[0]:17}, {counts[1]:<11}   "
                f"{rates[0]:7.0f}, {rates[1]:<7.0f}   {rates[0] / rates[1]:5.2f}"
            )


def main() -> None:
    """Parse the command line; measure, then predict."""
    parser = argparse.ArgumentParser(description="A hybrid and a transformer of its size.")
    parser.add_argument("--memory-mib", type=int, default=600, help="for each engine")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--waves", type=int, default=1, help="rows for each sequence that fits")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--accelerator", default="A10", help="of the prediction")
    parser.add_argument("--predict-only", action="store_true")
    args = parser.parse_args()
    if not args.predict_only:
        measure(args)
    foretell(args.accelerator)


if __name__ == "__main__":
    main()

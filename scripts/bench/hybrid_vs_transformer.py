"""A hybrid and a transformer of its size in one engine, on this machine, with equal memory.

    python scripts/bench/hybrid_vs_transformer.py [--memory-mib 600] [--prompt 256] [--output 768]

Both have about 60 million random weights. Each gets the same memory and runs as many sequences at
once as fit it; rounds alternate, and the median counts. ``predict.py`` says what to expect of the
published 9B hybrid on a GPU.
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
from random_models import HYBRID_60M, TRANSFORMER_60M, random_model
from safetensors.torch import save_file

from batchrun.engine.engine import Engine
from batchrun.engine.options import EngineOptions
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.model.config import ModelConfig
from batchrun.model.sizes import count_weights


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


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description="A hybrid and a transformer of its size.")
    parser.add_argument("--memory-mib", type=int, default=600, help="for each engine")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--waves", type=int, default=1, help="rows for each sequence that fits")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()

"""Checkpoints and engines for the tests of the engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Hashable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

import batchrun
import train_tiny
from batchrun.engine.engine import Engine
from batchrun.engine.options import EngineOptions
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Output, Request

TINY = Path(batchrun.__file__).parent / "models" / "tiny"
"""The trained checkpoint that ships with the package."""

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_attention_heads": 4,
    "mamba_head_dim": 8,
    "mamba_num_heads": 4,
    "ssm_state_size": 8,
    "chunk_size": 16,
    "max_position_embeddings": 512,
}
"""Sizes of the random checkpoint: quick, and no product equals another size."""


def write_random(folder: Path, *, seed: int = 0, tokenizer: bool = True, **changes: object) -> Path:
    """A checkpoint with random weights, the tiny model's tokenizer and template, and its ids."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["generation_config.json"]
    if tokenizer:
        names += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    for name in names:
        shutil.copy(TINY / name, folder / name)
    config = json.loads((TINY / "config.json").read_text()) | SMALL | changes
    config["num_hidden_layers"] = len(config["hybrid_override_pattern"])
    (folder / "config.json").write_text(json.dumps(config))
    params = train_tiny.init_params(config, config["vocab_size"], seed)
    # Sharper than at the start of a training, so that near ties are rare.
    params["lm_head.weight"] *= 4
    save_file({name: t.contiguous() for name, t in params.items()}, folder / "model.safetensors")
    return folder


def make_engine(folder: Path, **options: object) -> Engine:
    """An engine in float32 on the CPU; what was in its pools before is NaN."""
    engine = Engine.load(folder, EngineOptions(device="cpu", **options))  # type: ignore[arg-type]
    state = engine.runner.state
    for pool in (state.conv, state.ssm, state.keys, state.values):
        pool.fill_(torch.nan)
    return engine


def run(engine: Engine, requests: Iterable[Request]) -> dict[tuple[Hashable, int], Output]:
    """Add requests and step to the end; then nothing is held any more."""
    for request in requests:
        engine.add(request)
    outputs = {}
    while engine.num_unfinished:
        for output in engine.step():
            assert (output.key, output.sample) not in outputs
            outputs[output.key, output.sample] = output
        engine.check_integrity()
    stats = engine.stats()
    assert (stats.slots_used, stats.blocks_used) == (0, 0)
    return outputs


def run_one(
    engine: Engine,
    prompt: Iterable[int],
    *,
    thinking: bool = False,
    seed: int = 0,
    **params: object,
) -> Output:
    """The output of one prompt alone."""
    request = Request(
        "only",
        tuple(prompt),
        SamplingParams(**params),  # type: ignore[arg-type]
        seed=seed,
        thinking=thinking,
    )
    return run(engine, [request])["only", 0]

"""Write a Nemotron-H checkpoint with random weights, for measurements.

    python scripts/bench/make_model.py FOLDER [--config config.json] [--seed 0]

Without ``--config`` it is the model of ``compare.py``: 62 million weights, with layers, heads and
sizes in the proportions of the 9B model. The folder holds ``config.json`` and float32 safetensors
as batchrun, transformers and vLLM all read them; there is no tokenizer, so prompts are token ids.
"""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path

from safetensors.torch import save_file

from batchrun.model.checkpoint import expected_tensors
from batchrun.model.config import parse_config
from batchrun.model.random_weights import random_weight

CONFIG: dict[str, object] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 16384,
    "hidden_size": 512,
    "num_hidden_layers": 25,
    "hybrid_override_pattern": "M-M-M-MM-M*-M-M-M-M*-M-M-",
    "intermediate_size": 1792,
    "mlp_hidden_act": "relu2",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "ssm_state_size": 128,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 128,
    "expand": 2,
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "layer_norm_epsilon": 1e-5,
    "rms_norm_eps": 1e-5,
    "residual_in_fp32": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "mamba_ssm_cache_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
"""As in the 9B model: nearly as many MLP as Mamba-2 layers, one attention layer in 12 or so, MLPs
3.5 times and Mamba-2 inner sizes twice the hidden size, 128 numbers of state a channel."""


def make_model(folder: Path, raw: dict[str, object], seed: int = 0) -> int:
    """Write the checkpoint; the number of its weights."""
    config = parse_config(raw)
    shapes = expected_tensors(config)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: random_weight(name, shape, seed=seed) for name, shape in shapes.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    text = json.dumps(raw, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return sum(map(prod, shapes.values()))


def main() -> None:
    """Read the arguments and write."""
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, help="a config.json; default: the 60M model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    raw = CONFIG
    if arguments.config is not None:
        raw = json.loads(arguments.config.read_text(encoding="utf-8"))
    count = make_model(arguments.folder, raw, arguments.seed)
    print(f"{arguments.folder}: {count:,} random weights")


if __name__ == "__main__":
    main()

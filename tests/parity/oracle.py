"""transformers' own Nemotron-H as the oracle, in many small configurations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from batchrun.model.config import ModelConfig, parse_config
from batchrun.model.hybrid import NemotronH
from tests.unit.model.models import random_tokens, randomize

_BASE: dict[str, object] = {
    "vocab_size": 89,
    "hidden_size": 40,
    "hybrid_override_pattern": "M-M*-",
    "intermediate_size": 72,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 8,
}

CONFIGURATIONS: dict[str, dict[str, object]] = {
    "neighbours": {"hybrid_override_pattern": "MM*-MMM-*M"},
    "one_group": {"n_groups": 1, "ssm_state_size": 8, "chunk_size": 16},
    "a_group_each_head": {"n_groups": 6, "num_key_value_heads": 4},
    "odd_sizes": {
        "chunk_size": 7,
        "hidden_size": 37,
        "mamba_num_heads": 9,
        "mamba_head_dim": 5,
        "n_groups": 3,
        "ssm_state_size": 11,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "vocab_size": 53,
    },
    "all_biases": {"use_bias": True, "mlp_bias": True, "use_conv_bias": True},
    "no_biases": {"use_conv_bias": False, "num_key_value_heads": 1, "layer_norm_epsilon": 1e-3},
    "long_chunks": {"chunk_size": 64, "hybrid_override_pattern": "M*-M*-", "hidden_size": 64},
    "short_kernel": {"conv_kernel": 2, "chunk_size": 5},
    "wide_kernel": {"conv_kernel": 7, "chunk_size": 4, "hybrid_override_pattern": "*M-M"},
    "only_attention": {"hybrid_override_pattern": "*-*-"},
    "only_mamba": {"hybrid_override_pattern": "MM-M"},
}


@dataclass(frozen=True)
class Pair:
    """The oracle and our model, with the same random weights, and a prompt of 5 chunks + 1."""

    oracle: NemotronHForCausalLM
    model: NemotronH
    prompt: list[int]
    logits: Tensor
    """The oracle's logits [prompt, vocab]."""

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def make_oracle(seed: int, **changes: object) -> NemotronHForCausalLM:
    """transformers' model of one configuration with random weights."""
    oracle = NemotronHForCausalLM(NemotronHConfig(**(_BASE | changes))).float().eval()
    randomize(oracle, seed)
    return _unclamped(oracle)


def load_oracle(folder: Path) -> NemotronHForCausalLM:
    """transformers' model of a checkpoint, in float32."""
    return _unclamped(NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def _unclamped(oracle: NemotronHForCausalLM) -> NemotronHForCausalLM:
    """Take off the clamp of time steps at ``time_step_min``: transformers has it in its prefill
    but not in its decode, and these models were trained without."""
    for layer in oracle.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return oracle


@cache
def make_pair(name: str) -> Pair:
    """Both models in a configuration of :data:`CONFIGURATIONS`."""
    seed = list(CONFIGURATIONS).index(name)
    oracle = make_oracle(seed, **CONFIGURATIONS[name])
    config = parse_config(oracle.config.to_dict())
    model = NemotronH(config).eval().requires_grad_(False)
    weights = oracle.state_dict()
    model.load_state_dict({name.replace("model.", "backbone."): weights[name] for name in weights})
    prompt = random_tokens(config, 5 * config.chunk_size + 1, seed)
    return Pair(oracle, model, prompt, oracle_logits(oracle, prompt))


@torch.no_grad()
def oracle_logits(oracle: NemotronHForCausalLM, tokens: list[int]) -> Tensor:
    """The oracle's logits [tokens, vocab], computed from nothing: its caches are not trusted."""
    logits: Tensor = oracle(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits

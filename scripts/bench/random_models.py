"""Models with random weights for checks and benchmarks: the published 9B configuration, and two of
60 million, a hybrid and a transformer of its size."""

from __future__ import annotations

import math

import torch

from batchrun.model.config import ModelConfig
from batchrun.model.equivalent import equivalent_transformer
from batchrun.model.hybrid import NemotronH

NANO_9B_V2 = ModelConfig(
    vocab_size=131072,
    hidden_size=4480,
    layer_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    intermediate_size=15680,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    ssm_state_size=128,
    num_groups=8,
    max_position_embeddings=131072,
)
HYBRID_60M = ModelConfig(
    vocab_size=8192,
    hidden_size=640,
    layer_pattern="M-M-M*-M-M-M*-M-M-",
    intermediate_size=2240,
    num_attention_heads=10,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=24,
    mamba_head_dim=64,
    ssm_state_size=64,
    num_groups=2,
    max_position_embeddings=32768,
    torch_dtype="float32",
)
TRANSFORMER_60M = equivalent_transformer(HYBRID_60M)


def random_model(config: ModelConfig, seed: int = 0) -> NemotronH:
    """A model as at the start of a training, with sharper logits: decays and time steps are spread
    as published models have them, so that states remember from one token to thousands."""
    model = NemotronH(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    into_residual = 1 / math.sqrt(config.num_layers)
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("A_log"):
            parameter.uniform_(1, 16, generator=generator).log_()
        elif name.endswith("dt_bias"):
            dt = parameter.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
            parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                parameter *= into_residual
            elif name == "lm_head.weight":
                parameter *= 3
    return model

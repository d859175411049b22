"""Configs of published models, as far as the weights depend on them."""

from __future__ import annotations

NANO_9B_V2: dict[str, object] = {
    "architectures": ["NemotronHForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "model_type": "nemotron_h",
    "num_hidden_layers": 56,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "hidden_size": 4480,
    "intermediate_size": 15680,
    "mlp_hidden_act": "relu2",
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "sliding_window": None,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "expand": 2,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "chunk_size": 128,
    "mamba_hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "rms_norm_eps": 1e-5,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "residual_in_fp32": False,
    "vocab_size": 131072,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

NANO_12B_V2 = NANO_9B_V2 | {
    "num_hidden_layers": 62,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    "hidden_size": 5120,
    "intermediate_size": 20480,
}

H_8B = NANO_9B_V2 | {
    "num_hidden_layers": 52,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "mamba_head_dim": 64,
}

NANO_3_4B = NANO_9B_V2 | {
    "num_hidden_layers": 42,
    "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    "hidden_size": 3136,
    "intermediate_size": 12544,
    "mamba_num_heads": 96,
}

"""Random weights in the place of a checkpoint's, for measurements that ask only for its sizes."""

from __future__ import annotations

import torch
from torch import Tensor


def random_weight(
    name: str, shape: tuple[int, ...], *, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Weights [*shape] float32 on ``device`` for the parameter ``name`` of a model.

    Activations and logits come out of the size that trained weights give them, and time steps
    between 0.001 and 0.1, as at the start of a training. Drawn from ``seed`` and the name alone,
    so neither the order of parameters nor the process matters; the kind of device does.
    """
    generator = torch.Generator(device).manual_seed(_seed_of(name, seed))
    weight = torch.empty(shape, device=device)
    module, _, kind = name.rpartition(".")
    match kind:
        case "A_log":
            return weight.uniform_(1, 16, generator=generator).log_()
        case "dt_bias":
            # Softplus gives the time step back.
            return weight.uniform_(-6.9, -2.3, generator=generator).exp_().expm1_().log_()
        case "D":
            return weight.fill_(1.0)
        case "bias":
            return weight.zero_()
    if len(shape) == 1:  # norms
        return weight.fill_(1.0)
    if module.endswith("embeddings"):
        return weight.normal_(0, 1, generator=generator)
    return weight.normal_(0, shape[-1] ** -0.5, generator=generator)


def _seed_of(name: str, seed: int) -> int:
    # Not hash(), which differs from process to process.
    value = seed + 1
    for byte in name.encode():
        value = (value * 1_000_003 + byte) % (1 << 61)
    return value

"""From a checkpoint folder to a model, one tensor at a time."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from batchrun.errors import CheckpointError
from batchrun.model.checkpoint import Checkpoint, check_checkpoint, expected_tensors
from batchrun.model.config import ModelConfig
from batchrun.model.hybrid import NemotronH
from batchrun.model.quantize import Int8Linear, quantize_layers
from batchrun.model.random_weights import random_weight
from batchrun.model.sizes import Quantization


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization = Quantization.NONE,
) -> NemotronH:
    """A model with the weights of ``folder``, in ``dtype`` on ``device``, ready for inference.

    Every tensor is read, converted or quantised, and written straight to its place, so that host
    memory stays below the model (on a CPU) or nothing (elsewhere) plus the largest tensor. All
    headers are checked before anything is allocated. No code of the checkpoint is run, no pickle
    is read.

    Raises :class:`CheckpointError` as :func:`check_checkpoint` does.
    """
    checkpoint = check_checkpoint(folder, config)
    model = _empty_model(checkpoint.config, dtype, device, quantization)
    _fill(model, checkpoint)
    return model


def random_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization = Quantization.NONE,
) -> NemotronH:
    """A model as :func:`load_model` makes it, with random weights: for measurements."""
    model = _empty_model(config, dtype, device, quantization)
    for name, shape in expected_tensors(config).items():
        _place(model, name, random_weight(name, shape, device=device))
    return model


def _empty_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization,
) -> NemotronH:
    with torch.device("meta"):
        model = NemotronH(config)
        model = model.to(dtype)
        if quantization is Quantization.INT8:
            if model.lm_head is None:
                # The embeddings are looked up as they are; what makes the logits is a copy.
                model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            quantize_layers(model, config, dtype)
    return model.to_empty(device=device).requires_grad_(False).eval()


def _fill(model: NemotronH, checkpoint: Checkpoint) -> None:
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in checkpoint.tensors.items():
        by_file[tensor.file].append(name)
    for file, names in by_file.items():
        try:
            with safe_open(str(file), framework="pt", device="cpu") as stored:
                for name in names:
                    _place(model, name, stored.get_tensor(checkpoint.tensors[name].stored_name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}", "copy the checkpoint again"
            ) from error


def _place(model: NemotronH, name: str, weights: Tensor) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, Int8Linear) and name.endswith(".weight"):
        module.fill(weights)
    else:
        model.get_parameter(name).copy_(weights)
    if module is model.backbone.embeddings and isinstance(model.lm_head, Int8Linear):
        if model.config.tie_word_embeddings:
            model.lm_head.fill(weights)

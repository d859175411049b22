"""From a checkpoint folder to a model, one tensor at a time."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from batchrun.errors import CheckpointError
from batchrun.model.checkpoint import Checkpoint, check_checkpoint
from batchrun.model.config import ModelConfig
from batchrun.model.hybrid import NemotronH


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> NemotronH:
    """A model with the weights of ``folder``, in ``dtype`` on ``device``, ready for inference.

    Every tensor is read, converted and written straight to its place, so that host memory stays
    below the model (on a CPU) or nothing (elsewhere) plus the largest tensor. All headers are
    checked before anything is allocated. No code of the checkpoint is run, no pickle is read.

    Raises :class:`CheckpointError` as :func:`check_checkpoint` does.
    """
    checkpoint = check_checkpoint(folder, config)
    with torch.device("meta"):
        model = NemotronH(checkpoint.config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    _fill(model, checkpoint)
    return model


def _fill(model: NemotronH, checkpoint: Checkpoint) -> None:
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in checkpoint.tensors.items():
        by_file[tensor.file].append(name)
    parameters = dict(model.named_parameters())
    for file, names in by_file.items():
        try:
            with safe_open(str(file), framework="pt", device="cpu") as stored:
                for name in names:
                    weights = stored.get_tensor(checkpoint.tensors[name].stored_name)
                    parameters[name].copy_(weights)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}", "copy the checkpoint again"
            ) from error

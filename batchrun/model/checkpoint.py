"""The weight files of a checkpoint, judged by their headers alone: nothing is loaded, torch is not
needed. What passes here, :mod:`~batchrun.model.weights` can load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from batchrun.errors import CheckpointError
from batchrun.model.config import LayerKind, ModelConfig, load_config
from batchrun.model.headers import (
    COPY_AGAIN,
    ELEMENT_BYTES,
    MAX_HEADER_BYTES,
    StoredTensor,
    read_header,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose headers fit its config.

    ``config`` is as the weights have it: ``attention_bias`` and ``tie_word_embeddings`` are true
    only where the files agree (see :func:`check_checkpoint`). ``tensors`` is by the model's
    parameter names.
    """

    config: ModelConfig
    tensors: Mapping[str, StoredTensor]

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model of this config."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (vocab, hidden)}

    def add_linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    for i, kind in enumerate(config.layers):
        mixer = f"backbone.layers.{i}.mixer"
        shapes[f"backbone.layers.{i}.norm.weight"] = (hidden,)
        match kind:
            case LayerKind.MAMBA:
                inner, bias = config.mamba_inner_size, config.mamba_proj_bias
                add_linear(f"{mixer}.in_proj", config.mamba_proj_size, hidden, bias)
                shapes[f"{mixer}.conv1d.weight"] = (config.conv_dim, 1, config.conv_kernel)
                if config.use_conv_bias:
                    shapes[f"{mixer}.conv1d.bias"] = (config.conv_dim,)
                for name in ("A_log", "D", "dt_bias"):
                    shapes[f"{mixer}.{name}"] = (config.mamba_num_heads,)
                shapes[f"{mixer}.norm.weight"] = (inner,)
                add_linear(f"{mixer}.out_proj", hidden, inner, bias)
            case LayerKind.ATTENTION:
                q_size = config.num_attention_heads * config.head_dim
                kv_size = config.num_key_value_heads * config.head_dim
                add_linear(f"{mixer}.q_proj", q_size, hidden, config.attention_bias)
                add_linear(f"{mixer}.k_proj", kv_size, hidden, config.attention_bias)
                add_linear(f"{mixer}.v_proj", kv_size, hidden, config.attention_bias)
                add_linear(f"{mixer}.o_proj", hidden, q_size, config.attention_bias)
            case LayerKind.MLP:
                inner, bias = config.intermediate_size, config.mlp_bias
                add_linear(f"{mixer}.up_proj", inner, hidden, bias)
                add_linear(f"{mixer}.down_proj", hidden, inner, bias)
    shapes["backbone.norm_f.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def check_checkpoint(folder: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Prove from the headers that a folder holds exactly the weights of its config.

    Two keys mean different things to the two programs that write such checkpoints; there the files
    decide. ``attention_bias`` is ignored by transformers' own module: when no such bias is stored,
    there is none. ``tie_word_embeddings`` is obsolete where an ``lm_head`` is stored.

    Raises :class:`CheckpointError` naming file and tensor: files missing or cut off, weights that
    are not safetensors, tensors missing, unknown, of a wrong shape or type.
    """
    config = config or load_config(folder)
    files = weight_files(folder)
    stored: dict[str, StoredTensor] = {}
    for file, promised in files.items():
        found = read_header(file)
        for absent in sorted(set(promised) - set(found)):
            raise CheckpointError(
                f"{file} holds no tensor {absent}, though {INDEX_FILE} says so", COPY_AGAIN
            )
        for stored_name, tensor in found.items():
            name = _parameter_name(stored_name)
            if name in stored:
                raise CheckpointError(
                    f"tensor {name} stands twice: in {stored[name].file} and in {file}",
                    "remove the weight files that do not belong to this checkpoint",
                )
            stored[name] = tensor

    config = _as_stored(config, stored)
    expected = expected_tensors(config)
    where = next(iter(files)) if len(files) == 1 else folder
    for name in expected:
        if name not in stored:
            raise CheckpointError(
                f"{where}: tensor {name} is missing ({_count_missing(expected, stored)})",
                f"{COPY_AGAIN}, or check that config.json belongs to these weights",
            )
    for name, tensor in stored.items():
        if name not in expected:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.stored_name} belongs to no part of the model",
                "check that config.json belongs to these weights",
            )
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.stored_name} has the shape {list(tensor.shape)}; "
                f"config.json asks for {list(expected[name])}",
                "check that config.json belongs to these weights",
            )
        if tensor.dtype not in ELEMENT_BYTES:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.stored_name} is stored as {tensor.dtype}",
                "use the checkpoint with bfloat16 weights; quantised ones cannot be loaded",
            )
    return Checkpoint(config, {name: stored[name] for name in expected})


def weight_files(folder: Path) -> dict[Path, tuple[str, ...]]:
    """The weight files of a folder, each with the tensors that the index promises in it.

    ``model.safetensors``, or what ``model.safetensors.index.json`` lists, or all ``*.safetensors``.
    Raises :class:`CheckpointError` when there are none or one of them is missing.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return {single: ()}
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise _no_weights(folder)
        return dict.fromkeys(files, ())

    promised: dict[Path, tuple[str, ...]] = {}
    for tensor, name in _read_index(index).items():
        # A checkpoint is not trusted: its index may not point outside its folder.
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise CheckpointError(
                f"{index}: {name!r} is not the name of a safetensors file in this folder",
                "use a checkpoint whose weights are safetensors files beside their index",
            )
        promised[folder / name] = (*promised.get(folder / name, ()), tensor)
    missing = sorted(file.name for file in promised if not file.is_file())
    if missing:
        raise CheckpointError(
            f"{index} names weight files that are missing: {', '.join(missing)}", COPY_AGAIN
        )
    return dict(sorted(promised.items()))


_CONTENT_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Files beside the weights that decide what a prompt becomes and where an answer ends."""


def checkpoint_fingerprint(folder: Path) -> str:
    """A hash that tells checkpoints apart without reading their weights through.

    Covers config, tokenizer and chat template in full; of each weight file its name, size, header
    and last 64 KiB, so that weights trained further differ too. Where the folder lies, times and
    other files do not count.
    """
    digest = hashlib.sha256()
    texts = [folder / name for name in _CONTENT_FILES if (folder / name).is_file()]
    for path in [*texts, *weight_files(folder)]:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            digest.update(f"{path.name}\0{size}\0".encode())
            if path.suffix == ".safetensors":
                header_size = min(int.from_bytes(stream.read(8), "little"), MAX_HEADER_BYTES)
                digest.update(stream.read(header_size))
                stream.seek(max(0, size - 65536))
            digest.update(stream.read())
    return digest.hexdigest()


def _parameter_name(stored_name: str) -> str:
    """The model's name of a stored tensor: transformers 5 writes ``model.`` for ``backbone.``."""
    if stored_name.startswith("model."):
        return "backbone." + stored_name.removeprefix("model.")
    return stored_name


def _as_stored(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> ModelConfig:
    has_attention_bias = any(name.endswith(".q_proj.bias") for name in stored)
    return replace(
        config,
        attention_bias=config.attention_bias and has_attention_bias,
        tie_word_embeddings=config.tie_word_embeddings and "lm_head.weight" not in stored,
    )


def _count_missing(expected: Mapping[str, object], stored: Mapping[str, object]) -> str:
    missing = len(expected.keys() - stored.keys())
    return f"{missing} of {len(expected)} tensors are" if missing > 1 else "the only one"


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of weights: {error!r}", COPY_AGAIN) from (
            error
        )
    match weight_map:
        case {} if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            return dict(weight_map)
    raise CheckpointError(f"{index}: weight_map maps no tensors to files", COPY_AGAIN)


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
    if pickled:
        return CheckpointError(
            f"{folder} holds its weights only as {pickled[0]}, which can run code when loaded",
            "use the checkpoint's safetensors files, or convert it",
        )
    return CheckpointError(f"{folder} holds no weights: no {SINGLE_FILE}, no index", COPY_AGAIN)

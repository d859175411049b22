"""A whole checkpoint loads in every layout; a damaged one is refused with file and tensor named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from batchrun.errors import CheckpointError
from batchrun.model.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    check_checkpoint,
    checkpoint_fingerprint,
    expected_tensors,
)
from batchrun.model.config import ModelConfig
from batchrun.model.weights import load_model
from tests.unit.model.models import SMALL, random_model

CONFIG = replace(SMALL, layer_pattern="M*-", use_conv_bias=False)
IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"
O_PROJ = "backbone.layers.1.mixer.o_proj.weight"

Weights = dict[str, Tensor]


@pytest.fixture
def weights() -> Weights:
    """The weights of a random model, by the published names."""
    return dict(random_model(CONFIG).state_dict())


def load(folder: Path, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Weights:
    """The weights after loading."""
    return dict(load_model(folder, config, dtype, "cpu").state_dict())


def save_single(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write one file."""
    save_file(dict(weights), folder / SINGLE_FILE)
    return folder / SINGLE_FILE


def save_shards(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Write three files and their index; returns its map of tensors to files."""
    names = list(weights)
    weight_map = {
        name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file(
            {name: weights[name] for name in names if weight_map[name] == file}, folder / file
        )
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Write the index of shards."""
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / INDEX_FILE).write_text(text)


def assert_equal(actual: Weights, expected: Weights) -> None:
    """The same names with the same bits."""
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def assert_refused(folder: Path, *parts: str, config: ModelConfig = CONFIG) -> None:
    """Both the check and the loader refuse, in words that name ``parts``."""
    for judge in (lambda: check_checkpoint(folder, config), lambda: load(folder, config)):
        with pytest.raises(CheckpointError) as caught:
            judge()
        assert [part for part in parts if part not in caught.value.message] == []
        assert caught.value.hint


@pytest.mark.parametrize("save", [save_single, save_shards])
@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_layouts(
    save: Callable[[Path, Weights], object], prefix: str, weights: Weights, tmp_path: Path
) -> None:
    """One file or several with an index, names as published or as in transformers 5."""
    save(tmp_path, {name.replace("backbone.", prefix): weights[name] for name in weights})
    assert_equal(load(tmp_path), weights)
    assert check_checkpoint(tmp_path, CONFIG).size_bytes == sum(w.nbytes for w in weights.values())


def test_files_without_an_index(weights: Weights, tmp_path: Path) -> None:
    """A lost index is no loss while the files hold every tensor."""
    save_shards(tmp_path, weights)
    (tmp_path / INDEX_FILE).unlink()
    assert_equal(load(tmp_path), weights)


def test_types(weights: Weights, tmp_path: Path) -> None:
    """Weights stored as bfloat16 or float16 load in either dtype, frozen."""
    halves = {name: w.to([torch.bfloat16, torch.float16][i % 2]) for i, (name, w) in
              enumerate(weights.items())}  # fmt: skip
    save_single(tmp_path, halves)
    assert_equal(load(tmp_path), {name: w.float() for name, w in halves.items()})
    assert_equal(
        load(tmp_path, dtype=torch.bfloat16), {name: w.bfloat16() for name, w in halves.items()}
    )
    model = load_model(tmp_path, CONFIG, torch.float32, "cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_truncated(weights: Weights, tmp_path: Path) -> None:
    """A file cut off in its data, its header or its first bytes is named, with a tensor lost."""
    file = save_single(tmp_path, weights)
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert_refused(tmp_path, SINGLE_FILE, "cut off: 5 bytes", "lm_head.weight")
    file.write_bytes(whole[:100])
    assert_refused(tmp_path, SINGLE_FILE, "cut off inside its header")
    for rest in (whole[:5], b""):
        file.write_bytes(rest)
        assert_refused(tmp_path, SINGLE_FILE, "not a safetensors file")


def test_not_safetensors(tmp_path: Path) -> None:
    """Something else under the name of weights is never interpreted."""
    headers = [b"\xff" * 8, b"<html>not found</html>", b"{}", b"[]", b'{"a": 1}', b'{"a": {}}']
    for header in headers:
        data = len(header).to_bytes(8, "little") + header if header[:1] in b"{[" else header
        (tmp_path / SINGLE_FILE).write_bytes(data)
        assert_refused(tmp_path, SINGLE_FILE)


def test_garbled_offsets(weights: Weights, tmp_path: Path) -> None:
    """A header whose places contradict its shapes is refused when the weights are read."""
    file = save_single(tmp_path, weights)
    data = file.read_bytes()
    place = data.index(b'"data_offsets":[') + len(b'"data_offsets":[')
    file.write_bytes(data[:place] + b"9" + data[place + 1 :])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


def test_missing_tensors(weights: Weights, tmp_path: Path) -> None:
    """A tensor that is missing is named, and how many are."""
    del weights[O_PROJ]
    save_single(tmp_path, weights)
    assert_refused(tmp_path, SINGLE_FILE, O_PROJ, "missing", "the only one")
    del weights[IN_PROJ]
    save_single(tmp_path, weights)
    assert_refused(tmp_path, IN_PROJ, "2 of 19 tensors are")


def test_extra_tensor(weights: Weights, tmp_path: Path) -> None:
    """A tensor without a place is named: the config may be another model's."""
    extra = "model.layers.9.mixer.in_proj.weight"
    save_single(tmp_path, weights | {extra: torch.zeros(2)})
    assert_refused(tmp_path, SINGLE_FILE, extra, "belongs to no part of the model")


def test_wrong_shape(weights: Weights, tmp_path: Path) -> None:
    """A tensor of another shape is named with both shapes, transposed ones too."""
    save_single(tmp_path, weights | {O_PROJ: weights[O_PROJ].t().contiguous()})
    assert_refused(tmp_path, SINGLE_FILE, O_PROJ, "[96, 40]", "[40, 96]")


def test_quantised_tensor(weights: Weights, tmp_path: Path) -> None:
    """Weights of integers are refused, not converted."""
    save_single(tmp_path, weights | {O_PROJ: weights[O_PROJ].to(torch.int8)})
    assert_refused(tmp_path, SINGLE_FILE, O_PROJ, "I8")


def test_same_tensor_twice(weights: Weights, tmp_path: Path) -> None:
    """Two spellings of one name, or leftovers of another copy, are not silently resolved."""
    save_single(tmp_path, weights | {IN_PROJ.replace("backbone.", "model."): torch.zeros(2)})
    assert_refused(tmp_path, IN_PROJ, "twice")


def test_index_of_a_missing_file(weights: Weights, tmp_path: Path) -> None:
    """A half-copied checkpoint: the index names a file that is not there."""
    save_shards(tmp_path, weights)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert_refused(tmp_path, INDEX_FILE, "missing: model-00002-of-00003.safetensors")


def test_index_of_a_missing_tensor(weights: Weights, tmp_path: Path) -> None:
    """A tensor that the index promises in a file that does not hold it is named with the file."""
    weight_map = save_shards(tmp_path, weights)
    other = next(file for file in weight_map.values() if file != weight_map[IN_PROJ])
    write_index(tmp_path, weight_map | {IN_PROJ: other})
    assert_refused(tmp_path, IN_PROJ, other, INDEX_FILE)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "weights.bin", ""])
def test_index_that_points_elsewhere(name: str, weights: Weights, tmp_path: Path) -> None:
    """An index names safetensors files of its own folder and nothing else."""
    write_index(tmp_path, save_shards(tmp_path, weights) | {IN_PROJ: name})
    assert_refused(tmp_path, INDEX_FILE, repr(name))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_broken_index(text: str, tmp_path: Path) -> None:
    """An index that is none is named."""
    (tmp_path / INDEX_FILE).write_text(text)
    assert_refused(tmp_path, INDEX_FILE)


class Trap:
    """Writes a marker file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


def test_pickles_are_never_read(tmp_path: Path) -> None:
    """Pickled weights are refused without being opened, also under another name."""
    marker = tmp_path / "marker"
    for name, said in (("pytorch_model.bin", "can run code"), (SINGLE_FILE, "not a safetensors")):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(marker)))
        assert_refused(tmp_path, name, said)
    assert not marker.exists()


def test_no_weights(tmp_path: Path) -> None:
    """An empty folder is told apart from one of pickles."""
    assert_refused(tmp_path, "holds no weights")


def test_checks_read_no_weights(tmp_path: Path) -> None:
    """The headers are enough for a check: it passes on a file whose weights are a hole."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in expected_tensors(CONFIG).items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / SINGLE_FILE).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)  # a sparse file: no weights on the disk
    assert check_checkpoint(tmp_path, CONFIG).size_bytes == end


def test_fingerprint(weights: Weights, tmp_path: Path) -> None:
    """The fingerprint differs with weights, tokenizer and template, not with notes beside them."""
    (tmp_path / "tokenizer.json").write_text("{}")
    save_single(tmp_path, weights)
    seen = [checkpoint_fingerprint(tmp_path)]
    (tmp_path / "notes.json").write_text("{}")
    seen.append(checkpoint_fingerprint(tmp_path))
    assert seen[0] == seen[1]
    save_single(tmp_path, {name: w + 1 for name, w in weights.items()})
    seen.append(checkpoint_fingerprint(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{ }")
    seen.append(checkpoint_fingerprint(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    seen.append(checkpoint_fingerprint(tmp_path))
    assert len(set(seen)) == 4

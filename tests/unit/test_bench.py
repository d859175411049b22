"""The micro-benchmark's arithmetic and its report. What it times is never asserted on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.bench import Workload, run_bench
from batchrun.engine.accelerators import Accelerator
from batchrun.engine.options import EngineOptions
from batchrun.engine.rates import DeviceRates
from batchrun.engine.roofline import decode_work
from batchrun.errors import RequestError
from batchrun.model.config import ModelConfig, parse_config
from batchrun.model.sizes import count_weights
from batchrun.model.weights import load_model

TOY: dict[str, object] = {
    "model_type": "nemotron_h",
    "vocab_size": 61,
    "hidden_size": 40,
    "hybrid_override_pattern": "M-M*-",
    "intermediate_size": 72,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "ssm_state_size": 12,
    "n_groups": 3,
    "chunk_size": 8,
}
OPTIONS = EngineOptions(device="cpu", random_weights=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds a config and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(TOY))
    return tmp_path


def test_a_report(folder: Path) -> None:
    """Every batch size once, in the order asked for; the bound of a decode step is the roofline's
    for the measured rates; all that decides the figures stands beside them."""
    told: list[str] = []
    workload = Workload(batches=(3, 1, 3), prompt_tokens=20, decode_steps=4)
    options = replace(OPTIONS, state_dtype="bfloat16", max_batch_tokens=32)
    report = run_bench(
        folder, options, workload, name="toy", progress=told.append, rate_seconds=0.001
    )
    config = parse_config(TOY)
    assert report.config == config
    assert report.num_weights == count_weights(config).total
    assert (report.dtype, report.state_dtype, report.quantization) == (
        "float32",
        "bfloat16",
        "none",
    )
    assert told == ["loaded", "measured batch 3", "measured batch 1"]
    # Prompts go through 32 tokens at a time at most: 3 x 20 tokens need two passes, 20 one.
    assert sorted(report.rates.matmul_flops) == [1, 3, 20, 32]
    assert [one.batch for one in report.measurements] == [3, 1]
    for one in report.measurements:
        assert one.context_tokens == 20 + 2 + 2
        flops = report.rates.matmul_flops[one.batch]
        here = Accelerator("", 0, report.rates.copy_bandwidth, flops)
        step = decode_work(config, options.precision, one.batch, 24)
        assert one.decode_bound == pytest.approx(one.batch / step.seconds(here))
        assert one.decode_rate == pytest.approx(one.batch / one.step_seconds)
        assert one.decode_ratio == pytest.approx(one.decode_rate / one.decode_bound)
        assert one.overhead is not None and 0 < one.overhead < 1


def test_a_bench_file(folder: Path) -> None:
    """The document is JSON, names its format and its accelerator, and holds the model's config as
    it is read back."""
    workload = Workload(batches=(2,), prompt_tokens=5, decode_steps=2)
    report = run_bench(folder, OPTIONS, workload, name="toy", rate_seconds=0.001)
    document = json.loads(json.dumps(report.document()))
    assert (document["format"], document["version"]) == ("batchrun-bench", 1)
    assert document["accelerator"] == report.accelerator != ""
    assert ModelConfig(**document["model"]["config"]) == report.config
    assert document["model"]["random_weights"] is True
    [entry] = document["batches"]
    assert entry["batch"] == 2
    assert entry["decode"]["ratio"] == report.measurements[0].decode_ratio
    assert entry["prefill"]["bound"] == report.measurements[0].prefill_bound
    assert document["rates"]["matmul_flops"].keys() == {"2", "10"}


def test_what_does_not_fit_is_said(folder: Path) -> None:
    """A batch that memory does not hold is left out and named; the others are measured."""
    config = parse_config(TOY)
    memory = OPTIONS.precision.weight_bytes(config) + (6 << 20)
    workload = Workload(batches=(1, 5000), prompt_tokens=5, decode_steps=1)
    options = replace(OPTIONS, memory_bytes=memory, max_batch_tokens=64)
    report = run_bench(folder, options, workload, rate_seconds=0.001)
    assert [one.batch for one in report.measurements] == [1]
    assert report.skipped == (5000,)


def test_sequences_longer_than_the_model_are_refused(folder: Path) -> None:
    """The error says what was asked for and what there is."""
    workload = Workload(prompt_tokens=4000, decode_steps=100)
    with pytest.raises(RequestError, match=r"4000 prompt tokens and 100 steps .* 4096 tokens"):
        run_bench(folder, replace(OPTIONS, max_model_len=4096), workload)


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (1, 0)}, {"decode_steps": 0}])
def test_numbers_that_cannot_be(wrong: dict[str, object]) -> None:
    """No batch, or nothing to do in one."""
    with pytest.raises(RequestError, match="at least 1"):
        Workload(**wrong)  # type: ignore[arg-type]


def test_rates_add_up_to_the_fastest() -> None:
    """Of two measurements each rate is the larger one."""
    one, two = DeviceRates(5.0, {1: 2.0, 8: 9.0}), DeviceRates(4.0, {1: 3.0, 64: 1.0})
    assert one.fastest(two) == DeviceRates(5.0, {1: 3.0, 8: 9.0, 64: 1.0})


def test_without_weights_only_random_ones_load(folder: Path) -> None:
    """A folder without weights is no checkpoint to anybody else."""
    import torch

    from batchrun.errors import CheckpointError

    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model(folder, parse_config(TOY), torch.float32, "cpu")

"""The check of a GPU, on a CPU at toy size: what it would find there it finds here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gpu_check
from batchrun.model.ops import Selection
from batchrun.model.ops.plain import PlainOps
from tests.parity.oracle import CONFIGURATIONS
from tests.unit.model.published import NANO_9B_V2

CPU = torch.device("cpu")


def test_every_check_holds_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same checks with a toy model: all operators in both types, the model, the parity cases in
    bfloat16, recorded steps, memory, decode steps with their bound; one JSON file, exit code 0."""
    out = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--config", "toy", "--batches", "1", "4", "--context", "40"]
    assert gpu_check.main([*arguments, "--out", str(out)]) == 0
    assert "all checks hold" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["ok"] and report["failed"] == []
    found = {(o["operator"], o["dtype"]) for o in report["operator_differences"]}
    assert len(found) == 14 and ("ssd_scan", "torch.bfloat16") in found
    assert [m["against"] for m in report["model"]] == ["plain operators", "a prompt in pieces"]
    assert all(m["greedy_agreement"] == 1.0 for m in report["model"])
    cases = [found["case"] for found in report["parity"]]
    assert cases[::2] == cases[1::2] == [*CONFIGURATIONS, "the model's shapes"]
    assert all(0 < found["distance"] <= found["tolerance"] < 0.05 for found in report["parity"])
    assert [g["batch"] for g in report["graphs"]] == [1, 3, 5]
    assert [step["batch"] for step in report["decode"]] == [1, 4]
    assert all(0 < step["of_bound"] for step in report["decode"])


def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is off by a little more than rounding is named, and so is the model it spoils."""

    class Wrong(PlainOps):
        def gated_norm(
            self, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
        ) -> Tensor:
            return super().gated_norm(y, z, weight, group_size, eps) * 1.03

    selection = Selection(Wrong(), "wrong ones")
    monkeypatch.setattr(gpu_check, "select_ops", lambda *_: selection)
    report = gpu_check.run_checks(gpu_check.CONFIGS["toy"], CPU, batches=(1,), context=40)
    assert not report["ok"]
    named = {(found["check"], found.get("operator")) for found in report["failed"]}
    assert ("operator_differences", "gated_norm") in named
    assert {("model", None), ("parity", None)} <= named
    assert {name for check, name in named if check == "operator_differences"} == {"gated_norm"}


def test_parity_needs_transformers_and_survives_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the check is skipped, and says so; a case that raises is one that failed, with the
    reason, and the others are checked."""
    config = gpu_check.CONFIGS["toy"]
    plan = gpu_check.plan_memory(
        config, gpu_check.MemoryRequest(64 << 20, gpu_check.Precision(), num_forced=0)
    )
    setting = gpu_check.Setting(config, CPU, torch.bfloat16, Selection(PlainOps(), ""), plan)

    def parity_of(_: object, seed: int, __: object) -> list[dict[str, object]]:
        if seed == 1:
            raise RuntimeError("out of registers")
        return [{"ok": True}]

    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "parity_of", parity_of)
        found = gpu_check.check_parity(setting)
    assert [one["ok"] for one in found] == [True, False, *[True] * (len(CONFIGURATIONS) - 1)]
    assert found[1]["error"] == "RuntimeError: out of registers"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    [skipped] = gpu_check.check_parity(setting)
    assert skipped["ok"] and skipped["skipped"].startswith("transformers is not installed")


def test_nan_is_no_small_difference() -> None:
    """What is not finite is infinitely far from everything."""
    good, bad = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert gpu_check.difference(good * 1.5, good) == pytest.approx(0.5)
    assert gpu_check.distance(good * 1.5, good) == pytest.approx(0.5)
    assert gpu_check.difference(bad, good) == gpu_check.distance(bad, good) == float("inf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, what is missing, what to do, and no file."""
    assert gpu_check.main(["--out", str(tmp_path / "none.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: torch finds no GPU on this machine\nhint: batchrun doctor")
    assert list(tmp_path.iterdir()) == []


def test_the_published_configuration_is_checked() -> None:
    """Its sizes are those of the published config.json."""
    config, published = gpu_check.CONFIGS["9b-v2"], NANO_9B_V2
    assert config.layer_pattern == published["hybrid_override_pattern"]
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "mamba_num_heads", "mamba_head_dim", "ssm_state_size",
        "chunk_size", "conv_kernel", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(config, name) == published[name], name
    assert config.num_groups == published["n_groups"]

"""``batchrun bench``: what is printed where, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import batchrun
from batchrun.cli import main
from tests.unit.test_bench import TOY

TINY = Path(batchrun.__file__).parent / "models" / "tiny"


def run(*args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call."""
    result = CliRunner().invoke(main, ("bench", *args), prog_name="batchrun")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of the device are measured for a moment only: what they are is not looked at."""
    from batchrun.engine import rates

    def measure(*args: object, seconds: float) -> rates.DeviceRates:
        batches = args[3]
        assert isinstance(batches, list) and seconds > 0
        return rates.DeviceRates(1e9, dict.fromkeys(batches, 1e12))

    monkeypatch.setattr("batchrun.bench.measure_rates", measure)


def test_json_is_the_bench_file(tmp_path: Path) -> None:
    """With ``--config`` weights are random; stdout and the file of ``--output`` are the same JSON
    document; bounds follow from the rates."""
    config, file = tmp_path / "sizes.json", tmp_path / "bench.json"
    config.write_text(json.dumps(TOY))
    code, out, _ = run(
        "--config", str(config), "--batch", "2,1", "--prompt-tokens", "4", "--decode-steps", "2",
        "--json", "--output", str(file), "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    document = json.loads(out)
    assert document == json.loads(file.read_text())
    assert document["model"]["path"] == str(config)
    assert [entry["batch"] for entry in document["batches"]] == [2, 1]
    # At 1 GB/s and 1 TFLOP/s nothing here waits for arithmetic.
    assert {entry["decode"]["bound_by"] for entry in document["batches"]} == {"bandwidth"}
    assert document["rates"]["copy_bytes_per_second"] == 1e9


def test_people_read_stderr() -> None:
    """The embedded model by default; conditions and a line a batch on stderr; stdout is empty."""
    code, out, err = run("--batch", "2", "--prompt-tokens", "4", "--decode-steps", "2")
    assert (code, out) == (0, "")
    lines = err.splitlines()
    assert lines[:2] == ["loaded", "measured batch 2"]
    assert "tiny: 691,236 weights" in err
    assert "copy 1.0 GB/s; matrices in GFLOP/s: 1,000 with 2, 1,000 with 8 tokens" in err
    assert lines[-1].split()[0] == "2" and lines[-1].count("%") == 3


@pytest.mark.parametrize("text", ["0", "1,x", "", "-3,1"])
def test_batches_that_are_none(text: str) -> None:
    """Refused as usage, naming what was given."""
    code, _, err = run("--batch", text)
    assert code == 2
    assert "is not a list of positive numbers such as 1,8,64" in err


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    """An error of the checkpoint, not a traceback."""
    code, _, err = run("--model", str(tmp_path / "none"))
    assert code == 2
    assert "none does not exist" in err

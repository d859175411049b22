"""A plan of a job: for a GPU that is not here, for this machine, from measured rates."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.data import survey
from batchrun.data.checkpoints import find_checkpoint
from batchrun.data.store import Store
from batchrun.data.survey import Estimate
from batchrun.errors import CheckpointError, JobError, RequestError
from batchrun.job import Job
from batchrun.planner.benchfile import read_bench
from batchrun.planner.outputs import Range
from batchrun.planner.plan import Plan, plan_job
from batchrun.planner.requests import count_requests
from tests.conftest import S3Server
from tests.unit.model.published import NANO_9B_V2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an input, and a checkpoint of the 9B model's config without its weights."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"q": ["3+4?", "What is 5+6?"]}), tmp_path / f"in/{name}.parquet")
    model = tmp_path / "model"
    shutil.copytree(find_checkpoint("tiny"), model)
    (model / "model.safetensors").unlink()
    (model / "config.json").write_text(json.dumps(NANO_9B_V2))
    return tmp_path


def job_in(folder: Path, **sections: dict[str, object]) -> Job:
    """A job over the folder's input."""
    sections.setdefault("model", {"path": f"{folder}/model", "max_model_len": 4096})
    sections.setdefault("input", {"path": f"{folder}/in", "prompt_column": "q"})
    return Job.model_validate({"output": {"path": f"{folder}/out"}, **sections})


BENCH: dict[str, Any] = {
    "format": "batchrun-bench",
    "version": 1,
    "accelerator": "NVIDIA A10G",
    "device": "cuda",
    "memory_bytes": 23 << 30,
    "model": {"path": "other", "config": {}},
    "rates": {"copy_bytes_per_second": 5e11, "matmul_flops": {"8": 4e12, "1024": 7e13}},
    "prompt_tokens": 128,
    "batches": [{"batch": 8, "decode": {"ratio": 0.8}, "prefill": {"ratio": 0.6}}],
}


def test_the_9b_model_on_an_a10g(folder: Path) -> None:
    """Without weights and without a GPU: the whole memory, bounds and hours of one worker."""
    job = job_in(folder, resources={"workers": 3, "price_per_gpu_hour": 2.0})
    plan = plan_job(job, accelerator="a10g")
    assert plan.num_parameters == 8_888_227_328
    target, memory = plan.target, plan.target.memory
    assert (target.name, target.dtype, target.is_gpu) == ("A10G", "bfloat16", True)
    assert memory.weight_bytes == 17_776_454_656
    assert sum(row.size_bytes for row in memory.table) == 22.06 * 2**30 // 1
    assert 20 <= plan.prediction.sequences <= 25
    step = 17 / 600 + plan.prediction.sequences * 2 * 0.1435 / 600
    assert plan.prediction.step_seconds == pytest.approx(step, rel=0.05)
    one, two, _ = plan.prediction.durations
    assert (one.workers, two.workers, two.busy) == (1, 2, 2)
    assert (plan.input.rows.value, plan.input.shards.value) == (4, 2)
    document = json.loads(json.dumps(plan.to_json()))
    assert document["accelerator"]["name"] == "A10G"
    [first, *_] = document["durations"]
    assert first["cost"]["high"] == pytest.approx(2 * first["worker_hours"]["high"])
    assert document["prompts"]["total"] == {"value": plan.census.total.value, "error": 0}
    assert not (folder / "out").exists()


def test_the_job_names_the_accelerator(folder: Path) -> None:
    """The device is the job's own where none is asked for; one that is not known is refused."""
    job = job_in(folder, resources={"accelerator_type": "L4"})
    assert plan_job(job).target.name == "L4"
    assert plan_job(job, accelerator="H100").target.name == "H100"
    with pytest.raises(RequestError) as caught:
        plan_job(job, accelerator="T800")
    assert "A10G, L4" in caught.value.hint


def test_a_bench_file(folder: Path) -> None:
    """Its rates and shares of the bounds take the place of the data sheet and of assumptions."""
    path = folder / "bench.json"
    path.write_text(json.dumps(BENCH))
    job = job_in(folder)
    plan = plan_job(job, bench=path)
    target = plan.target
    assert target.name == "A10G"
    assert target.decode_device.bandwidth == 5e11
    assert target.prefill_device.flops == 7e13
    assert target.decode.share == Range(pytest.approx(0.68), 0.8, pytest.approx(0.88))
    assert "of another model" in plan.notes[-1]
    assert (
        plan.prediction.decode.rate.expected
        < plan_job(job, accelerator="A10G").prediction.decode.bound
    )
    assert plan_job(job, accelerator="A10", bench=path).target.decode.share.expected == 0.8
    with pytest.raises(RequestError, match="of NVIDIA A10G, not of L4"):
        plan_job(job, accelerator="L4", bench=path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "else"}, "not a bench file"),
        ({"version": 9}, "another version"),
        ({"batches": []}, "no batch"),
        ({"batches": [{"batch": 8}]}, "damaged"),
        ({"rates": {}}, "damaged"),
    ],
)
def test_a_wrong_bench_file(tmp_path: Path, change: dict[str, object], said: str) -> None:
    """What is no bench file is refused with the way to make one."""
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**copy.deepcopy(BENCH), **change}))
    with pytest.raises(RequestError, match=said) as caught:
        read_bench(path)
    assert "batchrun bench --output" in caught.value.hint


def test_this_machine(folder: Path) -> None:
    """Without a name a small model is planned for this CPU, after its engine was measured."""
    plan = plan_job(job_in(folder, model={"path": "tiny"}))
    target = plan.target
    assert not target.is_gpu and target.num_cpus
    assert "measured" in target.decode.basis
    assert plan.prediction.decode.rate.expected > 10
    [only] = plan.prediction.durations
    assert 0 < only.seconds.low < only.seconds.expected < only.seconds.high


def test_a_model_too_big_for_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model does not fit here, the way to plan for another device is said."""
    from batchrun.engine.options import EngineOptions

    monkeypatch.setattr(EngineOptions, "free_memory_bytes", lambda _self: 1 << 30)
    with pytest.raises(CheckpointError, match="on this machine the model does not fit") as caught:
        plan_job(job_in(folder))
    assert "--accelerator" in caught.value.hint


def test_a_cpu_by_its_bench_file(folder: Path) -> None:
    """A bench file of a CPU plans for that CPU."""
    path = folder / "bench.json"
    path.write_text(json.dumps({**BENCH, "device": "cpu", "accelerator": "A CPU"}))
    target = plan_job(job_in(folder, model={"path": "tiny"}), bench=path).target
    assert (target.name, target.is_gpu, target.dtype) == ("A CPU", False, "float32")
    assert target.decode_device.bandwidth == 5e11


def test_requests(folder: Path) -> None:
    """Of object storage a local job asks nothing, another one reads, parts and journal."""
    local = job_in(folder)
    facts = {"num_files": 10, "size_bytes": 80 << 20, "num_shards": 20.0, "seconds": 600.0}
    assert count_requests(local, workers=4, **facts) == ()  # type: ignore[arg-type]
    far = job_in(
        folder,
        input={"path": "s3://b/in", "prompt_column": "q"},
        output={"path": "s3://b/out"},
    )
    found = {one.kind: one.count for one in count_requests(far, workers=4, **facts)}  # type: ignore[arg-type]
    assert found["put parts"] == 20
    assert found["put journal"] == 4 * 600 / 30
    assert found["get footers"] == 40
    assert found["get rows"] == 20 + 20 + 4 * 20
    assert found["put progress"] == 200


def test_object_storage(folder: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many files in object storage some footers are read, and rows, shards and tokens of all are
    estimated with an error that holds the truth; `exact` reads all. Requests are counted."""
    monkeypatch.setattr(survey, "MAX_FOOTERS", 12)
    store = Store.open(s3_server.url, s3_server.storage_options)
    num_rows = 0
    for number in range(40):
        texts = [f"What is {i} + {number}?" for i in range(900 if number == 5 else 20 + number)]
        num_rows += len(texts)
        pq.write_table(pa.table({"q": texts}), folder / "one.parquet")
        store.put(f"in/{number:02d}.parquet", (folder / "one.parquet").read_bytes())
    options = dict(s3_server.storage_options)
    job = job_in(
        folder,
        input={"path": f"{s3_server.url}/in", "prompt_column": "q", "storage_options": options},
        output={"path": f"{s3_server.url}/out", "storage_options": options},
    )
    real = plan_job(job, accelerator="A10G", exact=True)
    assert (real.input.num_footers, real.input.rows) == (40, Estimate(num_rows))
    assert real.census.is_exact and real.census.num_sampled == num_rows
    some = plan_job(job, accelerator="A10G")
    assert some.input.num_footers <= 12 and some.input.num_files == 40
    for found, truth in (
        (some.input.rows, num_rows),
        (some.input.shards, 40),
        (some.census.total, real.census.total.value),
    ):
        assert 0 < found.error < found.value
        assert abs(found.value - truth) < 1.5 * found.error
    assert {one.kind for one in some.requests} >= {"get footers", "put parts", "put journal"}
    assert store.list("out") == ()


def test_problems_of_the_job(folder: Path) -> None:
    """What `validate` would say ends the plan, but for weights that are not there."""
    with pytest.raises(JobError, match="no column 'qq'"):
        plan_job(job_in(folder, input={"path": f"{folder}/in", "prompt_column": "qq"}))


def test_expected_tokens(folder: Path) -> None:
    """A figure that a person gives makes the range narrower, and is said."""
    plan: Plan = plan_job(job_in(folder), accelerator="A10G", expect_tokens=50)
    assert plan.output == Range(50, 50, 50)
    assert "--expect-tokens" in plan.output_basis[0]

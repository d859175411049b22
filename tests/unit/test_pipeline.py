"""From leases to parts: what a worker does, without a worker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.completions import completion_of
from batchrun.data.checkpoints import find_checkpoint
from batchrun.data.inputs import list_input
from batchrun.data.schema import InputSchema
from batchrun.data.shards import plan_shards
from batchrun.data.writer import PartFile, PartFormat
from batchrun.engine.engine import Engine
from batchrun.engine.options import EngineOptions
from batchrun.engine.request import Output
from batchrun.errors import ShardError, StorageError
from batchrun.job import Job, parse_job
from batchrun.jobfile import JobSource
from batchrun.judge import Judge
from batchrun.metrics import ROOFLINE
from batchrun.pipeline import Pipeline
from batchrun.prompts import input_columns
from batchrun.records import Counts, Lease, Part, Shard
from batchrun.reports import WorkReport
from batchrun.rowrequests import row_seed
from batchrun.rows import Rows
from batchrun.scores import Scores


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The embedded model; few sequences, so that rows queue."""
    return Engine.load(find_checkpoint("tiny"), EngineOptions(max_sequences=8))


@pytest.fixture(autouse=True)
def whole_engine(engine: Engine) -> Iterator[None]:
    """After each test nothing is left in the engine, and it holds exactly what it should."""
    yield
    assert engine.num_unfinished == 0
    engine.check_integrity()


class Setup:
    """Input files, a job over them, and a pipeline whose parts end in ``published``."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        files: Sequence[Sequence[object]],
        job: Mapping[str, Mapping[str, object]] | None = None,
        extra: Mapping[str, Sequence[object]] | None = None,
    ) -> None:
        inputs = folder / "in"
        inputs.mkdir()
        for number, prompts in enumerate(files):
            columns = {"prompt": pa.array(prompts, pa.string()), **(extra or {})}
            pq.write_table(pa.table(columns), inputs / f"{number}.parquet")
        raw: dict[str, dict[str, object]] = {
            "model": {"path": "tiny"},
            "input": {"path": str(inputs), "prompt_column": "prompt", "columns": ["prompt"]},
            "generation": {"max_tokens": 64, "temperature": 0},
            "output": {"path": str(folder / "out")},
        }
        for section, values in (job or {}).items():
            raw[section] = {**raw.get(section, {}), **values}
        self.folder = folder
        self.job: Job = parse_job(JobSource.of_mapping(raw))
        found = list_input(str(inputs))
        schema = InputSchema.of(found, input_columns(self.job))
        self.shards: list[Shard] = list(
            plan_shards(
                found, carried=schema.columns.carried, max_tokens=64, n=self.job.generation.n
            )
        )
        self.published: dict[int, pa.Table] = {}
        self.pipeline = Pipeline(
            self.job,
            engine,
            self.publish,
            schema,
            PartFormat(
                run="r",
                n=self.job.generation.n,
                correct=self.job.evaluate is not None,
                tool_calls=self.job.has_tools,
            ),
        )

    def publish(self, part_file: PartFile, lease: Lease) -> Part:
        """Keep the part's rows instead of putting them anywhere."""
        number = lease.shard.number
        self.published[number] = pq.read_table(part_file.path)
        return Part(
            number,
            f"part-{number}",
            lease.attempt,
            part_file.size_bytes,
            part_file.sha256,
            part_file.num_rows,
            part_file.counts,
        )

    def lease(self, number: int) -> Lease:
        """The lease of a shard."""
        shard = self.shards[number]
        return Lease(shard, 1, f"attempt-{number}", Rows.all(shard.num_rows))

    def run(self, *numbers: int) -> list[WorkReport]:
        """Work the shards off; every report on the way."""
        for number in numbers or range(len(self.shards)):
            self.pipeline.start(self.lease(number))
        reports = []
        while not reports or not reports[-1].idle:
            reports.append(self.pipeline.work(0.5))
        self.pipeline.close()
        return reports


MakeSetup = Callable[..., Setup]


@pytest.fixture
def setup(tmp_path: Path, engine: Engine) -> MakeSetup:
    """Makes a :class:`Setup` over files of prompts."""
    return lambda *args, **more: Setup(tmp_path, engine, *args, **more)


def sums(count: int, start: int = 1) -> list[str]:
    """Questions of different lengths."""
    texts = []
    for number in range(start, start + count):
        terms = "+".join(str(1 + (number * 7 + term * 13) % 90) for term in range(2 + number % 4))
        texts.append(f"What is {terms}?")
    return texts


def test_rows_come_out_in_input_order(setup: MakeSetup) -> None:
    """A part has every row of its shard once, in input order, though rows end out of order."""
    made = setup([sums(30)])
    reports = made.run()
    table = made.published[0]
    assert table.column("prompt").to_pylist() == sums(30)
    assert table.column("id").to_pylist() == [f"0.parquet:{index}" for index in range(30)]
    assert set(table.column("finish_reason").to_pylist()) == {"stop"}
    [done] = reports[-1].done
    assert done.part.counts.rows == 30
    generated = sum(table.column("completion_tokens").to_pylist())
    assert done.part.counts.completion_tokens == generated > 0


def test_the_model_answers(setup: MakeSetup) -> None:
    """The completion is the bare number, the reasoning the trace before it."""
    made = setup([["What is 37+85+12?"]])
    made.run()
    [row] = made.published[0].to_pylist()
    assert row["completion"] == "134"
    assert row["reasoning"] == "37+85=122\n+12=134\n"


def test_rows_flow_across_shard_borders(setup: MakeSetup) -> None:
    """While the last rows of a shard run, rows of the next are answered already."""
    # One row of the first shard thinks much longer than all others take.
    long = "What is 11+22+33+44+55+66+77+88?"
    made = setup([[long], sums(24)])
    for number in (0, 1):
        made.pipeline.start(made.lease(number))
    finished_next = 0
    while 0 not in made.published:
        for item in made.pipeline.work(0.001).running:
            if item.shard == 1 and 0 not in made.published:
                finished_next = max(finished_next, item.counts.rows)
    while not made.pipeline.work(0.5).idle:
        pass
    made.pipeline.close()
    assert finished_next > 0
    assert made.published[1].num_rows == 24


def test_another_lease_is_wanted_before_the_engine_runs_dry(setup: MakeSetup) -> None:
    """Once a lease's rows are all read, the pipeline asks for more, and not before."""
    made = setup([sums(40), sums(4)])
    made.pipeline.start(made.lease(0))
    assert made.pipeline.work(0.0).num_wanted == 0
    wanted = 0
    while not made.published:
        report = made.pipeline.work(0.001)
        if report.running and not report.idle:
            wanted = max(wanted, report.num_wanted)
    made.pipeline.close()
    assert wanted > 0


def test_draining_gives_back(setup: MakeSetup) -> None:
    """A pipeline that drains gives back what it has, wants nothing and is idle."""
    made = setup([sums(5), sums(40)])
    made.pipeline.start(made.lease(0))
    made.pipeline.start(made.lease(1))
    made.pipeline.work(0.0)
    made.pipeline.draining = True
    report = made.pipeline.work(5.0)
    assert [item.attempt for item in report.returned] == ["attempt-0", "attempt-1"]
    assert (report.num_wanted, report.draining, report.idle) == (0, True, True)
    assert made.published == {}
    made.pipeline.close()


def test_bad_rows_are_error_rows(setup: MakeSetup) -> None:
    """Rows that cannot run are in the part with their error; their neighbours are answered."""
    prompts = [None, "What is 2+3?", "", " \n", "What is 4+4? " * 2000, "What is 9+1?"]
    made = setup([prompts])
    made.run()
    rows = made.published[0].to_pylist()
    kinds = [row["error"] and row["error"].split(":")[0] for row in rows]
    bad = "invalid_prompt"
    assert kinds == [bad, None, bad, bad, "too_long", None]
    assert [row["completion"] for row in rows] == [None, "5", None, None, None, "10"]
    assert [row["finish_reason"] for row in rows].count("error") == 4


def test_samples_differ_and_repeat(setup: MakeSetup, tmp_path: Path, engine: Engine) -> None:
    """The samples of a row draw different numbers, and the same ones in every run."""
    job = {"generation": {"n": 3, "temperature": 4.0, "top_p": 1.0}}
    made = setup([sums(6)], job)
    made.run()
    table = made.published[0]
    assert table.column("sample").to_pylist() == [0, 1, 2] * 6
    assert table.column("prompt").to_pylist() == [text for text in sums(6) for _ in range(3)]
    texts = [(row["reasoning"], row["completion"]) for row in table.to_pylist()]
    assert len(set(texts[:3])) > 1
    (tmp_path / "again").mkdir()
    again = Setup(tmp_path / "again", engine, [sums(6)], job)
    again.run()
    assert again.published[0].to_pylist() == table.to_pylist()


def test_texts_do_not_depend_on_what_runs_beside(tmp_path: Path) -> None:
    """With a deterministic engine a shard alone gives the bytes that it gives among others."""
    engine = Engine.load(
        find_checkpoint("tiny"), EngineOptions(max_sequences=4, deterministic=True)
    )
    job = {"generation": {"temperature": 4.0, "top_p": 1.0, "max_tokens": 24}}
    tables = []
    for name, order in (("all", (0, 1)), ("alone", (1,))):
        (tmp_path / name).mkdir()
        made = Setup(tmp_path / name, engine, [sums(5), sums(5, start=50)], job)
        made.run(*order)
        tables.append(made.published[1])
    assert tables[0].to_pylist() == tables[1].to_pylist()


def test_overrides_change_a_row(setup: MakeSetup) -> None:
    """Override columns hold for their own row; a value that cannot be is an error row."""
    extra = {
        "max_tokens": pa.array([None, 3, 0], pa.int64()),
        "reasoning": pa.array([False, None, None], pa.bool_()),
    }
    job = {"input": {"overrides": ["max_tokens", "reasoning"]}}
    made = setup([["What is 2+3?"] * 3], job, extra)
    made.run()
    first, second, third = made.published[0].to_pylist()
    assert (first["reasoning"], first["completion"], first["reasoning_tokens"]) == (None, "5", 0)
    assert second["reasoning_tokens"] + second["completion_tokens"] <= 3
    assert second["finish_reason"] == "length"
    assert third["error"].startswith("invalid_prompt: override column: max_tokens")


def test_slow_rows_time_out(setup: MakeSetup) -> None:
    """A row that takes longer than row_timeout_s is an error row; the others stay."""
    job = {
        "errors": {"row_timeout_s": 0.15},
        "input": {"overrides": ["ignore_eos", "max_tokens"]},
    }
    extra = {
        "ignore_eos": pa.array([True, False]),
        "max_tokens": pa.array([3500, 64], pa.int64()),
    }
    made = setup([["What is 2+3?", "What is 4+4?"]], job, extra)
    made.run()
    slow, quick = made.published[0].to_pylist()
    assert slow["error"] == "timeout: not finished within 0.15 s"
    assert quick["completion"] == "8"


def test_time_in_the_queue_is_not_the_rows(
    setup: MakeSetup, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that wait longer than row_timeout_s for the others before them are answered."""
    step, now = engine.step, 0.0

    def slow_step() -> list[Output]:
        nonlocal now
        now += 1.0
        return step()

    monkeypatch.setattr(engine, "step", slow_step)
    made = setup([sums(40)], {"errors": {"row_timeout_s": 100}})
    monkeypatch.setattr(made.pipeline, "_clock", lambda: now)
    reports = made.run()
    assert now > 150  # five rows on each sequence of the engine, of 30 steps and more
    assert made.published[0].column("error").null_count == 40
    seconds = [r.metrics.histograms.get(("batchrun_row_seconds", ())) for r in reports]
    assert sum(sum(item.counts) for item in seconds if item is not None) == 40


def test_rows_are_read_ahead_as_far_as_memory_allows(
    setup: MakeSetup, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen times what the engine runs, for the sake of the order; only a little more than it
    runs when texts are long, or when carried columns are."""
    made = setup([sums(200)])

    def num_read() -> int:
        made.pipeline.start(made.lease(0))
        made.pipeline._leases[0].reader._next.result()
        made.pipeline._admit()
        count = engine.num_unfinished
        made.pipeline._give_up(made.pipeline._leases[0], ShardError("enough"))
        return count

    assert num_read() == 16 * 8
    monkeypatch.setattr("batchrun.pipeline._MAX_HELD_BYTES", 1)
    assert num_read() == 10
    monkeypatch.undo()
    monkeypatch.setattr("batchrun.pipeline._MAX_WAITING_TOKENS", 1000)
    assert 10 < num_read() < 60
    made.pipeline.close()


def test_a_changed_file_fails_its_lease_alone(setup: MakeSetup) -> None:
    """A shard whose file changed after it was planned fails; the other shard is published."""
    made = setup([sums(20), sums(10)])
    pq.write_table(pa.table({"prompt": ["What is 1+1?"]}), made.folder / "in" / "0.parquet")
    reports = made.run()
    failed = [item for report in reports for item in report.failed]
    assert [item.lease.shard.number for item in failed] == [0]
    assert "changed" in failed[0].message and "0.parquet" in failed[0].message
    assert list(made.published) == [1]
    assert made.published[1].num_rows == 10


def test_an_empty_shard_has_an_empty_part(setup: MakeSetup) -> None:
    """A file without rows gives a part without rows."""
    made = setup([[], sums(2)])
    made.run()
    assert [made.published[number].num_rows for number in (0, 1)] == [0, 2]


def test_lost_storage_is_raised(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that cannot be published is nobody's row: work() raises what storage said."""
    made = setup([sums(3)])

    def refuse(part_file: PartFile, lease: Lease) -> Part:
        raise StorageError("the bucket is away")

    monkeypatch.setattr(made.pipeline._saving, "_publish", refuse)
    with pytest.raises(StorageError, match="the bucket is away"):
        made.run()
    made.pipeline.close()


def test_a_foreign_object_in_a_parts_place_fails_its_lease_alone(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody else put there stays, its shard fails with the reason, the others go on."""
    made = setup([sums(3), sums(3, 10)])
    publish = made.publish

    def refuse_first(part_file: PartFile, lease: Lease) -> Part:
        if lease.shard.number == 0:
            raise ShardError("part-0 is not ours", "move it away")
        return publish(part_file, lease)

    monkeypatch.setattr(made.pipeline._saving, "_publish", refuse_first)
    reports = made.run()
    assert [(f.lease.shard.number, f.message) for r in reports for f in r.failed] == [
        (0, "part-0 is not ours (move it away)")
    ]
    assert [d.part.shard for r in reports for d in r.done] == [1]


def test_finish_publishes_what_is_complete(setup: MakeSetup) -> None:
    """At the end of its time a worker publishes complete parts and gives up the rest."""
    made = setup([["What is 2+3?"], sums(40)])
    for number in (0, 1):
        made.pipeline.start(made.lease(number))
    until = time.monotonic() + 30
    while time.monotonic() < until:
        made.pipeline._admit()
        made.pipeline._rows.step()
        writer = made.pipeline._leases[0].writer
        if writer is not None and writer.is_complete:
            break
    report = made.pipeline.finish(10.0)
    assert [done.part.shard for done in report.done] == [0]
    assert list(made.published) == [0]


ANSWERS = pa.array(["5", "9", None, "7", "x"])


@pytest.mark.parametrize("scorer", ["exact", "number", "regex", "math"])
def test_answers_are_scored(setup: MakeSetup, scorer: str) -> None:
    """Each scorer gives its verdicts in order; failed rows are wrong, and keep their error."""
    prompts = ["What is 2+3?", "What is 4+4?", "What is 1+1?", "", "What is 3+3?"]
    evaluate = {"answer_column": "a", "scorer": scorer}
    if scorer == "regex":
        evaluate["pattern"] = r"\d+"
    made = setup([prompts], {"evaluate": evaluate}, {"a": ANSWERS})
    reports = made.run()
    rows = made.published[0].to_pylist()
    last = None if scorer == "number" else False
    assert [row["correct"] for row in rows] == [True, False, None, False, last]
    assert [row["completion"] for row in rows] == ["5", "8", "2", None, "6"]
    assert rows[3]["error"].startswith("invalid_prompt")
    [done] = reports[-1].done
    wrong = 2 if last is None else 3
    assert done.part.counts.scores == Scores((wrong, 1), 1)


def test_samples_of_a_row_are_scored_each(setup: MakeSetup) -> None:
    """With n samples each has its verdict, and what a worker counts as it goes is the same."""
    job = {
        "generation": {"n": 3, "temperature": 1.0, "top_p": 1.0},
        "evaluate": {"answer_column": "a", "scorer": "regex", "pattern": r"\d+"},
    }
    answers = [str(sum(map(int, text[8:-1].split("+")))) for text in sums(12)]
    made = setup([[*sums(12), None]], job, {"a": pa.array([*answers, "1"])})
    seen: list[Counts] = []
    made.pipeline.start(made.lease(0))
    while not (report := made.pipeline.work(0.05)).idle:
        seen += [item.counts for item in report.running]
    made.pipeline.close()
    [done] = report.done
    rows = made.published[0].to_pylist()
    expected = [answer for answer in [*answers, "1"] for _ in range(3)]
    assert [row["correct"] for row in rows] == [
        row["completion"] == answer for row, answer in zip(rows, expected, strict=True)
    ]
    scores = done.part.counts.scores
    assert scores is not None and (scores.num_rows, scores.num_samples) == (13, 3)
    assert scores.num_correct == sum(row["correct"] for row in rows) > 0
    assert scores.majority_correct <= sum(scores.rows_by_correct[1:])
    assert all(counts.scores is None or counts.scores.num_rows <= counts.rows for counts in seen)


def test_an_endless_answer_holds_up_nobody(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scorer that takes too long runs beside the engine, and its sample is not correct."""
    monkeypatch.setattr(Judge.__init__, "__defaults__", (0.5,))
    evaluate = {"answer_column": "a", "scorer": "regex", "pattern": r"(1+)+$|(\d)"}
    made = setup([["What is 2+3?", "What is 4+4?"]], {"evaluate": evaluate},
                 {"a": pa.array(["5", "8"])})  # fmt: skip
    monkeypatch.setattr(
        "batchrun.openrows.completion_of",
        lambda row, output: replace(
            completion_of(row, output), completion="1" * 60 + "x" if row.index == 0 else "8"
        ),
    )
    made.run()
    assert [row["correct"] for row in made.published[0].to_pylist()] == [False, False]


def test_a_lease_that_is_given_up_takes_its_scores_with_it(setup: MakeSetup) -> None:
    """Verdicts that come for a failed shard are dropped; the other shard is whole."""
    evaluate = {"answer_column": "prompt", "scorer": "regex", "pattern": "x"}
    made = setup([sums(20), sums(10)], {"evaluate": evaluate})
    pq.write_table(pa.table({"prompt": ["What is 1+1?"]}), made.folder / "in" / "0.parquet")
    made.run()
    assert list(made.published) == [1]
    assert made.published[1]["correct"].to_pylist() == [False] * 10


def test_metrics_add_up(setup: MakeSetup, engine: Engine) -> None:
    """Tokens in the metrics are those of the part; tokens of prompts are either computed or not,
    and not computed is what a system prompt of all rows says after the first of them."""
    before = engine.stats()
    system = "Answer the question. " * 8
    made = setup([sums(12)], {"input": {"system": system}})
    reports = made.run()
    table = made.published[0]

    def counted(kind: str) -> float:
        key = ("batchrun_tokens_total", (kind,))
        return sum(report.metrics.counters.get(key, 0) for report in reports)

    for kind in ("reasoning", "completion"):
        assert counted(kind) == sum(table.column(f"{kind}_tokens").to_pylist()) > 0
    prompts = table.column("prompt_tokens").to_pylist()
    assert counted("prompt") + counted("prefix_cached") == sum(prompts)
    assert counted("prefix_cached") >= 11 * 64
    stats = engine.stats()
    assert stats.prefix_tokens - before.prefix_tokens == counted("prefix_cached")
    assert stats.prompt_tokens - before.prompt_tokens == counted("prompt")
    assert reports[-1].prefix_tokens == stats.prefix_tokens - before.prefix_tokens
    seconds = [r.metrics.histograms.get(("batchrun_row_seconds", ())) for r in reports]
    assert sum(sum(item.counts) for item in seconds if item is not None) == 12


def test_row_seed_never_changes() -> None:
    """The seed of a row is the same in every version, and 63 bits wide."""
    assert row_seed(0, "a.parquet", 0) == 7054246448551598956
    assert row_seed(0, "a.parquet", 1) != row_seed(0, "a.parquet", 0)
    assert row_seed(1, "a.parquet", 0) != row_seed(0, "a.parquet", 0)
    assert row_seed(0, "b.parquet", 0) != row_seed(0, "a.parquet", 0)
    assert all(0 <= row_seed(0, "a", index) < 2**63 for index in range(1000))


def test_tool_calls_leave_the_text(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls become a column and the reason why the row ended; malformed ones stay text and are
    counted; scores see the text around the calls."""
    said = [
        'It is 8.\n<TOOLCALL>[{"name": "add", "arguments": {"a": 1}}]</TOOLCALL>',
        '8 <TOOLCALL>[{"name": "add"',
        "8",
    ]
    monkeypatch.setattr(
        "batchrun.openrows.completion_of",
        lambda row, output: replace(completion_of(row, output), completion=said[row.index]),
    )
    job = {
        "generation": {"tools": [{"name": "add"}], "max_tokens": 4},
        "evaluate": {"answer_column": "answer", "scorer": "number"},
    }
    made = setup([sums(3)], job, {"answer": [8, 8, 8]})
    reports = made.run()
    table = made.published[0].to_pydict()
    assert table["completion"] == ["It is 8.\n", said[1], "8"]
    assert table["tool_calls"] == [[{"name": "add", "arguments": '{"a": 1}'}], None, None]
    assert [reason == "tool_calls" for reason in table["finish_reason"]] == [True, False, False]
    assert table["error"] == [None] * 3
    assert table["correct"] == [True] * 3
    [done] = [item for report in reports for item in report.done]
    assert done.part.counts.malformed_tool_calls == 1


def test_tools_of_each_row(setup: MakeSetup) -> None:
    """With the override column `tools` each row has its own prompt; a bad schema fails its row."""
    tools = ['[{"name": "add"}]', None, '[{"nam": "add"}]']
    job = {"input": {"overrides": ["tools"]}, "generation": {"max_tokens": 4}}
    made = setup([["1+2?"] * 3], job, {"tools": tools})
    made.run()
    table = made.published[0].to_pydict()
    assert table["prompt_tokens"][0] > table["prompt_tokens"][1] > 0
    assert table["error"][2] == "invalid_prompt: override column: tools[0] has no name"
    assert table["tool_calls"] == [None] * 3


def test_without_tools_a_call_is_text(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tools, no column, nothing taken out of the text."""
    said = '<TOOLCALL>[{"name": "add", "arguments": {}}]</TOOLCALL>'
    monkeypatch.setattr(
        "batchrun.openrows.completion_of",
        lambda row, output: replace(completion_of(row, output), completion=said),
    )
    made = setup([sums(1)])
    made.run()
    assert made.published[0]["completion"].to_pylist() == [said]
    assert "tool_calls" not in made.published[0].schema.names


def test_conversations_with_calls_from_parquet(setup: MakeSetup) -> None:
    """Messages as structs have null calls where there are none, and null content beside calls."""
    call = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    turn = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))]
    )
    asked = {"role": "user", "content": "1+2?", "tool_calls": None}
    called = {"role": "assistant", "content": None}
    called |= {"tool_calls": [{"name": "add", "arguments": "{}"}]}
    told = {"role": "tool", "content": "3", "tool_calls": None}
    turns = [[asked], [asked, called, told], [asked, {**told, "tool_calls": called["tool_calls"]}]]
    made = setup(
        [["-"] * 3],
        {"input": {"prompt_column": None, "messages_column": "m"}, "generation": {"max_tokens": 4}},
        {"m": pa.array(turns, pa.list_(turn))},
    )
    made.run()
    table = made.published[0].to_pydict()
    assert table["error"] == [
        None,
        None,
        "invalid_prompt: column m, message 1: only an assistant message can have tool calls",
    ]
    assert table["prompt_tokens"][1] > table["prompt_tokens"][0]


def test_a_response_format_binds_every_row(tmp_path: Path, engine: Engine) -> None:
    """All completions of a part are of the job's format; the reasoning beside them is free."""
    schema = {"type": "object", "properties": {"sum": {"type": "integer", "maximum": 99}}}
    schema |= {"required": ["sum"], "additionalProperties": False}
    generation = {"response_format": {"type": "json_schema", "schema": schema}, "max_tokens": 96}
    questions = [f"What is {number}+4?" for number in range(12)]
    setup = Setup(tmp_path, engine, [questions], {"generation": generation})
    setup.run()
    rows = setup.published[0].to_pylist()
    assert len(rows) == 12
    for row in rows:
        assert row["finish_reason"] == "stop" and row["error"] is None
        assert set(json.loads(row["completion"])) == {"sum"}
        assert row["reasoning"].startswith(row["prompt"].split()[-1].rstrip("?") + "=")


def test_the_ratio_to_the_bound_is_measured(
    setup: MakeSetup, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the engine knows the least time of its steps, the share of it is a gauge; for the
    embedded model it does not, and there is none."""
    made = setup([["What is 1+1?"]])
    assert engine.stats().least_seconds is None
    stats = engine.stats
    gauges = []
    for seconds, least in ((0.0, None), (8.0, 2.0), (9.0, 2.5), (18.0, 7.0)):
        known = replace(stats(), step_seconds=seconds, least_seconds=least)
        monkeypatch.setattr(engine, "stats", lambda known=known: known)
        if not gauges:
            monkeypatch.setattr(made.pipeline._gauges, "_before", known)
        gauges.append(made.pipeline.work(0.0).metrics.gauges.get((ROOFLINE.name, ())))
    made.pipeline.close()
    assert gauges == [None, 0.25, None, 0.5]


def test_rows_that_fail_are_reported_by_kind(setup: MakeSetup) -> None:
    """The first of each kind by its id, with how many there were; each once."""
    made = setup([["What is 1+1?", None, "  ", "x" * 3 * 4000, None]])
    failures = [item for report in made.run() for item in report.failures]
    assert [(item.kind.value, item.num_rows, item.shard, item.row_id) for item in failures] == [
        ("invalid_prompt", 3, 0, "0.parquet:1"),
        ("too_long", 1, 0, "0.parquet:3"),
    ]

"""What a run came to, for people."""

from __future__ import annotations

from dataclasses import replace

from batchrun.cli.runner import summary_text
from batchrun.cli.status import status_text
from batchrun.cluster.summary import Retried, Summary
from batchrun.coordinator import OutcomeKind
from batchrun.data.status import RunStatus
from batchrun.records import Counts, ErrorKind


def summary(counts: Counts) -> Summary:
    """The end of a run with these counts."""
    return Summary(
        name="job",
        run_id="run",
        output="out",
        outcome=OutcomeKind.SUCCESS,
        message="",
        total_rows=4,
        counts=counts,
        failed_rows=0,
        num_shards=1,
        failed_shards={},
        journaled_rows=0,
        generated_rows=4,
        generated_tokens=10,
        sampled_tokens=10,
        prefix_tokens=0,
        discarded_tokens=0,
        restarts=0,
        elapsed_s=1.0,
        startup_s=0.5,
    )


def test_malformed_tool_calls_are_told() -> None:
    """Only where there are some: in the text of a summary, and always in JSON."""
    some = summary(Counts(rows=4, malformed_tool_calls=3))
    assert "  tool calls that cannot be read, kept as text: 3" in summary_text(some).splitlines()
    assert some.to_json()["malformed_tool_calls"] == 3
    none = summary(Counts(rows=4))
    assert "tool calls" not in summary_text(none)
    assert none.to_json()["malformed_tool_calls"] == 0


def test_a_retry_tells_what_it_healed() -> None:
    """For people and in JSON; cut off, it says how much of it is done and how to go on."""
    kinds = (ErrorKind.TIMEOUT,)
    made = replace(summary(Counts(rows=4)), retried=Retried(kinds, 3, 3, 2, unfinished_shards=1))
    lines = summary_text(made).splitlines()
    assert "  3 rows were tried again, 2 of them healed" in lines
    assert "  1 shards are not finished yet: submit the job to run them" in lines
    retried = made.to_json()["retried"]
    assert retried == {
        "errors": ["timeout"], "rows": 3, "done": 3, "healed": 2, "unfinished_shards": 1
    }  # fmt: skip
    nothing = replace(made, retried=Retried(kinds, 0, 0, 0))
    assert "tried again" not in summary_text(nothing)  # which was said when it began
    cut = replace(made, retried=Retried(kinds, 3, 1, 1), outcome=OutcomeKind.INTERRUPTED)
    assert cut.error is not None and "1 of 3 rows to be retried are done" in cut.error.message
    assert (cut.exit_code, "the same retry goes on" in cut.error.hint) == (75, True)
    assert "retried" not in summary(Counts()).to_json()


def test_status_tells_malformed_tool_calls() -> None:
    """Also of a run that goes on."""
    for counts, shown in ((Counts(rows=4, malformed_tool_calls=3), True), (Counts(rows=4), False)):
        status = RunStatus("run", False, True, 1, 1, {}, 4, counts, None, None)
        text = status_text("out", status)
        assert ("  calls   3 cannot be read, kept as text" in text.splitlines()) is shown

"""What a run came to, for people."""

from __future__ import annotations

from batchrun.cli.runner import summary_text
from batchrun.cli.status import status_text
from batchrun.cluster.summary import Summary
from batchrun.coordinator import OutcomeKind
from batchrun.data.status import RunStatus
from batchrun.records import Counts


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


def test_status_tells_malformed_tool_calls() -> None:
    """Also of a run that goes on."""
    for counts, shown in ((Counts(rows=4, malformed_tool_calls=3), True), (Counts(rows=4), False)):
        status = RunStatus("run", False, True, 1, 1, {}, 4, counts, None, None)
        text = status_text("out", status)
        assert ("  calls   3 cannot be read, kept as text" in text.splitlines()) is shown

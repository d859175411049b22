"""Accuracy as people read it."""

from __future__ import annotations

from batchrun.cli.progress import progress_line
from batchrun.cli.scores import score_lines
from batchrun.cluster.tally import Progress
from batchrun.records import Counts
from batchrun.scores import Scores


def test_one_sample_is_one_line() -> None:
    """Share, interval and counts."""
    assert score_lines(Scores((8, 232), 232)) == [
        "right   96.7% (95% interval 93.6% to 98.3%): 232 of 240 answers"
    ]


def test_several_samples_have_pass_at_k_and_a_vote() -> None:
    """A line for each k above 1 and one for the majority."""
    lines = score_lines(Scores((1, 0, 1, 0, 2), 3))
    assert [line[:8] for line in lines] == ["right   ", "pass@2  ", "pass@4  ", "vote    "]
    assert lines[0].endswith("10 of 16 samples")
    assert lines[3].startswith("vote    75.0% (95% interval ")
    assert lines[3].endswith(" by majority of 4 samples")


def test_nothing_to_compare_with_is_said() -> None:
    """A run whose rows have no expected answers has no share."""
    assert score_lines(Scores((0, 0))) == ["right   no row has an expected answer"]


def test_progress_shows_accuracy_once_there_is_one() -> None:
    """The line of a live run has the share of right answers so far, if any was scored."""
    shown = {}
    for scores in (None, Scores((0, 0)), Scores((1, 3), 3)):
        counts = Counts(rows=4, scores=scores)
        shown[scores] = progress_line(Progress(8, counts, counts, 1, 0, 0, {}, 1.0, 1.0, 1.0, None))
    assert [("right" in line) for line in shown.values()] == [False, False, True]
    assert "75.0% right" in shown[Scores((1, 3), 3)]

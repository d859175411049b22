"""Counters of right answers, and what they say."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.records import Counts
from batchrun.scores import Scores, Verdict, shown_ks, wilson

RIGHT, WRONG = Verdict(True, "a"), Verdict(False, "b")


def scores_of(*rows: str) -> Scores:
    """Scores of rows written as ``110``: two of three samples are right."""
    total = Scores()
    for row in rows:
        total += Scores.of_row([RIGHT if sample == "1" else WRONG for sample in row])
    return total


@pytest.mark.parametrize(
    ("share", "trials", "low", "high"),
    [
        (0.5, 10, 0.236593, 0.763407),
        (0.9, 10, 0.595850, 0.982124),
        (0.0, 10, 0.0, 0.277533),
        (1.0, 10, 0.722467, 1.0),
        (0.5, 0, 0.0, 1.0),
    ],
)
def test_wilson(share: float, trials: int, low: float, high: float) -> None:
    """The bounds are those that statistics packages print."""
    assert wilson(share, trials) == pytest.approx((low, high), abs=1e-6)


def test_accuracy_of_single_samples() -> None:
    """With one sample a row, accuracy is the share of right rows with Wilson's interval."""
    scores = scores_of("1", "1", "1", "0")
    assert scores.accuracy is not None
    assert (scores.accuracy.low, scores.accuracy.high) == wilson(0.75, 4)
    assert (scores.num_rows, scores.num_correct, scores.num_samples) == (4, 3, 1)
    assert set(scores.report()) == {"rows", "samples", "correct", "accuracy"}


def test_rows_without_an_expected_answer_count_nowhere() -> None:
    """They are in no row count; a run of them alone has no accuracy."""
    none = Scores.of_row([Verdict(None, "a")])
    assert (none.num_rows, none.accuracy, none.majority) == (0, None, None)
    assert none.report()["accuracy"] is None
    assert (scores_of("1") + none).report() == scores_of("1").report()


@given(st.lists(st.text("01", min_size=4, max_size=4), min_size=1, max_size=6))
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(rows: list[str]) -> None:
    """The estimator equals counting over every draw of k of the n samples."""
    scores = scores_of(*rows)
    for k in range(1, 5):
        draws = [any(s == "1" for s in d) for r in rows for d in itertools.combinations(r, k)]
        found = scores.pass_at(k)
        assert found is not None
        assert found.value == pytest.approx(sum(draws) / len(draws))
        assert 0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1


@given(st.lists(st.lists(st.sampled_from([RIGHT, WRONG, Verdict(None)]), min_size=3, max_size=3)))
def test_adding_shards_is_counting_all_rows(rows: list[list[Verdict]]) -> None:
    """However rows are spread over shards, the sums are the same, and JSON keeps them."""
    half = len(rows) // 2
    parts = [sum(map(Scores.of_row, some), Scores()) for some in (rows[:half], rows[half:])]
    total = sum(map(Scores.of_row, rows), Scores())
    assert parts[0] + parts[1] == parts[1] + parts[0] == total
    assert Scores.from_json(json.loads(json.dumps(asdict(total)))) == total
    assert total.num_rows <= len(rows)


def test_pass_at_k_has_bounds() -> None:
    """k is between 1 and n; shown are the powers of two and n."""
    with pytest.raises(ValueError, match="between 1 and 2"):
        scores_of("10").pass_at(3)
    assert [shown_ks(n) for n in (1, 2, 3, 8, 10)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10],
    ]  # fmt: skip


def test_samples_of_one_row_are_not_trials_of_their_own() -> None:
    """Rows whose samples agree count once each; rows that vary inside count for more."""
    alike = scores_of(*["1111", "0000"] * 10).accuracy
    mixed = scores_of(*["1100"] * 20).accuracy
    assert alike is not None and mixed is not None
    assert (alike.low, alike.high) == pytest.approx(wilson(0.5, 20))
    assert (mixed.low, mixed.high) == pytest.approx(wilson(0.5, 80))
    sure = scores_of(*["1111"] * 20).accuracy
    assert sure is not None and sure.low == pytest.approx(wilson(1.0, 20)[0])


@pytest.mark.parametrize(
    ("answers", "right", "wins"),
    [
        ("aab", "a", True),
        ("abb", "a", False),
        ("abc", "a", True),  # a tie: the first sample's answer
        ("abc", "b", False),
        ("--a", "a", True),  # a sample without an answer has no vote
        ("---", "a", False),
        ("abba", "b", False),
    ],
)
def test_majority_vote(answers: str, right: str, wins: bool) -> None:
    """The most frequent answer is the row's, and the first one of a tie."""
    verdicts = [Verdict(a == right, None if a == "-" else a) for a in answers]
    scores = Scores.of_row(verdicts)
    assert scores.majority_correct == int(wins)
    assert scores.majority is not None and scores.majority.value == float(wins)


def test_report_of_many_samples() -> None:
    """What JSON shows: counts, and each share with its interval."""
    report = scores_of("1100", "0000", "1111").report()
    assert (report["rows"], report["samples"]) == (3, 4)
    assert report["correct"] == 6
    assert report["accuracy"]["value"] == 0.5  # type: ignore[index]
    assert list(report["pass_at"]) == ["1", "2", "4"]  # type: ignore[call-overload]
    assert report["pass_at"]["4"]["value"] == pytest.approx(2 / 3, abs=1e-6)  # type: ignore[index]
    assert report["majority"]["value"] == pytest.approx(2 / 3, abs=1e-6)  # type: ignore[index]


def test_counts_of_an_earlier_version_are_read() -> None:
    """Records without scores still parse; broken ones are a TypeError."""
    old = {"rows": 3, "failed_rows": 1, "prompt_tokens": 5}
    assert Counts.from_json(old) == Counts(3, 1, 5)
    new = Counts(3, scores=scores_of("10"))
    assert Counts.from_json(json.loads(json.dumps(asdict(new)))) == new
    with pytest.raises(TypeError):
        Counts.from_json({"scores": {"rows_by_correct": 3}})
    with pytest.raises(TypeError):
        Counts.from_json({"unknown": 3})


def test_counts_add_their_scores() -> None:
    """Shards with and without scored rows add up."""
    one, other = Counts(1, scores=scores_of("1")), Counts(1, scores=scores_of("0"))
    assert (one + Counts(2) + other).scores == scores_of("1", "0")
    assert (Counts() + Counts()).scores is None


def test_many_samples_are_exact() -> None:
    """A thousand samples a row are no trouble for the estimator."""
    scores = Scores((*[0] * 1, 7, *[0] * 999))
    found = scores.pass_at(500)
    assert found is not None and math.isclose(found.value, 0.5)

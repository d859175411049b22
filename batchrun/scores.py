"""How many answers were right, as counters that add up, and what they say of the model.

A row counts when it has an expected answer. Everything below follows from how many rows had how
many right samples, so shards only add counters and nobody has to read their rows again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

_Z_95 = 1.959963984540054  # of the normal distribution, two-sided


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scorer says of one sample.

    ``correct`` is None where the row has no expected answer to compare with. ``answer`` is the
    answer that was found in the text, in one spelling for equal answers, to count votes by; None
    where there was none.
    """

    correct: bool | None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share in [0, 1] with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over scored rows. ``rows_by_correct[c]`` counts the rows of which c samples are right
    (so it is n + 1 long), ``majority_correct`` those whose most frequent answer is right."""

    rows_by_correct: tuple[int, ...] = ()
    majority_correct: int = 0

    @classmethod
    def of_row(cls, verdicts: Sequence[Verdict]) -> Scores:
        """The scores of one row from all its samples, in their order."""
        rows = [0] * (len(verdicts) + 1)
        if any(verdict.correct is None for verdict in verdicts):
            return cls(tuple(rows))
        rows[sum(verdict.correct is True for verdict in verdicts)] = 1
        return cls(tuple(rows), int(_majority_is_right(verdicts)))

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> Scores:
        """What ``dataclasses.asdict`` gave. Raises TypeError for anything else."""
        rows, majority = raw.get("rows_by_correct"), raw.get("majority_correct")
        if not isinstance(rows, list | tuple) or not isinstance(majority, int):
            raise TypeError("not scores")
        return cls(tuple(int(count) for count in rows), majority)

    def __add__(self, other: Scores) -> Scores:
        pairs = zip_longest(self.rows_by_correct, other.rows_by_correct, fillvalue=0)
        return Scores(
            tuple(first + second for first, second in pairs),
            self.majority_correct + other.majority_correct,
        )

    @property
    def num_samples(self) -> int:
        """Samples of each row."""
        return max(1, len(self.rows_by_correct) - 1)

    @property
    def num_rows(self) -> int:
        """Rows that have an expected answer."""
        return sum(self.rows_by_correct)

    @property
    def num_correct(self) -> int:
        """Right samples of all rows."""
        return sum(right * rows for right, rows in enumerate(self.rows_by_correct))

    @property
    def accuracy(self) -> Estimate | None:
        """The share of right samples; None without a scored row."""
        return self.pass_at(1)

    def pass_at(self, k: int) -> Estimate | None:
        """The chance that one of ``k`` samples of a row is right, 1 <= k <= n; None without a
        scored row.

        The unbiased estimator of Chen et al. (2021), "Evaluating Large Language Models Trained on
        Code": the mean over rows of 1 - C(n - c, k) / C(n, k), where c of n samples are right.
        """
        n = self.num_samples
        if not 1 <= k <= n:
            raise ValueError(f"k must be between 1 and {n}, not {k}")
        shares = [1.0 - math.comb(n - right, k) / math.comb(n, k) for right in range(n + 1)]
        return _mean(shares[: len(self.rows_by_correct)], self.rows_by_correct)

    @property
    def majority(self) -> Estimate | None:
        """The share of rows whose most frequent answer is right; None without a scored row."""
        wrong = self.num_rows - self.majority_correct
        return _mean((0.0, 1.0), (wrong, self.majority_correct))

    def report(self) -> dict[str, object]:
        """Plain values for JSON: counts, and shares with their 95 % intervals."""
        n = self.num_samples
        found: dict[str, object] = {
            "rows": self.num_rows,
            "samples": n,
            "correct": self.num_correct,
            "accuracy": _plain(self.accuracy),
        }
        if n > 1:
            found["pass_at"] = {str(k): _plain(self.pass_at(k)) for k in shown_ks(n)}
            found["majority"] = _plain(self.majority)
        return found


def shown_ks(n: int) -> list[int]:
    """The k of pass@k that are worth showing: powers of two, and ``n`` itself."""
    return sorted({*(2**power for power in range(n.bit_length()) if 2**power <= n), n})


def wilson(share: float, trials: float) -> tuple[float, float]:
    """The bounds of Wilson's 95 % interval for ``share`` of so many trials.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    if trials <= 0:
        return 0.0, 1.0
    spread = _Z_95 * _Z_95 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = _Z_95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    # At the ends the bound is the share itself, up to rounding.
    low = 0.0 if share <= 0 else max(0.0, centre - half)
    high = 1.0 if share >= 1 else min(1.0, centre + half)
    return low, high


def _mean(shares: Sequence[float], rows: Sequence[int]) -> Estimate | None:
    """The mean of each row's share over all rows, with Wilson's interval.

    Samples of one row are alike, so rows are the trials: their number is raised only as far as
    the rows' own spread shows (the effective sample size, p (1 - p) / variance of the mean), and
    for shares of 0 and 1 alone it is the number of rows.
    """
    total = sum(rows)
    if not total:
        return None
    mean = min(1.0, sum(share * count for share, count in zip(shares, rows, strict=True)) / total)
    trials = float(total)
    if total > 1 and 0 < mean < 1:
        squares = sum(
            count * (share - mean) ** 2 for share, count in zip(shares, rows, strict=True)
        )
        variance = squares / (total - 1) / total
        most = float(total * (len(shares) - 1))
        effective = mean * (1 - mean) / variance if variance else most
        trials = min(max(trials, effective), most)
    return Estimate(mean, *wilson(mean, trials))


def _majority_is_right(verdicts: Sequence[Verdict]) -> bool:
    """Whether the most frequent answer is right. Of answers with as many votes the first wins;
    a sample without an answer has no vote."""
    votes: dict[str, int] = {}
    right: dict[str, bool] = {}
    for verdict in verdicts:
        if verdict.answer is not None:
            votes[verdict.answer] = votes.get(verdict.answer, 0) + 1
            right.setdefault(verdict.answer, verdict.correct is True)
    return bool(votes) and right[max(votes, key=lambda answer: votes[answer])]


def _plain(estimate: Estimate | None) -> dict[str, float] | None:
    if estimate is None:
        return None
    return {
        "value": round(estimate.value, 6),
        "low": round(estimate.low, 6),
        "high": round(estimate.high, 6),
    }

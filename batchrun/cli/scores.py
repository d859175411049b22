"""How right the answers were, for people."""

from __future__ import annotations

from batchrun.scores import Estimate, Scores, shown_ks


def score_lines(scores: Scores) -> list[str]:
    """Accuracy with its 95 % interval, and for several samples pass@k and the majority vote."""
    rows, n = scores.num_rows, scores.num_samples
    if scores.accuracy is None:
        return ["right   no row has an expected answer"]
    what = f"{scores.num_correct:,} of {rows * n:,} {'answers' if n == 1 else 'samples'}"
    lines = [f"right   {_shown(scores.accuracy)}: {what}"]
    if n > 1:
        lines += [f"pass@{k:<3}{_shown(scores.pass_at(k))}" for k in shown_ks(n) if k > 1]
        lines.append(f"vote    {_shown(scores.majority)} by majority of {n} samples")
    return lines


def _shown(estimate: Estimate | None) -> str:
    assert estimate is not None
    return f"{estimate.value:.1%} (95% interval {estimate.low:.1%} to {estimate.high:.1%})"

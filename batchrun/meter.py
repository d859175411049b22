"""What a submission has used of its limits."""

from __future__ import annotations

from batchrun.events import Limits

_HOUR_S = 3600.0


class Meter:
    """Counts hours, tokens and money since the first tick."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._started: float | None = None
        self._now = 0.0
        self._worker_s = 0.0
        self._tokens_before = 0  # of workers that are gone
        self._tokens: dict[str, int] = {}
        self._tokens_now = 0

    def tick(self, now: float, num_workers: int) -> None:
        """Time has come to ``now``; so many workers were paid for since the tick before."""
        if self._started is None:
            self._started = self._now = now
        self._worker_s += max(0.0, now - self._now) * num_workers
        self._now = max(self._now, now)

    def pay(self, seconds: float) -> None:
        """A worker has been paid for, for so long before it could be seen."""
        self._worker_s += max(0.0, seconds)

    def spend(self, worker: str, tokens: int) -> None:
        """A living worker has computed so many tokens in all."""
        before = self._tokens.get(worker, 0)
        self._tokens[worker] = max(before, tokens)
        self._tokens_now += self._tokens[worker] - before

    def lose(self, worker: str) -> None:
        """A worker is gone: what it has spent stays spent."""
        self._tokens_before += self._tokens.get(worker, 0)
        self._tokens_now -= self._tokens.pop(worker, 0)

    @property
    def tokens(self) -> int:
        """Tokens of prompts and sampled tokens."""
        return self._tokens_before + self._tokens_now

    @property
    def hours(self) -> float:
        """Hours since the first tick."""
        return 0.0 if self._started is None else (self._now - self._started) / _HOUR_S

    @property
    def cost(self) -> float:
        """Worker hours times their price."""
        return self._worker_s / _HOUR_S * self._limits.price_per_worker_hour

    def reached(self) -> str | None:
        """Which limit is reached, and what to do about it."""
        limits = self._limits
        if limits.max_hours is not None and self.hours >= limits.max_hours:
            return _message("max_hours", limits.max_hours, f"{self.hours:.2f} hours")
        if limits.max_tokens is not None and self.tokens >= limits.max_tokens:
            return _message("max_tokens", limits.max_tokens, f"{self.tokens:,} tokens")
        if limits.max_cost is not None and self.cost >= limits.max_cost:
            return _message("max_cost", limits.max_cost, f"a cost of {self.cost:.2f}")
        return None


def _message(key: str, limit: float, used: str) -> str:
    return (
        f"limits.{key} ({limit:,.10g}) is reached with {used} in this submit; "
        f"raise limits.{key}, or submit again as it is to go on for as much"
    )

"""Where a person sees a run."""

from __future__ import annotations

from typing import Protocol

from batchrun.cluster.tally import Progress


class View(Protocol):
    """Where a run is shown."""

    def say(self, text: str) -> None:
        """One line of news for a person."""

    def __call__(self, progress: Progress) -> None:
        """How far the run is now."""


class NoView:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def __call__(self, progress: Progress) -> None:
        """Nothing."""

"""The thinking budgets of a sweep, and the job at each of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchrun.errors import RequestError

if TYPE_CHECKING:
    from batchrun.job import Job

OFF = "off"
FULL = "full"

_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Budget:
    """Most tokens of reasoning: a number, ``off`` (no reasoning at all) or ``full`` (no budget)."""

    name: str

    @property
    def thinks(self) -> bool:
        """Whether there is a reasoning, if only one that is closed at once."""
        return self.name != OFF

    @property
    def num_tokens(self) -> int | None:
        """The value of ``generation.max_thinking_tokens``."""
        return int(self.name) if self.name not in (OFF, FULL) else None

    @property
    def rank(self) -> float:
        """More for more thinking."""
        match self.name:
            case "off":
                return -1.0
            case "full":
                return float("inf")
            case number:
                return float(number)

    def job(self, job: Job) -> Job:
        """``job`` at this budget, with an output of its own below that of ``job``."""
        generation = job.generation.model_copy(
            update={"reasoning": self.thinks, "max_thinking_tokens": self.num_tokens}
        )
        path = f"{job.output.path.rstrip('/')}/budget-{self.name}"
        output = job.output.model_copy(update={"path": path})
        return job.model_copy(update={"generation": generation, "output": output})


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """``off,0,256,full`` -> those budgets, from the least thinking to the most.

    :raises RequestError: a word is no budget, or stands there twice.
    """
    found: list[Budget] = []
    for word in text.split(","):
        name = word.strip().lower()
        if name.isascii() and name.isdigit() and int(name) <= _MAX:
            name = str(int(name))
        elif name not in (OFF, FULL):
            raise RequestError(
                f"{word.strip()!r} is no thinking budget",
                "give numbers of tokens, `off` or `full`, with commas between: off,0,256,1024",
            )
        if any(budget.name == name for budget in found):
            raise RequestError(f"the thinking budget {name} is there twice")
        found.append(Budget(name))
    return tuple(sorted(found, key=lambda budget: budget.rank))

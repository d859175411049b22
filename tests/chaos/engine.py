"""An engine without a model: tokens are a function of seed, sample and position, and cost nothing,
or as much time as a test wants. It has of :class:`~batchrun.engine.engine.Engine` what a worker
uses, takes over tokens that were generated before, and counts what it samples where no kill can
take it away.

The text names every token, so a token that was lost, repeated or mixed up shows in the output.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from batchrun.engine.chat import EncodedPrompt
from batchrun.engine.engine import EngineStats
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Output, Request, Timings
from batchrun.records import ErrorKind, FinishReason, Generated, RowError

_RECORD = struct.Struct("<Qd")  # sampled tokens, when the first was


def token_of(seed: int, sample: int, position: int) -> int:
    """The token that any engine of this kind samples there."""
    return zlib.crc32(f"{seed}/{sample}/{position}".encode()) % 1000


def length_of(seed: int, sample: int, params: SamplingParams) -> int:
    """How many tokens a sample has."""
    most = params.max_tokens or 16
    return most if params.ignore_eos else 1 + zlib.crc32(f"{seed}:{sample}".encode()) % most


class Ledger:
    """How many tokens a process has sampled, in a small mapped file: it outlives SIGKILL."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        path.write_bytes(bytes(_RECORD.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _RECORD.size)
        self._count = 0
        self._first = 0.0

    def add(self, num_tokens: int) -> None:
        """So many more."""
        self._first = self._first or time.time()
        self._count += num_tokens
        _RECORD.pack_into(self._map, 0, self._count, self._first)

    @staticmethod
    def read(folder: Path) -> list[tuple[int, float]]:
        """Of each process: tokens sampled, and the time of the first."""
        found = [path.read_bytes() for path in sorted(folder.glob("*"))]
        return [_RECORD.unpack(data) for data in found if len(data) == _RECORD.size]


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sample on its way. It is its own :class:`~batchrun.engine.engine.RunningSample`."""

    request: Request
    tokens: list[int]
    num_replayed: int
    length: int
    added_at: float

    @property
    def key(self) -> Hashable:
        """The caller's name of the row."""
        return self.request.key

    @property
    def sample(self) -> int:
        """Which sample of the row."""
        return self.request.sample

    @property
    def num_sampled(self) -> int:
        """Tokens so far, those that came with the request too."""
        return len(self.tokens)

    def after(self, start: int) -> Generated:
        """The tokens from ``start`` on."""
        return Generated(tuple(self.tokens[start:]))


class _Chat:
    """A conversation as bytes."""

    def encode(
        self,
        messages: Sequence[object],
        *,
        reasoning: object = None,
        tools: object = None,
    ) -> EncodedPrompt:
        """The text of the last message."""
        text = str(getattr(messages[-1], "content", ""))
        return EncodedPrompt(tuple(text.encode("utf-8", "surrogatepass")), False, text)


@dataclass(slots=True)
class FakeEngine:
    """See the module. ``step_s`` is what a step takes, in which every running sequence gets
    ``tokens_a_step``. ``before_step`` is told the prompts that are about to run."""

    max_sequences: int = 4
    step_s: float = 0.0
    tokens_a_step: int = 1
    ledger: Ledger | None = None
    before_step: Callable[[Sequence[str]], None] | None = None
    broken: Callable[[str], bool] = lambda prompt: False
    max_model_len: int = 1 << 20
    compile_seconds: float = 0.0
    deterministic: bool = True
    chat: _Chat = field(default_factory=_Chat)
    on_admit: Callable[[Iterable[Hashable]], None] | None = None
    _waiting: deque[_Sequence] = field(default_factory=deque)
    _running: dict[tuple[Hashable, int], _Sequence] = field(default_factory=dict)
    _num_waiting_tokens: int = 0
    _steps: int = 0
    _sampled: int = 0
    _prompt_tokens: int = 0

    def admission_error(
        self, num_prompt_tokens: int, params: SamplingParams, *, thinking: bool = False
    ) -> RowError | None:
        """Everything but nothing can run."""
        if num_prompt_tokens < 1:
            return RowError(ErrorKind.INVALID_PROMPT, "the prompt has no tokens")
        return None

    def add(self, request: Request) -> None:
        """Queue a request."""
        known = list(request.generated.token_ids) if request.generated is not None else []
        length = length_of(request.seed, request.sample, request.params)
        del known[length:]
        self._waiting.append(_Sequence(request, known, len(known), length, time.monotonic()))
        self._num_waiting_tokens += len(request.prompt_token_ids)

    def abort(self, key: Hashable) -> int:
        """Drop all samples of a row; how many tokens are lost with them."""
        dropped = [item for item in self._waiting if item.key == key]
        if dropped:
            self._waiting = deque(item for item in self._waiting if item.key != key)
            self._num_waiting_tokens -= sum(len(i.request.prompt_token_ids) for i in dropped)
        for name in [name for name in self._running if name[0] == key]:
            dropped.append(self._running.pop(name))
        return sum(item.num_sampled - item.num_replayed for item in dropped)

    def step(self) -> list[Output]:
        """One step of all that runs."""
        admitted = []
        while self._waiting and len(self._running) < self.max_sequences:
            item = self._waiting.popleft()
            self._num_waiting_tokens -= len(item.request.prompt_token_ids)
            self._prompt_tokens += len(item.request.prompt_token_ids)
            self._running[item.key, item.sample] = item
            admitted.append(item.key)
        if admitted and self.on_admit is not None:
            self.on_admit(admitted)
        if self.before_step is not None:
            self.before_step([_prompt(item) for item in self._running.values()])
        if self.step_s:
            time.sleep(self.step_s)
        outputs = []
        num_sampled = 0
        for name, item in list(self._running.items()):
            if self.broken(_prompt(item)):
                del self._running[name]
                outputs.append(_error(item))
                continue
            at = len(item.tokens)
            seed, sample = item.request.seed, item.request.sample
            new = min(self.tokens_a_step, item.length - at)
            item.tokens += [token_of(seed, sample, at + offset) for offset in range(new)]
            num_sampled += new
            if len(item.tokens) >= item.length:
                del self._running[name]
                outputs.append(_output(item))
        self._sampled += num_sampled
        self._steps += 1
        if self.ledger is not None and num_sampled:
            self.ledger.add(num_sampled)
        return outputs

    def take_in(self) -> list[Output]:
        """Nothing: a step takes in what it sampled."""
        return []

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of their prompts."""
        return self._num_waiting_tokens

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    @property
    def num_unfinished(self) -> int:
        """Requests whose output is to come."""
        return len(self._waiting) + len(self._running)

    def is_running(self, key: Hashable) -> bool:
        """Whether a sample of the row has its slot."""
        return any(name[0] == key for name in self._running)

    def running(self) -> Iterator[_Sequence]:
        """What has a slot."""
        return iter(list(self._running.values()))

    def stats(self) -> EngineStats:
        """As the real one's."""
        return EngineStats(
            slots_used=len(self._running),
            slots_total=self.max_sequences,
            blocks_used=0,
            blocks_total=0,
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            steps=self._steps,
            step_seconds=0.0,
            last_step_seconds=0.0,
            prompt_tokens=self._prompt_tokens,
            prefix_tokens=0,
            sampled_tokens=self._sampled,
            forced_tokens=0,
        )


def make_engine(plan: Mapping[str, object], ledger: Path | None) -> FakeEngine:
    """An engine as the plan of a test's faults describes it."""
    wanted = {"max_sequences", "step_s", "tokens_a_step"}
    settings = {name: value for name, value in plan.items() if name in wanted}
    return FakeEngine(
        **settings,  # type: ignore[arg-type]
        ledger=None if ledger is None else Ledger(ledger),
    )


def _prompt(item: _Sequence) -> str:
    return bytes(item.request.prompt_token_ids).decode("utf-8", "surrogatepass")


def _output(item: _Sequence) -> Output:
    text = " ".join(map(str, item.tokens))
    return Output(
        key=item.key,
        sample=item.sample,
        text=text,
        reasoning=None,
        token_ids=tuple(item.tokens),
        finish_reason=FinishReason.STOP,
        num_completion_tokens=len(item.tokens),
        prompt_tokens=len(item.request.prompt_token_ids),
        timings=Timings(total_s=time.monotonic() - item.added_at),
    )


def _error(item: _Sequence) -> Output:
    return Output(
        key=item.key,
        sample=item.sample,
        text="",
        reasoning=None,
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        prompt_tokens=len(item.request.prompt_token_ids),
        error=RowError(ErrorKind.ENGINE, "this row is broken"),
    )

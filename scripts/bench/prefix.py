"""What shared prompt beginnings save: the same rows with and without prefix states.

    python scripts/bench/prefix.py [--model FOLDER] [--rows 200] [--shared 256] [--repeat 3]

Every row has one few-shot system text of about ``--shared`` tokens before its own question. Both
engines run in this process, in turn, after a warm-up; the ratio is that of the medians. Answers are
greedy, and the script fails if a token differs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path
from random import Random

import torch

import batchrun
from batchrun.engine.engine import Engine
from batchrun.engine.options import EngineOptions
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Output, Request
from batchrun.records import Message

TINY = Path(batchrun.__file__).parent / "models" / "tiny"


def make_prompts(engine: Engine, rows: int, shared: int) -> tuple[list[tuple[int, ...]], int]:
    """Token ids of every row, and how many of them all rows have in common."""
    chat = engine.chat
    if chat is None:
        raise SystemExit("the checkpoint has no chat template")
    rng = Random(0)

    def ask() -> str:
        return "+".join(str(rng.randint(1, 99)) for _ in range(3))

    def encode(system: str, question: str) -> tuple[int, ...]:
        messages = [Message("system", system), Message("user", question)]
        return chat.encode(messages, reasoning=True).token_ids

    system = "Answer the question. Some examples:"
    while in_common([encode(system, "a"), encode(system, "b")]) < shared:
        terms = ask()
        system += f"\nWhat is {terms}? {sum(map(int, terms.split('+')))}"
    prompts = [encode(system, f"{ask()} = ?") for _ in range(rows)]
    return prompts, in_common(prompts)


def in_common(prompts: list[tuple[int, ...]]) -> int:
    """How many tokens the prompts begin with alike."""
    count = 0
    while len({prompt[: count + 1] for prompt in prompts}) == 1:
        count += 1
    return count


def run(
    engine: Engine, prompts: list[tuple[int, ...]], max_tokens: int
) -> tuple[float, list[Output]]:
    """Seconds for all prompts, and their outputs in order."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    outputs: list[Output] = []
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add(Request(number, prompt, params, thinking=True))
    while engine.num_unfinished:
        outputs += engine.step()
    seconds = time.perf_counter() - started
    return seconds, sorted(outputs, key=lambda output: int(str(output.key)))


def main() -> None:
    """Run both and print the ratio with its conditions."""
    parser = argparse.ArgumentParser(description="What shared prompt beginnings save.")
    parser.add_argument("--model", type=Path, default=TINY, help="a checkpoint folder")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--shared", type=int, default=256, help="tokens of the system text")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=None, help="at once; default: what fits")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()

    engines = {
        name: Engine.load(
            arguments.model,
            EngineOptions(prefix_states=on, max_sequences=arguments.sequences),
        )
        for name, on in (("without", False), ("with", True))
    }
    prompts, num_shared = make_prompts(engines["with"], arguments.rows, arguments.shared)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    cached: dict[str, int] = {}
    answers: dict[str, list[tuple[int, ...]]] = {}
    generated = 0
    for turn in range(arguments.repeat + 1):
        for name, engine in engines.items():
            # What an earlier turn left would be an advantage that a first run does not have.
            before = engine.stats()
            engine.forget_prefixes()
            taken, outputs = run(engine, prompts, arguments.max_tokens)
            if turn:  # the first is the warm-up
                seconds[name].append(taken)
            cached[name] = engine.stats().prefix_tokens - before.prefix_tokens
            answers[name] = [output.token_ids for output in outputs]
            generated = sum(map(len, answers[name]))
    if answers["with"] != answers["without"]:
        raise SystemExit("the answers differ")

    engine = engines["with"]
    device = engine.runner.state.keys.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    prompt_tokens = sum(map(len, prompts))
    print(
        f"model {arguments.model.name}, {device.type} ({where}), torch {torch.__version__} with "
        f"{torch.get_num_threads()} thread(s)\n"
        f"{arguments.rows} rows, {prompt_tokens:,} prompt tokens, {num_shared} of each row shared, "
        f"{generated:,} tokens generated, up to {engine.max_sequences} rows at once, "
        f"median of {arguments.repeat}"
    )
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        spread = f"{generated / max(taken):,.0f} to {generated / min(taken):,.0f}"
        print(
            f"{name:>8} prefix states: {generated / middle:8,.0f} generated tokens/s ({spread}), "
            f"{prompt_tokens - cached[name]:,} prompt tokens computed"
        )
    ratio = statistics.median(seconds["without"]) / statistics.median(seconds["with"])
    print(f"   ratio: {ratio:.2f}, and every token is the same")


if __name__ == "__main__":
    main()

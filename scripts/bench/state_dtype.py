"""What an SSM state in bfloat16 costs: its logits beside those of a float32 state, step by step.

    python scripts/bench/state_dtype.py [--model FOLDER | --random] [--steps 2000] [--sequences 8]

Two states of one model (float32 weights) read the same tokens, drawn from what the model with the
float32 state expects; only the state differs. Rounding happens at every step, so the question is
whether the error grows. Each line is of the 50 steps before it, over all sequences.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import batchrun
from batchrun.model.batch import Batch
from batchrun.model.config import load_config
from batchrun.model.hybrid import NemotronH
from batchrun.model.state import State
from batchrun.model.weights import load_model

TINY = Path(batchrun.__file__).parent / "models" / "tiny"
WINDOW = 50
BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Difference:
    """Of the logits at the steps up to ``step``: absolute errors (``spread`` is the standard
    deviation of the logits themselves), the Kullback-Leibler divergence in nats, and the share of
    steps that agree on the most likely token."""

    step: int
    spread: float
    mean_error: float
    max_error: float
    divergence: float
    agreement: float


def compare(
    model: NemotronH,
    *,
    num_steps: int,
    num_sequences: int,
    report_at: tuple[int, ...],
    window: int = WINDOW,
    seed: int = 0,
) -> Iterator[Difference]:
    """Decode with both states; a difference at each of the steps ``report_at``."""
    config = model.config
    blocks = -(-(num_steps + 2) // BLOCK_SIZE)
    states = [
        State.allocate(
            config,
            num_sequences + 1,
            num_sequences * blocks + 1,
            BLOCK_SIZE,
            torch.float32,
            dtype,
            "cpu",
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    slots = torch.arange(1, num_sequences + 1)
    tables = torch.arange(1, num_sequences * blocks + 1).view(num_sequences, blocks)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (num_sequences,), generator=generator)
    rows: list[tuple[float, float, float, float, float]] = []
    for step in range(1, num_steps + 1):
        # The first token of a sequence is a prompt: it begins from nothing.
        is_first = step == 1
        batch = Batch(
            token_ids=tokens,
            num_decodes=0 if is_first else num_sequences,
            prefill_lens=(1,) * num_sequences if is_first else (),
            slots=slots,
            context_lens=(step - 1,) * num_sequences,
            block_tables=tables[:, : -(-step // BLOCK_SIZE)],
            logit_rows=torch.arange(num_sequences),
        )
        exact, rounded = (model(batch, state) for state in states)
        errors = (exact - rounded).abs()
        logs = exact.log_softmax(-1), rounded.log_softmax(-1)
        divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
        agree = (exact.argmax(-1) == rounded.argmax(-1)).float().mean()
        measured = (exact.std(), errors.mean(), errors.max(), divergence, agree)
        spread, mean_error, max_error, divergence_, agreement = (float(x) for x in measured)
        rows.append((spread, mean_error, max_error, divergence_, agreement))
        if step in report_at:
            last = torch.tensor(rows[-window:])
            means = last.mean(0).tolist()
            largest = float(last[:, 2].max())
            yield Difference(step, means[0], means[1], largest, means[3], means[4])
        tokens = torch.multinomial(logs[0].exp(), 1, generator=generator).squeeze(1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What a bfloat16 state costs.")
    parser.add_argument("--model", type=Path, default=TINY, help="a checkpoint folder")
    parser.add_argument("--random", action="store_true", help="a random hybrid of 60 million")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.random:
        from random_models import HYBRID_60M, random_model

        model, name = random_model(HYBRID_60M, args.seed), "a random hybrid, 60 million weights"
    else:
        model = load_model(args.model, load_config(args.model), torch.float32, "cpu")
        name = str(args.model)
    model.prepare()
    report_at = tuple(s for s in (100, 500, 1000, 2000, 4000) if s <= args.steps) or (args.steps,)
    print(f"{name}; {args.sequences} sequences, {args.steps} steps, the last {WINDOW} each")
    print("  step   logits' std   mean error   max error   KL (nats)   same greedy token")
    differences = compare(
        model,
        num_steps=args.steps,
        num_sequences=args.sequences,
        report_at=report_at,
        seed=args.seed,
    )
    for row in differences:
        print(
            f"{row.step:6}   {row.spread:11.3f}   {row.mean_error:10.5f}   {row.max_error:9.4f}   "
            f"{row.divergence:9.2e}   {row.agreement:17.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()

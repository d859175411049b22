"""What int8 weights cost: right answers of the embedded model, and how far its logits move.

    python scripts/bench/int8.py [--rows 420] [--seed 3]

Sums that the model never saw in training, 2 to 8 numbers, answered greedily with reasoning. The
logit error is over the tokens of the unquantised answers: the root of its mean square, as a share
of the logits' standard deviation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_problems as tp
from batchrun import LLM, SamplingParams
from batchrun.engine.engine import Engine
from batchrun.model.batch import Batch


def logits_of(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """Logits [T, vocab] of one sequence, in the engine's first slot."""
    num_tokens, state = len(token_ids), engine.runner.state
    blocks = -(-num_tokens // state.block_size)
    batch = Batch(
        token_ids=torch.tensor(token_ids),
        num_decodes=0,
        prefill_lens=(num_tokens,),
        slots=torch.tensor([1]),
        context_lens=(0,),
        block_tables=torch.arange(1, blocks + 1)[None],
        logit_rows=torch.arange(num_tokens),
    )
    logits: torch.Tensor = engine.runner.model(batch, state)
    return logits


def main() -> None:
    """Print a line for each dtype and quantisation."""
    parser = argparse.ArgumentParser(description="What int8 weights cost.")
    parser.add_argument("--rows", type=int, default=420)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    rng = Random(args.seed)
    problems = [
        tp.draw_problem(rng, held_out=True, operands=(count, count))
        for i in range(args.rows)
        for count in [tp.MIN_OPERANDS + i % (tp.MAX_OPERANDS - tp.MIN_OPERANDS + 1)]
    ]
    chats = [[{"role": "user", "content": tp.phrase(rng, p, plain=True)}] for p in problems]
    params = SamplingParams(temperature=0, max_tokens=200)
    print(f"{args.rows} held-out sums, seed {args.seed}")
    print("  dtype     weights   bytes of weights   right answers   same tokens   logit error")
    exact: list[list[int]] = []
    exact_logits: list[torch.Tensor] = []
    for dtype in ("float32", "bfloat16"):
        for quantization in ("none", "int8"):
            llm = LLM("tiny", dtype=dtype, quantization=quantization)
            outputs = llm.chat(chats, params, reasoning=True)
            right = sum(
                output.outputs[0].text.strip() == problem.answer
                for output, problem in zip(outputs, problems, strict=True)
            )
            tokens = [
                [*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs
            ]
            exact = exact or tokens
            logits = [logits_of(llm.engine, ids) for ids in exact[:40]]
            exact_logits = exact_logits or logits
            error = torch.cat(logits) - torch.cat(exact_logits)
            share = error.square().mean().sqrt() / torch.cat(exact_logits).std()
            same = sum(a == b for a, b in zip(tokens, exact, strict=True))
            print(
                f"  {dtype:8}  {quantization:7}   {llm.engine.memory.weight_bytes:16,}   "
                f"{right / args.rows:13.1%}   {same / args.rows:11.1%}   {share:11.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()

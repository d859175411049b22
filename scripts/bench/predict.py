"""What the roofline predicts for the published 9B hybrid and a transformer of its size on a GPU.

    python scripts/bench/predict.py [A10 H200 ...]

Nothing of it is measured. A table in Markdown: how many whole sequences fit (``engine/memory.py``),
and the output tokens a second at the device's bound (``engine/roofline.py``).
"""

from __future__ import annotations

import argparse

from random_models import NANO_9B_V2

from batchrun.engine.accelerators import Accelerator, find_accelerator
from batchrun.engine.memory import plan_accelerator
from batchrun.engine.roofline import Speed, predict
from batchrun.model.config import ModelConfig
from batchrun.model.equivalent import equivalent_transformer
from batchrun.model.sizes import Precision, Quantization

LENGTHS = ((1024, 1024), (8192, 16384))
PRECISIONS = {
    "bf16": Precision(2, 4),
    "bf16, bf16 state": Precision(2, 2),
    "int8": Precision(2, 4, Quantization.INT8),
    "int8, bf16 state": Precision(2, 2, Quantization.INT8),
}
COLUMNS = (
    "device",
    "input / output",
    "weights",
    "sequences",
    "step, ms",
    "decode, tokens/s",
    "with prefill",
    "transformer: sequences",
    "with prefill",
    "ratio",
)


def speed(
    config: ModelConfig, device: Accelerator, precision: Precision, prompt: int, output: int
) -> Speed:
    """The bound with as many sequences as fit the device."""
    tokens = prompt + output
    plan = plan_accelerator(config, device, precision, max_model_len=tokens, sequence_tokens=tokens)
    return predict(
        config,
        precision,
        device,
        batch=plan.max_sequences,
        input_tokens=prompt,
        output_tokens=output,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What the roofline predicts on GPUs.")
    parser.add_argument("accelerators", nargs="*", default=["A10", "H200"])
    devices = [find_accelerator(name) for name in parser.parse_args().accelerators]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    transformer = equivalent_transformer(NANO_9B_V2)
    for device in devices:
        for prompt, output in LENGTHS:
            for name, precision in PRECISIONS.items():
                ours = speed(NANO_9B_V2, device, precision, prompt, output)
                theirs = speed(transformer, device, precision, prompt, output)
                cells = (
                    device.name,
                    f"{prompt:,} / {output:,}",
                    name,
                    f"{ours.batch}",
                    f"{1000 * ours.step_seconds:.1f}",
                    f"{ours.decode_rate:,.0f}",
                    f"{ours.output_rate:,.0f}",
                    f"{theirs.batch}",
                    f"{theirs.output_rate:,.0f}",
                    f"{ours.output_rate / theirs.output_rate:.2f}",
                )
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

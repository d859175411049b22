"""``batchrun bench``"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from batchrun.cli import echo_error
from batchrun.cli.options import debug_option, echo_json, json_option

if TYPE_CHECKING:
    from batchrun.bench import Measurement, Report


def _batches(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    """``1,8,64`` as numbers."""
    try:
        batches = tuple(int(part) for part in text.split(","))
    except ValueError:
        batches = (0,)
    if min(batches) < 1:
        raise click.BadParameter(f"{text!r} is not a list of positive numbers such as 1,8,64")
    return batches


@click.command(epilog="Example: batchrun bench --batch 1,16 --decode-steps 8")
@click.option("--model", default="tiny", show_default=True, help="A checkpoint, or tiny.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A config.json: measure a model of these sizes with random weights.",
)
@click.option(
    "--batch",
    "batches",
    default="1,8,64",
    show_default=True,
    callback=_batches,
    help="Sequences at once, a list.",
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--decode-steps", type=click.IntRange(1), default=32, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--state-dtype", default="auto", show_default=True)
@click.option("--quantization", default="none", show_default=True, help="none or int8.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(1), help="Of the CPU; default: torch's.")
@click.option(
    "--memory-gib",
    type=click.FloatRange(0, min_open=True),
    help="Use so much memory at most, as if the device had no more.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write the figures to this file, for `batchrun plan`.",
)
@json_option
@debug_option
def command(
    model: str,
    config_path: Path | None,
    batches: tuple[int, ...],
    prompt_tokens: int,
    decode_steps: int,
    threads: int | None,
    memory_gib: float | None,
    output: Path | None,
    as_json: bool,
    **engine: Any,
) -> int:
    """Measure the engine here: prompt and output tokens a second, and how near that is to what the
    device allows.

    First the device: how fast it copies memory and multiplies matrices of the model's shapes. Then
    the engine at each batch size. The bound counts the bytes and operations that the same tokens
    need at least; overhead is the part of a decode step that is not the model.
    """
    from batchrun.bench import Workload, run_bench
    from batchrun.data.checkpoints import find_checkpoint
    from batchrun.engine.options import EngineOptions

    if output is not None and not output.absolute().parent.is_dir():
        raise click.UsageError(f"--output: there is no folder {output.parent}")
    options = EngineOptions(
        num_threads=threads,
        memory_bytes=None if memory_gib is None else int(memory_gib * 2**30),
        random_weights=config_path is not None,
        **engine,
    )
    workload = Workload(batches, prompt_tokens, decode_steps)
    with TemporaryDirectory(prefix="batchrun-bench-") as scratch:
        if config_path is None:
            folder, name = find_checkpoint(model), model
        else:
            folder, name = Path(scratch), str(config_path)
            (folder / "config.json").write_bytes(config_path.read_bytes())
        report = run_bench(folder, options, workload, name=name, progress=echo_error)
    document = report.document()
    if output is not None:
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        echo_json(document)
    else:
        echo_error(_text(report))
    return 0


def _text(report: Report) -> str:
    rates = report.rates
    weights = "random weights" if report.has_random_weights else "its weights"
    quantized = "" if report.quantization == "none" else f", {report.quantization}"
    flops = ", ".join(
        f"{rate / 1e9:,.0f} with {rows:,}" for rows, rate in sorted(rates.matmul_flops.items())
    )
    lines = [
        f"{report.accelerator}, torch {report.torch_version}, {report.num_threads} thread(s)",
        f"{report.model}: {report.num_weights:,} weights ({weights}), {report.dtype}{quantized}, "
        f"SSM state {report.state_dtype}",
        f"copy {rates.copy_bandwidth / 1e9:,.1f} GB/s; matrices in GFLOP/s: {flops} tokens",
        f"prompts of {report.workload.prompt_tokens:,} tokens, {report.workload.decode_steps:,} "
        "decode steps",
        "",
        "        prompt tokens/s      output tokens/s                                 others'",
        " batch   rate  of bound       rate  of bound  bound by    ms/step  overhead     CPUs",
    ]
    lines += [_line(one) for one in report.measurements]
    if report.skipped:
        lines.append(f"batch {', '.join(map(str, report.skipped))} does not fit into memory")
    return "\n".join(lines)


def _line(one: Measurement) -> str:
    overhead = "-" if one.overhead is None else f"{one.overhead:.1%}"
    load = "-" if one.foreign_load is None else f"{one.foreign_load:.2f}"
    return (
        f"{one.batch:>6} {one.prefill_rate:>6,.0f} {one.prefill_ratio:>9.0%} "
        f"{one.decode_rate:>10,.0f} {one.decode_ratio:>9.0%}  {one.decode_bound_by:<10} "
        f"{one.step_seconds * 1e3:>8.1f} {overhead:>9} {load:>8}"
    )

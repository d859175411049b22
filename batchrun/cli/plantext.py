"""A plan in words: every figure with a line that says what it is made of."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchrun.planner.outputs import Range
    from batchrun.planner.plan import Plan

_BAR = 32
_WIDTH = 100


def plan_text(plan: Plan) -> str:
    """The whole plan."""
    parts = (
        _input(plan),
        _prompts(plan),
        _outputs(plan),
        _memory(plan),
        _speed(plan),
        _durations(plan),
        _requests(plan),
        [f"note: {note}" for note in plan.notes],
    )
    return "\n\n".join(
        "\n".join(line for long in part for line in _wrapped(long)) for part in parts if part
    )


def _wrapped(line: str) -> list[str]:
    """``line`` in as many as it needs, those after the first indented as explanations are."""
    return textwrap.wrap(
        line, _WIDTH, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
    ) or [line]


def _input(plan: Plan) -> list[str]:
    facts = plan.input
    if facts.num_footers < facts.num_files:
        how = (
            f"from {facts.num_footers:,} footers, drawn by size with a seed, of "
            f"{facts.num_files:,}; --exact reads all"
        )
    else:
        how = "by all footers"
    lines = [
        f"plan of {plan.job} with {plan.model} ({plan.num_parameters:,} parameters)",
        "",
        f"input       {_about(facts.rows.value, facts.rows.error)} rows in {facts.num_files:,} "
        f"file{'' if facts.num_files == 1 else 's'}, {_bytes(facts.size_bytes)}",
        f"            {how}",
        f"shards      {_about(facts.shards.value, facts.shards.error)}",
        "            a file each, cut where a part would be beyond 256 MiB",
    ]
    if plan.done.rows:
        lines.append(f"done        {plan.done.rows:,} rows are in the output already, not planned")
    return lines


def _prompts(plan: Plan) -> list[str]:
    census = plan.census
    made_of = (
        f"every one of {census.num_sampled:,} rows tokenised with the job's template and the "
        "model's chat template"
        if census.is_exact
        else f"{census.num_sampled:,} rows tokenised, drawn by size with a seed: tokens a byte "
        "times the bytes of the prompt's columns; ± holds in 95 of 100 samples"
    )
    quantiles = ", ".join(f"{name} {value:,}" for name, value in census.quantiles.items())
    lines = [
        f"prompts     {_about(census.total.value, census.total.error)} tokens "
        f"(mean {census.mean:,.0f})",
        f"            {made_of}",
        f"            {quantiles}, longest {'' if census.is_exact else 'seen '}{census.longest:,}",
    ]
    most = max((one.rows for one in census.histogram), default=0.0)
    lines += [
        f"            {f'{one.first:,} - {one.last:,}':>19} {one.rows:>13,.0f} "
        + "#" * max(1 if one.rows else 0, round(_BAR * one.rows / most))
        for one in census.histogram
    ]
    limit = plan.target.memory.max_model_len
    failing = dict(census.failing_rows)
    too_long = failing.pop("too_long", 0.0)
    lines += [
        f"too long    {_failing(plan, too_long)}",
        f"            prompt and max_tokens together beyond max_model_len {limit:,}, or more than "
        "1 MiB of text",
    ]
    listed = ", ".join(f"{kind} {rows:,.0f}" for kind, rows in failing.items())
    total = sum(failing.values())
    lines.append(f"no prompt   {_failing(plan, total)}" + (f": {listed}" if listed else ""))
    lines.append("            values that are no prompt, by kind of error")
    if census.prefix_tokens:
        lines += [
            f"shared      {census.prefix_tokens:,} tokens at the beginning of every prompt seen",
            "            computed once in each worker, not counted below",
        ]
    return lines


def _failing(plan: Plan, rows: float) -> str:
    """So many rows, which a sample may have missed."""
    if plan.census.is_exact:
        return f"{rows:,.0f} rows"
    return f"about {rows:,.0f} rows" if rows else "none seen"


def _outputs(plan: Plan) -> list[str]:
    samples = "" if plan.samples == 1 else f", {plan.samples} samples a row"
    head = f"outputs     {_three(plan.output)} tokens a sample (low / expected / high){samples}"
    return [head, *(f"            {line}" for line in plan.output_basis)]


def _memory(plan: Plan) -> list[str]:
    target, memory = plan.target, plan.target.memory
    quantized = target.precision.quantization.value
    kind = target.dtype if quantized == "none" else f"{target.dtype}, {quantized} weights"
    lines = [
        f"a worker    {target.name}: {kind}, SSM state {target.state_dtype}",
        f"            {target.basis}",
    ]
    lines += [
        f"  {_bytes(row.size_bytes):>12}  {row.name}" + (f" ({row.detail})" if row.detail else "")
        for row in memory.table
    ]
    lines += [
        f"  {_bytes(memory.memory_bytes + memory.outside_bytes):>12}  together",
        f"sequences   {plan.prediction.sequences:,} in flight a worker, "
        f"up to {memory.max_model_len:,} tokens each",
        f"            of {memory.max_sequences:,} slots, those that find blocks for "
        f"{plan.census.mean + plan.census.max_tokens:,.0f} tokens: prompt and max_tokens",
    ]
    return lines


def _speed(plan: Plan) -> list[str]:
    prediction, target = plan.prediction, plan.target
    decode, prefill = prediction.decode, prediction.prefill
    return [
        f"decode      {_three(decode.rate)} tokens/s a worker (slow / expected / fast)",
        f"            {_shares(target.decode.share)} of the bound {decode.bound:,.0f} "
        f"({target.decode.basis})",
        f"            the bound: {prediction.sequences:,} tokens every "
        f"{prediction.step_seconds * 1e3:,.1f} ms, with {prediction.context:,.0f} tokens of "
        f"context, by {decode.bound_by}",
        f"prefill     {_three(prefill.rate)} tokens/s a worker",
        f"            {_shares(target.prefill.share)} of the bound {prefill.bound:,.0f} "
        f"({target.prefill.basis}), by {prefill.bound_by}",
        f"start-up    {_three(plan.startup)} s",
        f"            {plan.startup_basis}",
    ]


def _durations(plan: Plan) -> list[str]:
    if not plan.prediction.durations[-1].busy:
        return ["nothing is left to do"]
    unit = "GPU-hours" if plan.target.is_gpu else "worker-hours"
    table = [("workers", "time", unit, "cost" if plan.price else "")]
    for one in plan.prediction.durations:
        seconds = (one.seconds.low, one.seconds.expected, one.seconds.high)
        times = " / ".join(_time(value) for value in seconds)
        cost = _three(one.worker_hours.times(plan.price)) if plan.price else ""
        table.append((f"{one.workers:,}", times, _three(one.worker_hours), cost))
    widths = [max(10, *map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    samples = plan.census.runnable_rows * plan.samples
    lines.append(
        "            low / expected / high: start-up, prompts at the prefill rate, outputs at the "
        "decode rate, but never less than the longest row's steps; "
        f"{_count(plan.prediction.prompt_tokens)} prompt tokens and, with what is done, "
        f"{_count(samples)} samples of {_three(plan.output)} tokens"
    )
    last = plan.prediction.durations[-1]
    if last.busy < last.workers:
        lines.append(f"            of {last.workers:,} workers {last.busy:,} find rows to work on")
    if plan.target.num_cpus is not None:
        lines.append(f"            workers share {plan.target.num_cpus} CPUs")
    if plan.price:
        lines.append(f"            cost: hours times price_per_gpu_hour {plan.price:g}")
    return lines


def _requests(plan: Plan) -> list[str]:
    if not plan.requests:
        return ["requests    none: input and output are local"]
    total = sum(one.count for one in plan.requests)
    last = plan.prediction.durations[-1]
    lines = [f"requests    about {_count(total)} to object storage, with {last.workers:,} workers"]
    return lines + [f"  {one.count:>12,.0f}  {one.kind} ({one.made_of})" for one in plan.requests]


def _about(value: float, error: float) -> str:
    if not error:
        return f"{value:,.0f}"
    return f"about {_count(value)} ± {error / value:.1%}"


def _count(value: float) -> str:
    """Three digits that mean something."""
    for size, unit in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:,.2f}{unit}"
    return f"{value:,.0f}"


def _three(values: Range) -> str:
    return " / ".join(
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for value in (values.low, values.expected, values.high)
    )


def _shares(values: Range) -> str:
    return " / ".join(f"{v:.0%}" for v in (values.low, values.expected, values.high))


def _bytes(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} bytes"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} h"

"""A plan as text for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from batchwright.cli.printable import printable
from batchwright.job.plan_job import JobPlan, Range
from batchwright.plan.prices import PriceList
from batchwright.report.amounts import duration

FORMAT_VERSION = 1
ENDS = ("low", "likely", "high")
WIDTH = 10
BUSY = 1.1
"""Times as long, from which on it is worth saying that others use the machine."""


def plan_as_text(
    plan: JobPlan, source: str, model: str, *, prices: PriceList | None, free_disk: int | None
) -> str:
    """Some lines."""
    lines = [f"Plan of {printable(source)} for {printable(model)}", ""]
    lines += _row_lines(plan)
    lines += _token_lines(plan)
    lines += _memory_lines(plan)
    lines += _disk_lines(plan, free_disk)
    lines += _time_lines(plan)
    if prices is not None:
        lines += _money_lines(plan, prices)
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}"


def _row_lines(plan: JobPlan) -> Iterator[str]:
    counts = plan.counts
    parts = [f"{counts.num_read:,} read"]
    if counts.num_done:
        parts.append(f"{counts.num_done:,} done before")
    if counts.num_bad:
        parts.append(f"{counts.num_bad:,} will fail")
    yield _line("rows", ", ".join(parts))
    for code, number in counts.bad.most_common():
        yield _line("", f"{code}: {number:,}")
    if counts.longest_tokens:
        yield _line(
            "", f"the longest is line {counts.longest_line}: up to {counts.longest_tokens:,} tokens"
        )


def _token_lines(plan: JobPlan) -> Iterator[str]:
    tokens = plan.tokens
    num_prompts = sum(plan.num_tasks.values())
    parts = [f"{num_prompts - plan.num_folded:,} to compute"]
    if plan.num_folded:
        parts.append(f"{plan.num_folded:,} identical to one of them")
    yield _line("prompts", ", ".join(parts))
    parts = [f"{tokens.num_prompt:,} tokens: {plan.work[0].num_prompt_tokens:,} to compute"]
    if tokens.num_shared:
        parts.append(f"{tokens.num_shared:,} shared with other rows")
    if tokens.num_folded:
        parts.append(f"{tokens.num_folded:,} in identical rows")
    yield _line("", ", ".join(parts))
    if tokens.num_shared_in_job > tokens.num_shared:
        yield _line(
            "",
            f"{tokens.num_shared_in_job:,} could be shared if rows with the same beginning stood "
            "closer together",
        )
    low, likely, high = tokens.output
    if high:
        yield _line("outputs", f"{likely:,} tokens likely, {low:,} to {high:,}")
        reason = "as finished rows did" if plan.share_is_measured else "a guess: none is finished"
        share = f"{plan.output_share:.0%} of what rows allow on average"
        yield _line("", f"likely: {share} ({reason}); high: all of it")


def _memory_lines(plan: JobPlan) -> Iterator[str]:
    memory = plan.memory
    kv_tokens = " and ".join(f"{number:,}" for number in memory.kv_tokens)
    yield _line(
        "memory",
        f"{_size(memory.weight_bytes)} weights, up to {_size(memory.kv_bytes)} keys and values "
        f"({kv_tokens} tokens); {_size(memory.free_bytes)} free",
    )
    running = plan.predictions[1].max_running
    yield _line(
        "",
        f"{memory.rows_at_once:,} rows of the likely length fit at once; {running:,} run at once",
    )
    if memory.host_bytes > memory.free_bytes:
        yield _line("", f"{_size(memory.host_bytes)} in all at most, which is more than is free")


def _disk_lines(plan: JobPlan, free_disk: int | None) -> Iterator[str]:
    if free_disk is None:
        return
    low, likely, high = plan.bytes_written
    yield _line("disk", f"{_size(likely)} likely, up to {_size(high)}; {_size(free_disk)} free")
    if high > free_disk:
        when = "certainly" if low > free_disk else "if answers are long"
        yield _line("", f"the disk will be full before the end, {when}")


def _time_lines(plan: JobPlan) -> Iterator[str]:
    low, likely, high = (duration(seconds) for seconds in plan.total_s)
    yield _line(
        "time",
        f"{likely} likely, {low} to {high}; {duration(plan.load_s)} of it to load the model",
    )
    whole = all(one.is_whole for one in plan.predictions)
    number = min(one.num_simulated for one in plan.predictions)
    how = "all rows" if whole else f"{number:,} rows at least, scaled up by their work"
    threads = "thread" if plan.num_threads == 1 else "threads"
    yield _line("", f"simulated on {how}; {plan.machine}, {plan.num_threads} {threads}")
    if plan.busy >= BUSY:
        yield _line("", f"others use the machine: work takes {plan.busy:.1f} times as long now")


def _money_lines(plan: JobPlan, prices: PriceList) -> Iterator[str]:
    width = max(len(price.name) for price in prices.prices) + 2
    heads = "".join(f"{end:>14}" for end in ENDS)
    yield _line("money", f"{prices.currency:<{width}}{heads}")
    for price in prices.prices:
        amounts = "".join(f"{amount:>14,.4f}" for amount in plan.cost(price))
        yield _line("", f"{price.name:<{width}}{amounts}")


def _size(num_bytes: float) -> str:
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:,.1f} MB"
    return f"{num_bytes / 1e9:,.1f} GB"


def plan_as_json(
    plan: JobPlan, source: str, model: str, *, prices: PriceList | None, free_disk: int | None
) -> str:
    """One object; docs/plan.md lists its fields."""
    counts, tokens, memory = plan.counts, plan.tokens, plan.memory
    values = {
        "version": FORMAT_VERSION,
        "input": source,
        "model": model,
        "rows": {
            "read": counts.num_read,
            "done": counts.num_done,
            "bad": counts.num_bad,
            "bad_codes": dict(counts.bad),
            "longest_line": counts.longest_line,
            "longest_tokens": counts.longest_tokens,
        },
        "prompts": {**plan.num_tasks, "folded": plan.num_folded},
        "tokens": {
            "prompt": tokens.num_prompt,
            "prompt_computed": plan.work[0].num_prompt_tokens,
            "prompt_shared": tokens.num_shared,
            "prompt_shared_in_job": tokens.num_shared_in_job,
            "prompt_folded": tokens.num_folded,
            "prompt_forked": tokens.num_forked,
            "output": _ends(tokens.output),
            "computed": _ends([work.num_tokens for work in plan.work]),
        },
        "output_share": plan.output_share,
        "output_share_is_measured": plan.share_is_measured,
        "memory": {
            "weight_bytes": memory.weight_bytes,
            "kv_bytes": memory.kv_bytes,
            "kv_tokens": list(memory.kv_tokens),
            "host_bytes": memory.host_bytes,
            "free_bytes": memory.free_bytes,
            "rows_at_once": memory.rows_at_once,
        },
        "disk": {"written_bytes": _ends(plan.bytes_written), "free_bytes": free_disk},
        "seconds": {"load": plan.load_s, "run": _ends(plan.run_s), "total": _ends(plan.total_s)},
        "simulated_rows": _ends([one.num_simulated for one in plan.predictions]),
        "machine": plan.machine,
        "threads": plan.num_threads,
        "busy": plan.busy,
        "plan_seconds": plan.plan_s,
        "money": None if prices is None else _money(plan, prices),
    }
    return json.dumps(values)


def _money(plan: JobPlan, prices: PriceList) -> dict[str, Any]:
    entries = {price.name: _ends(plan.cost(price)) for price in prices.prices}
    return {"currency": prices.currency, "entries": entries}


def _ends(values: Range | Sequence[float]) -> dict[str, float]:
    return dict(zip(ENDS, values, strict=True))

"""Simulated runs as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchwright.cli.printable import printable
from batchwright.order_runs import OrderRun
from batchwright.report.amounts import percent


def facts_in_words(facts: Mapping[str, Any]) -> dict[str, str]:
    """What was simulated, by name."""
    overlap = facts["overlap"]
    return {
        "job": f"{printable(facts['job'])}: {facts['rows']:,} rows, {facts['prompt_tokens']:,} "
        f"prompt and {facts['output_tokens']:,} output tokens",
        "model": f"{printable(facts['model'])}, {facts['parameters'] / 1e9:.2f} billion parameters",
        "machine": f"{facts['machine']}, overlap of compute and reading keys {overlap:g}",
        "engine": f"{facts['kv_tokens']:,} tokens of keys and values, at most "
        f"{facts['max_num_seqs']:,} sequences and {facts['max_num_batched_tokens']:,} tokens in a "
        "step",
    }


def runs_as_text(facts: Mapping[str, Any], runs: Sequence[OrderRun]) -> str:
    """A table with one line per order."""
    lines = [f"{name:<9}{text}" for name, text in facts_in_words(facts).items()]
    lines += ["", f"{'order':14}{'seconds':>10}{'tok/s':>10}{'prefill':>13}{'/unique':>9}"]
    lines[-1] += (
        f"{'steps':>9}{'preempted':>11}{'running':>9}{'peak KV':>9}{'FLOPs':>7}{'bytes':>7}"
    )
    for run in runs:
        ratio = run.prefill_tokens / max(run.unique_tokens, 1)
        lines.append(
            f"{run.order:14}{run.seconds:10,.1f}{run.tokens_per_s:10,.0f}{run.prefill_tokens:13,}"
            f"{ratio:9.3f}{run.steps:9,}{run.preemptions:11,}{run.max_running:9,}"
            f"{percent(run.peak_kv_use):>9}{percent(run.compute_use):>7}"
            f"{percent(run.bandwidth_use):>7}"
        )
    return "\n".join(lines)

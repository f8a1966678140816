"""Advice as text for people, and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from batchwright.cli.printable import printable
from batchwright.job.advice import Advice
from batchwright.job.confirm import Confirmation
from batchwright.plan.advise.knobs import Knobs
from batchwright.report import advice_words as words
from batchwright.report import amounts

FORMAT_VERSION = 1
WIDTH = 10
SHOWN_TRIALS = 6


def advice_as_text(
    advice: Advice, confirmation: Confirmation | None, not_run: str, source: str, model: str
) -> str:
    """Some lines. `not_run`: why there were no real runs, where there were none."""
    own = advice.own.knobs
    picked = words.options(words.chosen(advice, confirmation), own)
    title = f"Advice on {printable(source)} for {printable(model)}, {advice.hardware}"
    lines = [title, ""]
    lines += _lines("set", [picked or "nothing: keep the settings you have"])
    lines += _lines("why", words.reasons(advice, confirmation, not_run))
    lines += _lines("predicted", list(_trials(advice)))
    lines += _lines("batch", words.batch_words(advice))
    lines += _lines("memory", words.memory_words(advice.memory))
    if advice.queue is not None:
        lines += _lines("queue", words.queue_words(advice.queue))
    if advice.devices is not None:
        lines += _lines("devices", words.device_words(advice.devices, advice.device))
    return "\n".join(lines)


def _lines(name: str, texts: Sequence[str]) -> list[str]:
    return [f"{'' if i else name:<{WIDTH}}{text}" for i, text in enumerate(texts)]


def _trials(advice: Advice) -> Iterator[str]:
    for trial in words.worth_showing(advice, SHOWN_TRIALS):
        name = words.knobs_words(trial, advice.own.knobs)
        yield f"{amounts.seconds(trial.seconds):>10}  {name}"


def advice_as_json(
    advice: Advice, confirmation: Confirmation | None, not_run: str, source: str, model: str
) -> str:
    """One object; docs/advise.md lists its fields."""
    picked = words.chosen(advice, confirmation)
    values: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "input": source,
        "model": model,
        "hardware": advice.hardware,
        "rows": advice.counts.num_read,
        "bad_rows": advice.counts.num_bad,
        "tokens": advice.num_tokens,
        "output_share": advice.output_share,
        "settings": picked,
        "options": words.options(picked, advice.own.knobs),
        "reasons": words.reasons(advice, confirmation, not_run),
        "own": advice.own,
        "predicted": advice.pick,
        "trials": advice.trials,
        "profile": advice.profile,
        "memory": advice.memory,
        "measured": None if confirmation is None else _measured(confirmation),
        "queue": advice.queue,
        "devices": advice.devices,
    }
    return json.dumps(_plain(values))


def _measured(confirmation: Confirmation) -> dict[str, Any]:
    return {
        "settings": confirmation.knobs,
        "predicted_s": confirmation.predicted_s,
        "rounds_s": confirmation.rounds,
        "rows": confirmation.num_rows,
        "is_whole": confirmation.is_whole,
        "winner": confirmation.winner,
    }


def _plain(value: Any) -> Any:
    """Records as objects; JSON has no infinity, null stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Knobs):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value

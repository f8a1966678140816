"""Advice in words: what to set, and why. The command and the page say the same."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator

from batchwright.job.advice import Advice, DeviceAdvice, MemoryAdvice, QueueAdvice
from batchwright.job.confirm import Confirmation
from batchwright.plan.advise.knobs import LEAST_GAIN, Knobs, Trial
from batchwright.report import amounts

FLAGS = {
    "order": "--order",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "num_threads": "--threads",
    "block_size": "--block-size",
}


MOST_CLIPPED = 0.5
"""A limit that cuts off more of the outputs is no advice."""


def chosen(advice: Advice, confirmation: Confirmation | None) -> Knobs:
    """What is advised: what won in real runs if there were any, else what is predicted to win."""
    if confirmation is None:
        return advice.pick.knobs
    return confirmation.knobs[confirmation.winner]


def options(knobs: Knobs, own: Knobs) -> str:
    """Options of `batchwright run` that make the one of the other; empty if they are equal."""
    changed = dataclasses.asdict(knobs)
    before = dataclasses.asdict(own)
    return " ".join(
        f"{flag} {changed[name]}" for name, flag in FLAGS.items() if changed[name] != before[name]
    )


def reasons(advice: Advice, confirmation: Confirmation | None, not_run: str) -> list[str]:
    """Why these settings.

    Args:
        not_run: why there were no real runs, where there were none.
    """
    return [
        *_choice(advice, confirmation, not_run),
        *_single_changes(advice),
        *_other_blocks(advice),
    ]


def _choice(advice: Advice, confirmation: Confirmation | None, not_run: str) -> Iterator[str]:
    own, pick = advice.own, advice.pick
    number = f"{len(advice.trials)} settings were simulated"
    if pick is own:
        yield (
            f"{number}; none is predicted to be {amounts.percent(LEAST_GAIN)} faster than the "
            f"settings you have (order {own.knobs.order}, {_span(own.seconds)})."
        )
        return
    yield (
        f"{number}; {options(pick.knobs, own.knobs)} is predicted to take "
        f"{_span(pick.seconds)}, the settings you have, order {own.knobs.order}, "
        f"{_span(own.seconds)} "
        f"({_less(pick.seconds / own.seconds)})."
    )
    if confirmation is None:
        yield f"This was not confirmed in a real run: {not_run}."
    else:
        yield from _measured(confirmation)


def _measured(confirmation: Confirmation) -> Iterator[str]:
    own = confirmation.knobs[0]
    rows = "the whole job" if confirmation.is_whole else f"{confirmation.num_rows:,} rows"
    number = len(confirmation.rounds)
    for index in range(1, len(confirmation.knobs)):
        ratios = confirmation.ratios(index)
        predicted = confirmation.predicted_s[index] / max(confirmation.predicted_s[0], 1e-9)
        verdict = "it beats" if confirmation.beats(index) else "it does not beat"
        yield (
            f"{options(confirmation.knobs[index], own)}: {verdict} the settings you have in "
            f"{number} real runs of {rows}: {statistics.median(ratios):.3f} of their time "
            f"({min(ratios):.3f} to {max(ratios):.3f}; predicted {predicted:.3f})."
        )
    if confirmation.winner == 0:
        yield "So the advice is to keep the settings you have."
        if not confirmation.is_whole:
            yield (
                "Differences that need more rows do not show in a sample; give more time with "
                "--confirm-seconds."
            )


def _single_changes(advice: Advice) -> Iterator[str]:
    """What each part of the pick does alone."""
    own, pick = advice.own, advice.pick
    names = [name for name in FLAGS if getattr(pick.knobs, name) != getattr(own.knobs, name)]
    if len(names) < 2:
        return
    trials = {trial.knobs: trial for trial in advice.trials}
    for name in names:
        value = getattr(pick.knobs, name)
        alone = trials.get(dataclasses.replace(own.knobs, **{name: value}))
        if alone is not None:
            yield f"{FLAGS[name]} {value} alone: {_less(alone.seconds / own.seconds)}, predicted."


def _other_blocks(advice: Advice) -> Iterator[str]:
    """What blocks of other sizes would change."""
    pick = advice.pick
    same = dataclasses.asdict(pick.knobs) | {"block_size": 0}
    others = [
        f"{trial.knobs.block_size}: {_less(trial.seconds / pick.seconds)}"
        for trial in sorted(advice.trials, key=lambda trial: trial.knobs.block_size)
        if trial is not pick and dataclasses.asdict(trial.knobs) | {"block_size": 0} == same
    ]
    if others:
        yield f"Blocks of other sizes, --block-size {', '.join(others)}, predicted."


def worth_showing(advice: Advice, number: int) -> list[Trial]:
    """The fastest trials, and that of the settings one has. Other block sizes that gain nothing
    are left out: they would be most of the list."""
    own = advice.own
    seconds = {trial.knobs: trial.seconds for trial in advice.trials}

    def says_something(trial: Trial) -> bool:
        usual = dataclasses.replace(trial.knobs, block_size=own.knobs.block_size)
        return trial.knobs == usual or trial.seconds < seconds.get(usual, math.inf)

    told = [
        trial for trial in advice.trials if trial in (own, advice.pick) or says_something(trial)
    ]
    shown = sorted(told, key=lambda trial: trial.seconds)[:number]
    return shown if own in shown else [*shown, own]


def _less(ratio: float) -> str:
    if abs(ratio - 1) < 0.0005:
        return "the same"
    if ratio > 1:
        return f"{ratio - 1:.1%} more"
    return f"{1 - ratio:.1%} less"


def batch_words(advice: Advice) -> list[str]:
    """Where throughput flattens."""
    best, profile = advice.memory.best, advice.profile
    alone, top = profile[0], max(profile, key=lambda point: point.tokens_per_s)
    each = f", a token every {_ms(best.token_s)}" if best.token_s else ""
    words = [
        f"{best.batch_size} at once: {best.tokens_per_s / alone.tokens_per_s:.1f} times the "
        f"throughput of one, {best.tokens_per_s / top.tokens_per_s:.0%} of the most{each}"
    ]
    if best.batch_size < profile[-1].batch_size:
        words.append("more is below a fifth of its share of one's throughput, or over the limit")
    return words


def memory_words(memory: MemoryAdvice) -> list[str]:
    """What to reserve, and what the rest of memory would do."""
    room = f"of {amounts.memory(memory.memory_bytes)}"
    words = [
        f"{memory.kv_tokens:,} tokens of keys and values suffice for it "
        f"({amounts.memory(memory.kv_bytes)}; --kv-tokens {memory.kv_tokens}), beside "
        f"{amounts.memory(memory.weight_bytes)} weights, {room}"
    ]
    if memory.replicas > 1:
        words.append(
            f"{memory.replicas} such engines fit; they share the device, so together they give "
            f"{memory.gain_serial:.2f} to {memory.gain_overlapped:.2f} times the throughput of one"
        )
    elif memory.replicas == 1:
        words.append("one such engine fits")
    else:
        words.append("not even one such engine fits")
    return words


def queue_words(queue: QueueAdvice) -> list[str]:
    """What becomes of a load."""
    words = [
        f"{queue.arrivals_per_s:g} request{'s' if queue.arrivals_per_s != 1 else ''} per second: "
        f"answered after "
        f"{_time(queue.simulated_s)} on average, 95% within {_time(queue.simulated_p95_s)}; busy "
        f"{queue.busy_fraction:.0%} of the time (simulated)"
    ]
    if math.isinf(queue.elastic_s):
        words.append("no way of batching keeps up with that for ever: the queue grows")
    fixed = f"the best fixed size is {queue.fixed_size}, about {_time(queue.fixed_s)}"
    if math.isinf(queue.fixed_s):
        fixed = "no fixed size that was looked at keeps up"
    words.append(
        f"batches of all that wait: at most {_time(queue.dynamic_s)} if padded, "
        f"{_time(queue.elastic_s)} if rows leave when done; {fixed}"
    )
    if queue.limit is None:
        words.append("one request at a time cannot keep up, whatever limit its tokens have")
        return words
    limit, full_s = queue.limit, queue.limits[-1].wait_s
    if limit.clipped_fraction > MOST_CLIPPED:
        words.append(
            f"one request at a time keeps up only with max_tokens as low as {limit.max_tokens}, "
            f"which cuts off {limit.clipped_fraction:.0%} of the outputs"
        )
        return words
    without = "queue grows for ever" if math.isinf(full_s) else f"wait is {_time(full_s)}"
    words.append(
        f"one at a time: max_tokens {limit.max_tokens} cuts off {limit.clipped_fraction:.0%} and "
        f"waits {_time(limit.wait_s)}; without it the {without}"
    )
    return words


def device_words(devices: DeviceAdvice, kind: str) -> list[str]:
    """How many."""
    target = _span(devices.target_s)
    if devices.found is None:
        nearest = min(devices.tried, key=lambda one: one.seconds, default=None)
        if nearest is None:
            return [f"{target}: {kind} does not hold the model, in no layout that was looked at"]
        return [
            f"{target} is out of reach with {kind}: {nearest.layout} would take "
            f"{_span(nearest.seconds)}"
        ]
    found = devices.found
    return [f"{kind}, {found.layout}: {_span(found.seconds)}, for {target}"]


def knobs_words(trial: Trial, own: Knobs) -> str:
    """Settings as a short name in tables."""
    return options(trial.knobs, own) or "the settings you have"


def _span(seconds: float) -> str:
    """Seconds with decimals, minutes and hours without."""
    return amounts.seconds(seconds) if seconds < 60 else amounts.duration(seconds)


def _time(seconds: float) -> str:
    return "no end" if math.isinf(seconds) else amounts.seconds(seconds)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else amounts.seconds(seconds)

"""The engine's own settings, searched by prediction.

One setting after the other, then all once more from where that led, until nothing changes.
Throughput has ridges and several peaks over such settings (arXiv:2408.01050), so what was best
elsewhere is not carried over, and what is returned is the best of what was evaluated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from batchwright.errors import ConfigError
from batchwright.kv.groups import BLOCK_SIZE

LEAST_GAIN = 0.01
"""Less than this share of the time is no reason to leave the settings one has."""

MAX_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """Settings that change how fast a job is, and no answer; see `EngineConfig`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    order: str
    num_threads: int
    block_size: int = BLOCK_SIZE

    def num_changes(self, other: Knobs) -> int:
        """Settings that differ."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return sum(mine != theirs for mine, theirs in pairs)


class Trial(NamedTuple):
    """What some settings are predicted to give.

    Attributes:
        seconds: of the whole job.
        token_s: mean seconds between two tokens of a sequence.
        tokens_per_s: prompt and output tokens of the job per second.
        kv_tokens: most tokens of keys and values in use at once.
        max_running: most sequences at once.
    """

    knobs: Knobs
    seconds: float
    token_s: float
    tokens_per_s: float
    kv_tokens: int
    max_running: int


Evaluate = Callable[[Knobs], Trial | None]
"""A prediction; None if these settings are not possible."""


def search(
    start: Knobs, choices: Mapping[str, Sequence[Any]], evaluate: Evaluate, slo_s: float = math.inf
) -> list[Trial]:
    """Evaluate settings around the best ones found so far.

    Args:
        start: evaluated first; it must be possible.
        choices: values of each setting, searched in this order; fixed settings are left out.
        slo_s: see `best_trial`.
    Returns:
        All trials, that of `start` first.
    """
    seen: dict[Knobs, Trial | None] = {start: evaluate(start)}
    here = start
    for _ in range(MAX_ROUNDS):
        before = here
        for name, values in choices.items():
            for value in values:
                knobs = dataclasses.replace(here, **{name: value})
                if knobs not in seen:
                    seen[knobs] = evaluate(knobs)
            here = _leader(list(filter(None, seen.values())), slo_s).knobs
        if here == before:
            break
    return list(filter(None, seen.values()))


def best_trial(trials: Sequence[Trial], slo_s: float = math.inf) -> Trial:
    """The fastest that keeps to the latency limit.

    The first trial, that of the settings one has, is left only for a gain of LEAST_GAIN, if it
    keeps to the limit; of equal ones the one with fewest changes is taken.

    Args:
        slo_s: most seconds between two tokens of a sequence.
    Raises:
        ConfigError: none keeps to it.
    """
    leader = _leader(trials, slo_s)
    if leader.token_s > slo_s:
        raise ConfigError(
            f"a token every {slo_s * 1e3:g} ms is out of reach: the least found is "
            f"{leader.token_s * 1e3:.3g} ms; raise --latency-slo"
        )
    own = trials[0]
    if own.token_s <= slo_s and leader.seconds > (1 - LEAST_GAIN) * own.seconds:
        return own
    return leader


def runners_up(trials: Sequence[Trial], slo_s: float, number: int) -> list[Trial]:
    """The best trials that gain LEAST_GAIN at least over the first one, fastest first.

    (Any that keep to the limit, if the first one does not.)

    Those that differ from a faster one by less than a thousandth of the time are left out: running
    both would tell nothing.
    """
    chosen: list[Trial] = []
    own = trials[0]
    most_s = (1 - LEAST_GAIN) * own.seconds if own.token_s <= slo_s else math.inf
    for trial in sorted(trials, key=_key(own.knobs, slo_s)):
        if trial.token_s > slo_s or trial.seconds > most_s:
            continue
        if all(abs(trial.seconds - other.seconds) > 1e-3 * other.seconds for other in chosen):
            chosen.append(trial)
    return chosen[:number]


def _leader(trials: Sequence[Trial], slo_s: float) -> Trial:
    """The fastest within the limit; if none is, the one nearest to it."""
    return min(trials, key=_key(trials[0].knobs, slo_s))


def _key(own: Knobs, slo_s: float) -> Callable[[Trial], tuple[Any, ...]]:
    def key(trial: Trial) -> tuple[Any, ...]:
        excess_s = max(trial.token_s - slo_s, 0.0)
        changes = trial.knobs.num_changes(own)
        return excess_s, trial.seconds, changes, dataclasses.astuple(trial.knobs)

    return key

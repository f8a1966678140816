"""EngineCounts: an engine's counts at one moment, and what was added since another."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from batchwright.sched.work import Work


class EngineStats(Protocol):
    """What an engine counts; `sched.intake.SchedulerStats`."""

    @property
    def num_steps(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_recomputed_tokens(self) -> int: ...
    @property
    def num_generated_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_folded(self) -> int: ...
    @property
    def work(self) -> Work: ...


class EngineCounts(NamedTuple):
    """See `sched.intake.SchedulerStats` and `sched.work.Work`; keys are by KV group."""

    steps: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    folded: int = 0
    step_rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    logits: int = 0
    scored: int = 0
    prompt_keys: tuple[int, ...] = ()
    output_keys: tuple[int, ...] = ()
    recomputed_keys: tuple[int, ...] = ()

    @classmethod
    def of(cls, stats: EngineStats) -> EngineCounts:
        """The counts now."""
        work = stats.work
        return cls(
            stats.num_steps,
            stats.num_computed_tokens,
            stats.num_cached_tokens,
            stats.num_recomputed_tokens,
            stats.num_generated_tokens,
            stats.num_preemptions,
            stats.num_folded,
            work.num_rows,
            work.num_prompt_tokens,
            work.num_output_tokens,
            work.num_logits,
            work.num_scored,
            tuple(work.num_prompt_keys),
            tuple(work.num_output_keys),
            tuple(work.num_recomputed_keys),
        )

    def since(self, before: EngineCounts) -> EngineCounts:
        """What was added after `before`, an earlier moment of the same engine."""
        numbers = (now - then for now, then in zip(self[:-3], before[:-3], strict=True))
        keys = (_minus(now, then) for now, then in zip(self[-3:], before[-3:], strict=True))
        return EngineCounts._make([*numbers, *keys])


def _minus(now: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    if not before:  # nothing had been computed
        return now
    return tuple(after - then for after, then in zip(now, before, strict=True))

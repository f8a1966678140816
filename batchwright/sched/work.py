"""Work: what Steps compute, counted in tokens, keys and logits, for metrics and reports.

A *prompt token* is a computed token that stands in its row's prompt, an *output token* one that was
generated and is now fed back. A *key* is one (query token, key) pair that attention has to visit,
so the FLOPs of a job follow from these counts and the model's shape.

Counted once per Step, from its arrays: about 50 microseconds, however many rows it has.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np

from batchwright.plan.cost import num_distinct, num_keys
from batchwright.plan.shape import ModelShape
from batchwright.request import Int32Array
from batchwright.step import Step


@dataclass(slots=True)
class Work:
    """Counts since the start. Lists have one entry per KV group.

    Attributes:
        num_rows: rows of all Steps; divided by the number of Steps it is the mean batch.
        num_prompt_tokens, num_output_tokens: computed tokens by what they are.
        num_logits: lines of logits that tokens were drawn from; forks share theirs.
        num_scored: lines of logits that given tokens were scored with.
        num_prompt_keys, num_output_keys: keys visited for prompt and for output tokens.
        num_recomputed_tokens: computed again after preemption or a failed step; they are in the
            counts above too.
        num_recomputed_keys: the keys of those.
    """

    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_logits: int = 0
    num_scored: int = 0
    num_recomputed_tokens: int = 0
    num_prompt_keys: list[int] = field(default_factory=list)
    num_output_keys: list[int] = field(default_factory=list)
    num_recomputed_keys: list[int] = field(default_factory=list)

    def copy(self) -> Work:
        """The counts as they are now."""
        return replace(
            self,
            num_prompt_keys=[*self.num_prompt_keys],
            num_output_keys=[*self.num_output_keys],
            num_recomputed_keys=[*self.num_recomputed_keys],
        )

    def add(
        self,
        step: Step,
        num_prompt: Int32Array,
        computed_once: Int32Array,
        windows: Seq[int | None],
    ) -> None:
        """Count a Step.

        Args:
            num_prompt, computed_once: [max_num_seqs] prompt length of each slot's sequence, and how
                many of its tokens an earlier occupation has computed.
            windows: the sliding window of each KV group.
        """
        firsts, lasts = step.cu_seqlens_q[:-1], step.cu_seqlens_q[1:] - 1
        starts, ends = step.positions[firsts], step.positions[lasts] + 1
        self.num_logits += num_distinct(step.sample_tokens)
        self.num_scored += len(step.score_tokens)
        self.add_rows(starts, ends, num_prompt[step.slots], computed_once[step.slots], windows)

    def add_rows(
        self,
        starts: Int32Array,
        ends: Int32Array,
        num_prompt: Int32Array,
        computed_once: Int32Array,
        windows: Seq[int | None],
    ) -> None:
        """Count rows that compute tokens [start, end) of their sequences.

        Args:
            starts, ends, num_prompt, computed_once: [num_rows].
        """
        prompt_ends = np.clip(num_prompt, starts, ends)
        repeated_ends = np.clip(computed_once, starts, ends)
        num_prompt_tokens = int((prompt_ends - starts).sum())
        self.num_rows += len(starts)
        self.num_prompt_tokens += num_prompt_tokens
        self.num_output_tokens += int((ends - starts).sum()) - num_prompt_tokens
        self.num_recomputed_tokens += int((repeated_ends - starts).sum())
        if not self.num_prompt_keys:
            self.num_prompt_keys = [0] * len(windows)
            self.num_output_keys = [0] * len(windows)
            self.num_recomputed_keys = [0] * len(windows)
        is_any_repeated = bool((repeated_ends > starts).any())
        for group, window in enumerate(windows):
            before, prompt = num_keys(starts, window), num_keys(prompt_ends, window)
            self.num_prompt_keys[group] += int((prompt - before).sum())
            self.num_output_keys[group] += int((num_keys(ends, window) - prompt).sum())
            if is_any_repeated:
                repeated = num_keys(repeated_ends, window) - before
                self.num_recomputed_keys[group] += int(repeated.sum())


def work_flops(
    shape: ModelShape, num_tokens: int, num_keys: Seq[int], num_logits: int
) -> tuple[int, int]:
    """(FLOPs in the layers, FLOPs in the output head) of counted work.

    Args:
        num_keys: by KV group; empty if nothing was computed.
    """
    attention = shape.attention_flops(num_keys) if num_keys else 0
    layers = shape.layer_flops_per_token * num_tokens + attention
    return layers, shape.head_flops_per_token * num_logits

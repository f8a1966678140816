"""StepTimes: where the time of the engine's steps went: prefill, decode, and the tail.

A step's time is divided between prefill and decode by the FLOPs each of them had in it: prompt
tokens, their keys and scored logits on one side; fed-back output tokens, their keys and the logits
that tokens are drawn from on the other. A step that has only one kind is that kind's whole, so the
slowness of pure decoding is charged to decoding. (By tokens alone the output head, a fifth of a
small model's work, would be charged to the prompts.) Calls in which no step came to its end, as
replicas make them, are charged as the next that did: it was under way.

The tail is the last stretch of a run in which too little is left to fill the machine. A step
belongs to it if, after it, no row is left to be read or to start, and it computed fewer than half
the rows of the run's fullest step and fewer than half the tokens of its largest; and if that is
true of all steps that follow.
"""

from __future__ import annotations

from batchwright.job.engine_counts import EngineCounts
from batchwright.plan.shape import ModelShape
from batchwright.sched.work import work_flops


class StepTimes:
    """See the module docstring.

    Args:
        shape: the model's; None divides by tokens.

    Attributes, in seconds:
        prefill_s, decode_s: together the time of all steps, compiling left out.
        compile_s: what compiling kernels took of the steps, the first time on a machine.
        tail_since_s: when the present tail began, on the caller's clock; None: this is no tail.
        tail_prefill_s, tail_decode_s: the part of the above that lies in the tail.
    """

    def __init__(self, shape: ModelShape | None) -> None:
        self._shape = shape
        self.prefill_s = self.decode_s = self.compile_s = 0.0
        self.tail_since_s: float | None = None
        self.tail_prefill_s = self.tail_decode_s = 0.0
        self._max_rows = self._max_tokens = 0.0
        self._waited_s = 0.0  # calls without a step since the last one, decoding so far

    @property
    def step_s(self) -> float:
        """The time of all steps, compiling left out."""
        return self.prefill_s + self.decode_s

    def add(
        self,
        counts: EngineCounts,
        start_s: float,
        end_s: float,
        *,
        compile_s: float,
        is_last_work: bool,
    ) -> None:
        """One call of the engine's `step` is over.

        Args:
            counts: what it added to the engine's counts.
            compile_s: of its time, what went to compiling kernels.
            is_last_work: no row is left to be read or to start.
        """
        self.compile_s += compile_s
        step_s = end_s - start_s - compile_s
        prefill_s = (self._waited_s + step_s) * self._prefill_share(counts)
        decode_s = step_s - prefill_s
        self._waited_s = 0.0 if counts.steps else self._waited_s + step_s
        self.prefill_s += prefill_s
        self.decode_s += decode_s
        is_full = self._fills_the_machine(counts)  # always asked: it sees the largest steps
        if is_last_work and not is_full:
            if self.tail_since_s is None:
                self.tail_since_s = start_s
            self.tail_prefill_s += prefill_s
            self.tail_decode_s += decode_s
        else:
            self.tail_since_s, self.tail_prefill_s, self.tail_decode_s = None, 0.0, 0.0

    def _prefill_share(self, counts: EngineCounts) -> float:
        prefill, decode = counts.prompt_tokens, counts.output_tokens
        if (shape := self._shape) is not None:
            prefill = sum(work_flops(shape, prefill, counts.prompt_keys, counts.scored))
            decode = sum(work_flops(shape, decode, counts.output_keys, counts.logits))
        return prefill / (prefill + decode) if prefill + decode else 0.0

    def _fills_the_machine(self, counts: EngineCounts) -> bool:
        if not counts.steps:  # the result of an earlier step was taken in
            return self.tail_since_s is None
        rows, tokens = counts.step_rows / counts.steps, counts.computed_tokens / counts.steps
        self._max_rows = max(self._max_rows, rows)
        self._max_tokens = max(self._max_tokens, tokens)
        return rows >= self._max_rows / 2 or tokens >= self._max_tokens / 2

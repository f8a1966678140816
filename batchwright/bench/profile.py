"""Where the time of a run goes: products, output head, attention, sampling, scheduling.

Calls are timed from outside, by functions put in front of them, which costs about half a
microsecond a call, 0.1 ms in a step of a model with 30 layers. Steps that are programs
(`exec/step_programs.py`) tell what their kernels take. What none of them covers (norms,
activations, text, results) is `other`.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from batchwright.engine import Engine
from batchwright.exec.step_programs import ATTENTION, PRODUCTS, StepPrograms
from batchwright.llm import LLM
from batchwright.models.layers import Linear
from batchwright.models.shape import HEAD

PARTS = ("products", "head", "attention", "sampling", "scheduling")
OTHER = "other"


class Profile:
    """Seconds of an engine's parts, added up from now on.

    Args:
        llm: is changed; let nothing else use it.
    """

    def __init__(self, llm: LLM) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        engine = llm.engine  # the one look inside
        assert isinstance(engine, Engine), "replicas are in other processes"
        executor: Any = engine._executor
        head = executor._model.get_submodule(HEAD)
        for module in executor._model.modules():
            if isinstance(module, Linear):
                self._watch(module, "forward", "head" if module is head else "products")
        for method in ("plan", "run"):
            self._watch(executor._backend, method, "attention")
        for method in ("sample", "append"):
            self._watch(executor._sampling, method, "sampling")
        for method in ("schedule", "update"):
            self._watch(engine._scheduler, method, "scheduling")
        self._programs: StepPrograms | None = executor.programs
        self._before: Counter[str] = Counter()

    def of(self, total_s: float) -> dict[str, float]:
        """Seconds by part, which add up to the time of the run."""
        seconds = dict(self.seconds)
        if self._programs:
            kernels = self._programs.seconds_by_kernel()
            kernels.subtract(self._before)
            seconds["products"] += sum(kernels[one] for one in PRODUCTS)
            seconds["attention"] += sum(kernels[one] for one in ATTENTION)
        return {**seconds, OTHER: max(total_s - sum(seconds.values()), 0.0)}

    def clear(self) -> None:
        """Begin again."""
        self.seconds.update(dict.fromkeys(PARTS, 0.0))
        if self._programs:
            self._before = self._programs.seconds_by_kernel()

    def _watch(self, owner: Any, name: str, part: str) -> None:
        call, seconds, now = getattr(owner, name), self.seconds, time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[part] += now() - start

        setattr(owner, name, timed)

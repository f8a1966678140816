"""The Executor seam: one method turns a Step into a StepResult."""

from __future__ import annotations

from typing import Protocol

from batchwright.step import Step, StepResult


class Executor(Protocol):
    """Runs Steps in the order given and keeps per-slot state between them."""

    def execute(self, step: Step) -> StepResult:
        """Apply the Step's changes, compute it, and draw its tokens."""
        ...

    def close(self) -> None:
        """Give back memory and devices."""
        ...

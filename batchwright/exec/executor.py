"""The Executor seam: one method turns a Step into a StepResult, or into the promise of one."""

from __future__ import annotations

from typing import Protocol

from batchwright.step import Step, StepResult


class PendingResult(Protocol):
    """A StepResult that may still be computed. A StepResult is one itself, of no wait."""

    def wait(self) -> StepResult:
        """The result, once it is there."""
        ...


class Executor(Protocol):
    """Runs Steps in the order given and keeps per-slot state between them."""

    def execute(self, step: Step) -> PendingResult:
        """Apply the Step's changes, compute it, and draw its tokens; or begin to."""
        ...

    def close(self) -> None:
        """Give back memory and devices."""
        ...

"""Batchwright: an offline batch inference engine for LLMs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# OpenMP threads that spin for long after their work take the cores from others; threads that sleep
# at once wake late. So they spin for some 0.1 ms (docs/experiments.md). The variable is read once,
# when the libraries load, hence here, before anything imports them.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from batchwright.errors import BatchwrightError, RequestError
from batchwright.request import Completion, FinishReason, Request, Result, SamplingParams

if TYPE_CHECKING:
    from batchwright.job.file_job import run_file
    from batchwright.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BatchwrightError",
    "Completion",
    "FinishReason",
    "Request",
    "RequestError",
    "Result",
    "SamplingParams",
    "run_file",
]


def __getattr__(name: str) -> Any:
    """Import the engine, and torch with it, or the job only when they are asked for."""
    if name == "LLM":
        from batchwright.llm import LLM

        return LLM
    if name == "run_file":
        from batchwright.job.file_job import run_file

        return run_file
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A model for jobs whose tokenizer is real and whose arithmetic is not done."""

from __future__ import annotations

from typing import Any

from batchwright.clock import VirtualClock
from batchwright.engine import Engine
from batchwright.exec.sim import SimExecutor, StepCost
from batchwright.kv.groups import KVGroup
from batchwright.plan.order import find_order
from batchwright.sched.scheduler import Scheduler
from batchwright.text.token_bytes import token_bytes
from batchwright.text.tokenizer import load_tokenizer
from batchwright.weights.locate import locate_model


class SimulatedModel:
    """SmolLM2's tokenizer and an engine that pretends; satisfies `job.run_job.JobModel`.

    Args:
        kv_blocks: blocks of 32 tokens that KV memory holds.
        order: name of a file of `plan/orders`.
        cost: of a step, charged to a virtual clock.

    Attributes:
        clock: how long the model would have taken.
    """

    name = "simulated"
    grammars = shape = None

    def __init__(
        self,
        *,
        kv_blocks: int,
        order: str = "fcfs",
        max_num_batched_tokens: int = 8192,
        cost: StepCost | None = None,
    ) -> None:
        self.clock = VirtualClock()
        self.tokenizer = load_tokenizer(locate_model("smollm2"))
        self.token_bytes = token_bytes(self.tokenizer.backend)
        self.order = find_order(order)
        scheduler = Scheduler(
            [KVGroup(None, kv_blocks)],
            block_size=32,
            max_num_seqs=256,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=2048,
            order=self.order,
        )
        self.engine = Engine(
            scheduler,
            SimExecutor(self.clock, cost),
            self.tokenizer,
            max_model_len=2048,
            vocab_size=49152,
        )

    def identity(self) -> dict[str, Any]:
        return {"model": self.name}

    def settings(self) -> dict[str, Any]:
        return {}

    def compile_s(self) -> float:
        return 0.0

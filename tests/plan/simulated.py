"""Jobs run by the real engine and scheduler on the simulated executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from batchwright.clock import VirtualClock
from batchwright.engine import Engine
from batchwright.exec.sim import SimExecutor
from batchwright.kv.groups import KVGroup
from batchwright.plan.length_predictor import LengthPredictor
from batchwright.plan.order import find_order
from batchwright.request import Request, Result, SamplingParams
from batchwright.sched.scheduler import Scheduler
from batchwright.step import NewSequence, Step, StepResult

BLOCK_SIZE = 4
MAX_MODEL_LEN = 256


class NoText:
    """What an engine asks of a tokenizer when nobody reads the text."""

    end_token_ids = (3,)
    special_token_ids = frozenset()
    decoder_kind = "other"

    def decode(self, ids, **options):
        return ""

    def id_to_token(self, id):
        return ""


def rows(
    prompts: Sequence[Sequence[int]], outputs: int | Sequence[int], n: int = 1
) -> list[Request]:
    """Requests of exact output lengths; no two are folded into one."""
    lengths = [outputs] * len(prompts) if isinstance(outputs, int) else outputs
    return [
        Request(
            id=f"r{index}",
            prompt_token_ids=np.array(prompt, np.int32),
            params=SamplingParams(max_tokens=length, n=n, ignore_eos=True, seed=index),
        )
        for index, (prompt, length) in enumerate(zip(prompts, lengths))
    ]


@dataclass
class Watched:
    """Passes Steps on; notes sizes and the order in which rows start."""

    executor: SimExecutor
    scheduler: Scheduler
    num_tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    most_blocks: int = 0

    def execute(self, step: Step) -> StepResult:
        self.num_tokens.append(step.num_tokens)
        for new in step.new_sequences:
            sequence = self.scheduler.books.slots.sequences[new.slot]
            self.starts.append(int(sequence.request.id[1:]))
        pool = self.scheduler.books.tables[0].pool
        self.most_blocks = max(self.most_blocks, pool.num_blocks - pool.num_free)
        return self.executor.execute(step)

    def close(self) -> None:
        pass


@dataclass
class SimulatedRun:
    results: dict[str, Result]
    engine: Engine
    watched: Watched
    seconds: float

    @property
    def stats(self):
        return self.engine.stats

    def num_prefill_tokens(self, requests: Sequence[Request]) -> int:
        """Prompt tokens computed, first and again; every output token but a row's last is fed."""
        fed = sum(r.params.max_tokens - 1 for r in requests)
        return self.stats.num_computed_tokens - fed


def simulated_engine(
    order: str = "fcfs",
    *,
    num_blocks: int = 4096,
    max_num_seqs: int = 8,
    budget: int = 32,
    sharing: bool = True,
    lengths: LengthPredictor | None = None,
    true_length: Callable[[NewSequence], int | None] = lambda new: None,
    look_ahead: int = 0,
) -> tuple[Engine, Watched, VirtualClock]:
    scheduler = Scheduler(
        [KVGroup(None, num_blocks)],
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN,
        prefix_sharing=sharing,
        order=find_order(order),
        lengths=lengths,
    )
    clock = VirtualClock()
    watched = Watched(SimExecutor(clock, output_length=true_length), scheduler)
    engine = Engine(
        scheduler,
        watched,
        NoText(),
        max_model_len=MAX_MODEL_LEN,
        vocab_size=1_000_000,
        look_ahead=look_ahead,
    )
    return engine, watched, clock


def simulate(requests: Sequence[Request], order: str = "fcfs", **settings) -> SimulatedRun:
    """Run a job to its end; checks that nothing is held afterwards."""
    engine, watched, clock = simulated_engine(order, **settings)
    results = {}
    for result in engine.run(requests):
        assert result.request_id not in results, "answered twice"
        assert result.error is None
        results[result.request_id] = result
    engine.check_integrity()
    books = watched.scheduler.books
    assert len(books.tree) == 0
    assert all(table.pool.num_free == table.pool.num_blocks for table in books.tables)
    return SimulatedRun(results, engine, watched, clock.now())

"""An engine on the symbolic executor, with faults: what failed steps leave behind is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from batchwright.engine import Engine
from batchwright.kv.groups import KVGroup
from batchwright.plan.length_predictor import LengthPredictor
from batchwright.plan.order import find_order
from batchwright.request import Request, Result, SamplingParams, Task
from batchwright.sched.scheduler import Scheduler
from batchwright.step import Step, StepResult
from tests.sched.symbolic import SymbolicExecutor

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
VOCAB_SIZE = 50
WINDOWS = [None, 6]

Fault = Callable[[Step, list[str]], None]
"""Called before each step with the requests that have rows in it; raises, or does not."""


class LetterTokenizer:
    """Token i is a letter; only what the engine and stop strings ask of a tokenizer."""

    end_token_ids = (3,)
    special_token_ids = frozenset()
    decoder_kind = "other"

    def encode(self, text, **_):
        return [40 + len(word) % 8 for word in text.split()][:5]

    def decode(self, ids, **_):
        return "".join(chr(0x4E00 + i) for i in ids)

    def id_to_token(self, id):
        return chr(0x4E00 + id)


class FaultyExecutor:
    """The symbolic executor, which writes half of what a failing step should write, and rubbish."""

    def __init__(self, engine_of: Callable[[], Engine], executor: SymbolicExecutor) -> None:
        self.engine_of, self.executor = engine_of, executor
        self.fault: Fault = lambda step, ids: None
        self.num_calls = self.num_failures = 0
        self.steps: list[tuple[int, list[str]]] = []  # (query tokens, requests)

    def execute(self, step: Step) -> StepResult:
        ids = self.engine_of()._scheduler.requests_of(step)
        self.num_calls += 1
        self.steps.append((step.num_tokens, ids))
        try:
            self.fault(step, ids)
        except BaseException:
            self.num_failures += 1
            for kv, kv_slots in zip(self.executor.kv, step.kv_slots, strict=True):
                kv[kv_slots[kv_slots >= 0]] = -1
            raise
        return self.executor.execute(step)

    def close(self) -> None:
        pass


def new_engine(
    *,
    budget: int = 30,
    max_num_seqs: int = 6,
    num_blocks: int = 60,
    look_ahead: int = 0,
    order: str = "fcfs",
    lengths: LengthPredictor | None = None,
) -> tuple[Engine, FaultyExecutor]:
    pools = [num_blocks] * len(WINDOWS)
    scheduler = Scheduler(
        [KVGroup(window, num) for window, num in zip(WINDOWS, pools, strict=True)],
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN,
        order=find_order(order),
        lengths=lengths,
    )
    symbolic = SymbolicExecutor(
        WINDOWS,
        pools,
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
    )
    engine: Engine
    executor = FaultyExecutor(lambda: engine, symbolic)
    engine = Engine(
        scheduler,
        executor,
        LetterTokenizer(),
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        look_ahead=look_ahead,
    )
    return engine, executor


def row(id: str, prompt: Iterable[int], max_tokens: int = 8, **fields) -> Request:
    request_fields = {k: fields.pop(k) for k in ("task", "score_start", "pooling") if k in fields}
    return Request(
        id=id,
        prompt_token_ids=np.array(list(prompt), np.int32),
        params=SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens} | fields),
        **request_fields,
    )


def mixed_job() -> list[Request]:
    """Shared prefixes, n > 1, stop strings, scores and embeddings; no two rows are identical."""
    shared = list(range(10, 23))
    rows = [row(f"r{i}", [*shared[: 4 * (i % 4)], i + 1, i], 5 + i % 9) for i in range(8)]
    return [
        *rows,
        row("samples", [*shared, 7], 9, n=3),
        row("stop", [*shared, 8], 12, stop=(chr(0x4E00 + 41), chr(0x4E00 + 30)), prompt_logprobs=0),
        row("score", [*shared, 9, 10], task=Task.SCORE, score_start=3),
        row("mean", [*shared, 9], task=Task.EMBED),
    ]


def finish(engine: Engine, results: dict[str, Result] | None = None) -> dict[str, Result]:
    """Step until everything is answered, each once; then nothing may be left behind."""
    results = {} if results is None else results
    while engine.num_unfinished:
        for result in engine.step():
            assert result.request_id not in results, "answered twice"
            results[result.request_id] = result
        engine.check_integrity()
    scheduler = engine._scheduler
    assert len(scheduler.books.tree) == 0, "prefix nodes leaked"
    assert not scheduler.books.waiting._held
    assert all(table.pool.num_free == table.pool.num_blocks for table in scheduler.books.tables)
    return results


def answers(engine: Engine, job: Iterable[Request]) -> dict[str, Result]:
    for request in job:
        engine.add(request)
    return finish(engine)


def contents(result: Result) -> object:
    """What a result says, whatever was shared."""
    embedding = None if result.embedding is None else result.embedding.tolist()
    score = None if result.score is None else len(result.score.token_logprobs)
    outputs = [(o.index, o.token_ids, o.text, o.finish_reason) for o in result.outputs]
    ranks = [entry and (entry.token_id, entry.rank) for entry in result.prompt_logprobs or ()]
    return result.error and result.error.code, outputs, score, embedding, ranks

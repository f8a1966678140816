"""Runs a checkpoint through the whole engine and records every row of logits it samples from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batchwright.config import EngineConfig
from batchwright.engine import Engine
from batchwright.llm import build_engine
from batchwright.request import Request, Result, SamplingParams
from batchwright.sampling.state import SamplingState
from batchwright.weights.checkpoint import open_checkpoint

Logits = dict[tuple[int, int, int], bytes]  # (noise key, sample, output position) -> bits


class NoTokenizer:
    """Stands in where only token ids matter."""

    end_token_ids = ()

    def decode(self, ids: Sequence[int], **options: object) -> str:
        return " ".join(map(str, ids))


@dataclass
class Run:
    """What a run produced."""

    results: dict[str, Result]
    logits: Logits
    engine: Engine

    def tokens(self) -> dict[str, list[list[int]]]:
        return {id: [o.token_ids for o in r.outputs] for id, r in self.results.items()}


@contextmanager
def recorded_logits() -> Iterator[Logits]:
    """A digest of every row the sampler sees, by what identifies it whatever the batch."""
    logits: Logits = {}
    sample = SamplingState.sample

    def record(self, rows, row_of_sample, slots, output_positions, *rest):
        for row, slot, position in zip(row_of_sample, slots, output_positions, strict=True):
            record = self._slots[slot]
            key = int(record["noise_key"]), int(record["sample_index"]), int(position)
            bits = hashlib.blake2b(rows[row].tobytes(), digest_size=16).digest()
            assert logits.setdefault(key, bits) == bits, "recomputed logits changed"
        return sample(self, rows, row_of_sample, slots, output_positions, *rest)

    SamplingState.sample = record
    try:
        yield logits
    finally:
        SamplingState.sample = sample


def run(
    path: Path,
    requests: Sequence[Request],
    *,
    prepare: Callable[[Engine], None] = lambda engine: None,
    **settings,
) -> Run:
    """All requests through a new engine on the checkpoint at `path`; `prepare` may change it."""
    settings.setdefault("device", "cpu")
    settings.setdefault("num_threads", 1)  # tiny models: waking threads costs more than they do
    engine, _ = build_engine(open_checkpoint(path), NoTokenizer(), EngineConfig(**settings))
    prepare(engine)
    with recorded_logits() as logits:
        results = {result.request_id: result for result in engine.run(requests)}
    engine.check_integrity()
    return Run(results, logits, engine)


def request(id: str, prompt: Sequence[int], max_tokens: int = 8, **params) -> Request:
    return Request(
        id=id,
        prompt_token_ids=np.array(prompt, np.int32),
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, **params),
    )


def mixed_job(max_tokens: int = 9, **params) -> list[Request]:
    """Odd lengths, a shared prefix of 37, a prompt that is another's prefix, duplicates, n > 1."""
    rng = np.random.default_rng(0)

    def draw(num: int) -> list[int]:
        return rng.integers(3, 90, num).tolist()

    shared, long = draw(37), draw(130)
    prompts = [
        draw(1),
        shared + draw(1),
        shared + draw(30),
        long,
        long[:64],  # exactly two blocks, all of them another's
        long[:65],
        long,
        draw(63),
        shared,
        shared + draw(60),
    ]
    # r3 and r6 have the same prompt and different limits: identical rows would be folded
    rows = [request(f"r{i}", p, max_tokens + i % 4, **params) for i, p in enumerate(prompts)]
    return [*rows, request("fork", shared + draw(5), max_tokens, n=3, **params)]

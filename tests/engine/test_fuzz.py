"""Random jobs in crowded engines: every row gets what it gets alone, to the bit."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchwright.config import EngineConfig
from batchwright.engine import Engine
from batchwright.llm import build_engine
from batchwright.request import FinishReason, Request, Result, SamplingParams, Task
from batchwright.techniques import names
from batchwright.weights.checkpoint import open_checkpoint
from tests.engine.harness import NoTokenizer
from tests.models.reference import make_checkpoint
from tests.sched.harness import start_what_fits_now

pytestmark = pytest.mark.cpu

VOCAB_SIZE = 97
LITTLE_MEMORY = 6 * 3 * 2 * 2 * 8 * 32 * 4  # six blocks, as the longest row needs
SETTINGS: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 7, "max_num_seqs": 4, "look_ahead": 1},
    {"max_num_batched_tokens": 40, "max_num_seqs": 8, "look_ahead": 1},
    {"max_num_batched_tokens": 64, "max_num_seqs": 16, "look_ahead": 0},
]
ORDERS = names("plan.orders")
LEAST = {  # how often the hard things must happen for the comparison to mean something
    "preemptions": 8,
    "cached tokens": 2000,
    "cancelled": 5,
    "length": 40,
    "stop": 10,
    "stop strings": 2,
}


class DigitTokenizer(NoTokenizer):
    """Spells token 31 as "31" without a space: stop strings begin and end inside tokens."""

    special_token_ids = frozenset()
    decoder_kind = "other"

    def decode(self, ids: Sequence[int], **options: object) -> str:
        return "".join(map(str, ids))


def random_job(draw: random.Random, num_rows: int = 16) -> list[Request]:
    """Prompts share prefixes that end at and around block borders; tasks are mixed."""
    bases = [random_tokens(draw, 96) for _ in range(3)]
    rows = []
    for index in range(num_rows):
        shared = draw.choice(bases)[: draw.choice([2, 32, 37, 64, 96])]
        prompt = shared + random_tokens(draw, draw.choice([0, 0, 1, 5, 30]))
        options: dict[str, Any] = {"params": random_params(draw)}
        kind = draw.randrange(8)
        if kind == 0:
            start = draw.choice([1, len(prompt) // 2, len(prompt) - 1])
            options = {"task": Task.SCORE, "score_start": start}
        elif kind == 1:
            options = {"task": Task.EMBED, "pooling": draw.choice(["mean", "last"])}
        rows.append(Request(id=f"r{index}", prompt_token_ids=np.array(prompt, np.int32), **options))
    return rows


def random_tokens(draw: random.Random, num: int) -> list[int]:
    return [draw.randrange(3, VOCAB_SIZE) for _ in range(num)]


def random_params(draw: random.Random) -> SamplingParams:
    extras: list[dict[str, Any]] = [
        {"logprobs": draw.choice([0, 3])},
        {"prompt_logprobs": draw.choice([0, 2])},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"stop_token_ids": tuple(random_tokens(draw, 12)), "min_tokens": draw.choice([0, 2])},
        {"stop": (f"{draw.randrange(10, 100)}", f"{draw.randrange(10, 100)}")},
        {"logit_bias": {5: -100.0, 7: 3.0}},
    ]
    params: dict[str, Any] = {
        "max_tokens": draw.choice([1, 2, 9, 30, 40]),
        "temperature": draw.choice([0.0, 1.0]),
        "n": draw.choice([1, 2, 3, 6]),
    }
    for extra in extras:
        if draw.random() < 0.3:
            params |= extra
    return SamplingParams(**params)


def new_engine(path: Path, **settings: Any) -> Engine:
    config = EngineConfig(num_threads=1, max_model_len=192, **settings)
    return build_engine(open_checkpoint(path), DigitTokenizer(), config)[0]


def answers_alone(path: Path, job: list[Request], **settings: Any) -> dict[str, Result]:
    """What each row gets when nothing else is there, nor a prefix that it could share."""
    engine = new_engine(path, prefix_sharing=False, **settings)
    results = {}
    for request in job:
        [results[request.id]] = engine.run([request])
    return results


def answers_together(
    engine: Engine, job: list[Request], draw: random.Random | None = None
) -> dict[str, Result]:
    """All rows at once; with `draw`, a row is cancelled after every few Steps."""
    for request in job:
        engine.add(request)
    results: dict[str, Result] = {}
    while engine.num_unfinished:
        for result in engine.step():
            assert result.request_id not in results, "answered twice"
            results[result.request_id] = result
        left = [request.id for request in job if request.id not in results]
        if draw and left and draw.random() < 0.05:
            engine.cancel(draw.choice(left))
        engine.check_integrity()
    assert results.keys() == {request.id for request in job}
    assert len(engine._scheduler.books.tree) == 0, "prefix nodes leaked"
    for table in engine._scheduler.books.tables:
        assert table.pool.num_free == table.pool.num_blocks, "blocks leaked"
    return results


def assert_same(result: Result, expected: Result) -> None:
    """Equal but for the tokens taken from the cache; a cancelled row has the beginning of it."""
    assert expected.error is None
    if is_cancelled(result):
        for output, whole in zip(result.outputs, expected.outputs):
            assert output.token_ids == whole.token_ids[: len(output.token_ids)]
            if output.logprobs is not None:
                assert output.logprobs == whole.logprobs[: len(output.token_ids)]
    else:
        found, wanted = (
            dataclasses.asdict(dataclasses.replace(r, num_cached_tokens=0))
            for r in (result, expected)
        )
        np.testing.assert_equal(found, wanted)


def is_cancelled(result: Result) -> bool:
    reasons = [output.finish_reason for output in result.outputs]
    return FinishReason.CANCELLED in reasons or (
        result.error is not None and result.error.code == "cancelled"
    )


@pytest.mark.parametrize("name", ["llama", "qwen2_window"])
def test_rows_of_random_jobs_answer_as_they_do_alone(name, tmp_path):
    make_checkpoint(name, tmp_path)
    seen: Counter[str] = Counter()
    for seed in range(2):
        job = random_job(random.Random(seed))
        expected = answers_alone(tmp_path, job)
        for index, settings in enumerate(SETTINGS):
            order = ORDERS[(len(SETTINGS) * seed + index) % len(ORDERS)]
            engine = new_engine(tmp_path, kv_cache_bytes=LITTLE_MEMORY, order=order, **settings)
            if index:
                start_what_fits_now(engine._scheduler)
            cancel = random.Random(seed) if index == 1 else None
            results = answers_together(engine, job, cancel)
            for id, result in results.items():
                assert_same(result, expected[id])
                seen.update(str(output.finish_reason) for output in result.outputs)
                seen["stop strings"] += any(type(o.stop_reason) is str for o in result.outputs)
            seen["preemptions"] += engine.stats.num_preemptions
            seen["cached tokens"] += engine.stats.num_cached_tokens
    print(name, seen)
    assert not {name: seen[name] for name in LEAST if seen[name] < LEAST[name]}


def test_the_comparison_can_fail(tmp_path):
    make_checkpoint("llama", tmp_path)
    params = SamplingParams(temperature=1.0, max_tokens=9)
    row = Request(id="r", prompt_token_ids=np.array([5, 6], np.int32), params=params)
    first, again, other = (answers_alone(tmp_path, [row], seed=seed)["r"] for seed in (0, 0, 1))
    assert_same(again, first)
    with pytest.raises(AssertionError):
        assert_same(other, first)

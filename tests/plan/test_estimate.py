"""Counts of a job before it runs: by hand, and equal to what the simulated engine then counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from batchwright.kv.groups import KVGroup
from batchwright.limits import ModelLimits
from batchwright.plan.cost import CostModel, Hardware, RateCurve
from batchwright.plan.estimate import Work, count_tokens, count_work, find_savings, output_lengths
from batchwright.plan.job_rows import JobRows
from batchwright.plan.shape import AttentionShape, ModelShape, Product
from batchwright.plan.sharing import shared_blocks
from batchwright.predict import Prediction, predict
from batchwright.request import Request, SamplingParams, Task
from batchwright.simulate import EngineSizes
from tests.plan.simulated import BLOCK_SIZE, MAX_MODEL_LEN, simulate

HORIZON = 4096
SHAPE = ModelShape(
    hidden_size=2,
    vocab_size=7,
    num_layers=3,
    products=(Product(2, 4, num_weights=3),),
    head=Product(2, 7),
    attention=(AttentionShape(None, num_layers=3, num_q_heads=2, num_kv_heads=1, head_dim=1),),
    num_params=38,
)
FLAT = RateCurve((1, 100), (1e3, 1e4))
HARDWARE = Hardware(
    name="by hand",
    num_threads=1,
    layers=FLAT,
    head=FLAT,
    ceiling_flops_per_s=1e4,
    attention_flops_per_s=1e5,
    kv_bytes_per_s=1e9,
    memory_bytes_per_s=1e9,
)
COST = CostModel(SHAPE, HARDWARE)
ENGINE = EngineSizes(
    groups=[KVGroup(None, 4096)],
    block_size=BLOCK_SIZE,
    max_num_seqs=256,
    max_num_batched_tokens=256,
    max_model_len=MAX_MODEL_LEN,
    prefix_sharing=True,
    horizon=HORIZON,
)


def work_s(work: Work) -> float:
    return COST.work_s(work.num_tokens, work.num_keys, work.num_logits, work.num_draws)


def request(id: int, prompt: Sequence[int], max_tokens: int = 1, **fields) -> Request:
    params = fields.pop("params", None) or SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, **fields.pop("sampling", {})
    )
    ids = np.array(prompt, np.int32)
    return Request(id=f"r{id}", prompt_token_ids=ids, params=params, **fields)


def job_rows(requests: Sequence[Request], places: Sequence[int] | None = None) -> JobRows:
    rows, limits = JobRows(), ModelLimits(MAX_MODEL_LEN, 1_000_000)
    for index, one in enumerate(requests):
        rows.add(one, limits.check(one), index if places is None else places[index])
    return rows


def estimate(rows: JobRows, *, share: float | None = None, horizon: int = HORIZON):
    """(tokens, work when all outputs are as long as they may be)."""
    columns = rows.columns()
    savings = find_savings(rows, columns, block_size=BLOCK_SIZE, horizon=horizon)
    lengths = output_lengths(columns, share)
    work = count_work(columns, savings, lengths.high, SHAPE)
    return count_tokens(columns, savings, lengths), work


def test_two_rows_that_share_one_block() -> None:
    rows = job_rows([request(0, [1, 2, 3, 4, 5], 3), request(1, [1, 2, 3, 4, 6, 7], 2)])
    tokens, work = estimate(rows)
    assert tokens.num_prompt == 11
    assert tokens.num_shared == tokens.num_shared_in_job == 4
    assert tokens.output == (5, 5, 5)  # ignore_eos: the lengths are known
    assert work.num_prompt_tokens == 5 + 2
    assert work.num_output_tokens == 2 + 1  # the last token of a row is not fed back
    # keys: 1+2+3+4+5 and 6+7 of the first row, 5+6 and 7 of the second
    assert work.num_keys == (15 + 13 + 11 + 7,)
    assert work.num_logits == 2 + 3
    assert work.num_draws == 5


def test_the_last_prompt_token_is_always_computed() -> None:
    requests = [request(i, [1, 2, 3, 4], sampling={"temperature": 1.0}) for i in range(2)]
    tokens, work = estimate(job_rows(requests))
    assert tokens.num_shared == 3
    assert work.num_prompt_tokens == 4 + 1


def test_identical_greedy_rows_are_computed_once() -> None:
    greedy = {"temperature": 0.0}
    requests = [request(i, [1, 2, 3, 4, 5], 2, sampling=greedy) for i in range(3)]
    requests.append(request(3, [1, 2, 3, 4, 5], 3, sampling=greedy))  # asks for more
    tokens, work = estimate(job_rows(requests))
    assert tokens.num_prompt == 20
    assert tokens.num_folded == 10
    assert tokens.num_shared == 4
    assert work.num_prompt_tokens == 5 + 1
    assert tokens.output == (9, 9, 9)
    assert work.num_output_tokens == 1 + 2


def test_samples_of_a_row_share_its_prompt() -> None:
    tokens, work = estimate(job_rows([request(0, [1, 2, 3, 4, 5], 3, sampling={"n": 4})]))
    assert tokens.num_forked == 15
    assert work.num_prompt_tokens == 5
    assert work.num_output_tokens == 4 * 2
    assert tokens.output[2] == 12


def test_a_score_does_not_compute_its_last_token() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    score = {"task": Task.SCORE, "score_start": 7}
    # The second block of the first row lacks a token, so the second row has to compute it.
    tokens, work = estimate(job_rows([request(0, prompt, **score), request(1, prompt)]))
    assert tokens.num_shared == 4
    assert work.num_prompt_tokens == 7 + 4
    # The other way round the score takes all but what it needs the logits of.
    tokens, work = estimate(job_rows([request(0, prompt), request(1, prompt, **score)]))
    assert tokens.num_shared == 6
    assert work.num_prompt_tokens == 8 + 1
    assert work.num_logits == 2


def test_rows_beyond_the_horizon_share_nothing() -> None:
    same = [request(i, [1, 2, 3, 4, 5 + i]) for i in range(2)]
    assert estimate(job_rows(same, [0, 3]), horizon=3)[0].num_shared == 4
    tokens, _ = estimate(job_rows(same, [0, 4]), horizon=3)
    assert tokens.num_shared == 0
    assert tokens.num_shared_in_job == 4


@pytest.mark.parametrize("share", [None, 0.1, 0.9, 1.0])
def test_outputs_of_unknown_length(share: float | None) -> None:
    params = SamplingParams(max_tokens=200, temperature=1.0)
    rows = job_rows([request(i, [i], params=params) for i in range(1000)])
    low, likely, high = estimate(rows, share=share)[0].output
    assert (low, high) == (1000, 200_000)
    assert likely == pytest.approx(200_000 * (0.5 if share is None else share), rel=0.03)
    lengths = output_lengths(rows.columns(), share)
    assert lengths.is_measured == (share is not None)
    assert lengths.likely.min() >= 1
    assert lengths.likely.max() >= 198  # some use all that they may


def test_each_row_may_have_a_share_of_its_own() -> None:
    params = SamplingParams(max_tokens=200, temperature=1.0)
    rows = job_rows([request(i, [i], params=params) for i in range(2000)])
    shares = np.where(np.arange(2000) < 1000, 0.2, 0.8)
    lengths = output_lengths(rows.columns(), shares)
    assert lengths.likely[:1000].mean() == pytest.approx(40, rel=0.03)
    assert lengths.likely[1000:].mean() == pytest.approx(160, rel=0.03)
    assert (lengths.share, lengths.is_measured) == (pytest.approx(0.5), True)


def test_min_tokens_are_the_least() -> None:
    params = SamplingParams(max_tokens=100, min_tokens=20)
    tokens, _ = estimate(job_rows([request(0, [1], params=params)]), share=0.1)
    assert tokens.output == (20, 20, 100)


def test_no_rows() -> None:
    tokens, work = estimate(job_rows([]))
    assert tokens.output == (0, 0, 0)
    assert work.num_tokens == 0


def made_up_requests(seed: int, *, all_tasks: bool) -> list[Request]:
    """Prompts of few different blocks, greedy or not, some twice, some with several samples."""
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    for index in range(int(rng.integers(1, 40))):
        if requests and rng.random() < 0.2:
            other = requests[int(rng.integers(len(requests)))]
            fields = {"task": other.task, "score_start": other.score_start, "params": other.params}
            requests.append(request(index, other.prompt_token_ids, **fields))
            continue
        blocks = [[int(i)] * BLOCK_SIZE for i in rng.integers(1, 4, rng.integers(0, 5))]
        prompt = [*chain(*blocks), *rng.integers(1, 4, rng.integers(1, 7)).tolist()]
        kind = rng.random() if all_tasks else 1.0
        if kind < 0.15 and len(prompt) > 1:
            start = int(rng.integers(1, len(prompt)))
            requests.append(request(index, prompt, task=Task.SCORE, score_start=start))
        elif kind < 0.3:
            requests.append(request(index, prompt, task=Task.EMBED))
        else:
            sampling = {"temperature": float(rng.integers(2)), "n": int(rng.choice([1, 1, 3]))}
            requests.append(request(index, prompt, int(rng.integers(1, 9)), sampling=sampling))
    return requests


@pytest.mark.parametrize("seed", range(60))
def test_the_simulated_engine_counts_the_same(seed: int) -> None:
    requests = made_up_requests(seed, all_tasks=False)
    tokens, work = estimate(job_rows(requests))
    stats = simulate(requests, max_num_seqs=256, budget=256).stats
    assert stats.num_cached_tokens == tokens.num_shared + tokens.num_forked
    assert stats.num_computed_tokens == work.num_tokens
    assert stats.num_generated_tokens == work.num_draws
    assert stats.num_preemptions == 0
    assert stats.work.num_prompt_tokens == work.num_prompt_tokens


@pytest.mark.parametrize("seed", range(40))
def test_the_prediction_counts_the_same(seed: int) -> None:
    rows = job_rows(made_up_requests(seed, all_tasks=True))
    tokens, work = estimate(rows)
    columns = rows.columns()
    savings = find_savings(rows, columns, block_size=BLOCK_SIZE, horizon=HORIZON)
    prediction = predict(
        rows,
        columns,
        columns.most_output,
        computed=np.flatnonzero(~savings.folded),
        engine=ENGINE,
        cost=COST,
        total_work_s=work_s(work),
    )
    assert prediction.is_whole
    assert prediction.stats.num_cached_tokens == tokens.num_shared + tokens.num_forked
    assert prediction.stats.num_computed_tokens == work.num_tokens
    assert prediction.stats.num_preemptions == 0
    assert prediction.seconds > 0


@pytest.mark.parametrize("num_seqs", [8, 64])
def test_a_part_of_the_job_predicts_all_of_it(
    num_seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    requests = [
        request(i, [i % 50] * 12 + [i], int(length))
        for i, length in enumerate(rng.integers(1, 30, 1200))
    ]
    rows = job_rows(requests)
    columns = rows.columns()
    engine = replace(ENGINE, max_num_seqs=num_seqs, max_num_batched_tokens=64)
    _, work = estimate(rows)

    def predicted() -> Prediction:
        everything = np.arange(len(rows))
        return predict(
            rows,
            columns,
            columns.most_output,
            computed=everything,
            engine=engine,
            cost=COST,
            total_work_s=work_s(work),
        )

    monkeypatch.setattr("batchwright.predict.MAX_STEPS", 10**9)
    whole = predicted()
    monkeypatch.setattr("batchwright.predict.MAX_ROWS", 400)
    part = predicted()
    assert whole.is_whole
    assert not part.is_whole
    assert part.num_simulated < 500
    assert part.seconds == pytest.approx(whole.seconds, rel=0.05)


def test_shared_blocks_are_those_of_pairwise_comparison() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 2, rng.integers(0, 30)) for _ in range(200)]
    starts = np.cumsum([0, *map(len, prompts)])[:-1]
    num_blocks = np.array([len(prompt) // 3 for prompt in prompts])
    found = shared_blocks(
        np.concatenate(prompts).astype(np.int32),
        starts,
        num_blocks,
        num_blocks,
        block_size=3,
        horizon=20,
    )

    def common(a: np.ndarray, b: np.ndarray) -> int:
        number = 0
        while 3 * (number + 1) <= min(len(a), len(b)) and (
            (a[: 3 * (number + 1)] == b[: 3 * (number + 1)]).all()
        ):
            number += 1
        return number

    for row, prompt in enumerate(prompts):
        before = prompts[max(0, row - 20) : row]
        assert found[row] == max((common(prompt, other) for other in before), default=0)

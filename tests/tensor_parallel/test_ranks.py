"""Collectives of three ranks, as threads of this process."""

from __future__ import annotations

import threading

import pytest
import torch

from batchwright.tensor_parallel.ranks import Ranks, join

pytestmark = pytest.mark.cpu

SIZE = 3


@pytest.fixture
def on_all(tmp_path):
    """Calls a function on every rank at once; returns their results by rank."""
    ranks: list[Ranks | None] = [None] * SIZE

    def each(function):
        results = [None] * SIZE

        def call(rank):
            results[rank] = function(rank)

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(SIZE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        return results

    def meet(rank):
        ranks[rank] = join(tmp_path / "store", rank, SIZE, on_gpu=False)

    each(meet)
    assert None not in ranks
    return lambda function: each(lambda rank: function(ranks[rank]))


def test_a_rows_sum_has_the_same_bits_wherever_it_stands(on_all):
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(SIZE, 1000, generator=generator)
    in_order = row[0] + row[1] + row[2]
    assert not torch.equal(in_order, row[1] + row[2] + row[0]), "no order would show"
    for num_rows in (1, 2, 7):
        for summed in on_all(lambda ranks, n=num_rows: ranks.sum(row[ranks.rank].repeat(n, 1))):
            assert summed.shape == (num_rows, 1000)
            assert all(torch.equal(line, in_order) for line in summed)


def test_sums_of_bf16_are_rounded_once(on_all):
    parts = torch.tensor([[1.0], [2.0**-9], [2.0**-9]], dtype=torch.bfloat16)
    for summed in on_all(lambda ranks: ranks.sum(parts[ranks.rank])):
        assert summed.dtype == torch.bfloat16
        assert summed.item() == pytest.approx((1.0 + 2.0**-8), abs=2.0**-8)


@pytest.mark.parametrize("num_columns", [3, 10, 11, 64])
def test_columns_of_uneven_parts(num_columns, on_all):
    whole = torch.arange(2.0 * num_columns).reshape(2, num_columns)

    def gather(ranks):
        start, end = ranks.span(num_columns)
        return ranks.gather_columns(whole[:, start:end], num_columns)

    assert torch.equal(on_all(gather)[0], whole)


def test_what_rank_0_has_is_shared_and_the_least_is_known(on_all):
    def share(ranks):
        tokens = torch.full((4,), 10 + ranks.rank, dtype=torch.int32)
        ranks.share(tokens)
        return tokens.tolist()

    assert on_all(share) == [[10] * 4] * SIZE
    assert on_all(lambda ranks: ranks.least(7 - ranks.rank)) == [5] * SIZE

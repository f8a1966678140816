"""The cost model by hand: products, attention, windows, experts, bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batchwright.plan.cost import CostModel, Hardware, RateCurve, num_keys
from batchwright.plan.shape import AttentionShape, ModelShape, Product
from batchwright.step import NO_WRITE, Step, TableUpdate

FLAT = RateCurve((1,), (100.0,))
HARDWARE = Hardware(
    name="by hand",
    num_threads=1,
    layers=FLAT,
    head=RateCurve((1,), (10.0,)),
    ceiling_flops_per_s=100.0,
    attention_flops_per_s=50.0,
    kv_bytes_per_s=1e9,
    memory_bytes_per_s=1e9,
)
SHAPE = ModelShape(
    hidden_size=2,
    vocab_size=7,
    num_layers=3,
    products=(Product(2, 4, num_weights=3), Product(4, 2, num_weights=3)),
    head=Product(2, 7),
    attention=(AttentionShape(None, num_layers=3, num_q_heads=2, num_kv_heads=1, head_dim=1),),
    num_params=3 * 16 + 14,
)


def make_step(rows: list[tuple[int, int]], samples: list[int], num_groups: int = 1) -> Step:
    """Rows compute positions [start, end)."""
    positions = np.concatenate([np.arange(*row, dtype=np.int32) for row in rows])
    ends = np.cumsum([end - start for start, end in rows])
    empty = np.empty(0, np.int32)
    return Step(
        step_id=0,
        finished_slots=empty,
        new_sequences=(),
        table_updates=(TableUpdate(empty, empty, empty),) * num_groups,
        block_copies=(np.empty((0, 2), np.int32),) * num_groups,
        slots=np.arange(len(rows), dtype=np.int32),
        cu_seqlens_q=np.concatenate(([0], ends)).astype(np.int32),
        token_ids=np.zeros_like(positions),
        positions=positions,
        kv_slots=(positions,) * num_groups,
        sample_tokens=np.array(samples, np.int32),
        sample_slots=np.zeros(len(samples), np.int32),
        score_tokens=empty,
        score_targets=empty,
    )


def test_counts_of_a_shape() -> None:
    assert SHAPE.layer_flops_per_token == 2 * 3 * (8 + 8)
    assert SHAPE.head_flops_per_token == 28
    assert SHAPE.attention_flops_per_key == 4 * 2 * 1 * 3
    assert SHAPE.kv_elements_per_token() == 2 * 1 * 1 * 3
    assert SHAPE.attention_flops([5]) == 5 * 24


def test_seconds_of_a_step() -> None:
    """Tokens 0, 1, 2 of one sequence and token 9 of another; both draw, one of them twice."""
    step = make_step([(0, 3), (9, 10)], samples=[2, 3, 3])
    parts = CostModel(SHAPE, HARDWARE).parts(step)
    assert parts.layers == pytest.approx(4 * 96 / 100)
    assert parts.head == pytest.approx(2 * 28 / 10)
    assert parts.attention == pytest.approx((1 + 2 + 3 + 10) * 24 / 50)
    assert parts.other == 0
    slow = replace(HARDWARE, step_s=1.0, token_s=0.01, draw_s=0.001)
    assert CostModel(SHAPE, slow).parts(step).other == pytest.approx(1 + 0.04 + 0.003)
    assert CostModel(SHAPE, HARDWARE).seconds(step) == pytest.approx(parts.total)


def test_blocks_that_are_copied_to_the_host_take_their_time() -> None:
    """A block of 32 tokens has 32 x 6 elements of 2 bytes: 0.3 seconds at 1,280 bytes/s."""
    hardware = replace(HARDWARE, host_bytes_per_s=1280.0)
    model = CostModel(SHAPE, hardware, kv_bytes=2)
    step = make_step([(0, 3)], [])
    swaps = replace(step, saved_blocks=np.zeros((2, 2)), loaded_blocks=np.zeros((1, 2)))
    assert model.block_copy_s == pytest.approx(0.3)
    assert model.seconds(swaps) == pytest.approx(model.seconds(step) + 3 * 0.3)
    assert CostModel(SHAPE, HARDWARE).seconds(swaps) == model.seconds(step)


@pytest.mark.parametrize(("bytes_per_s", "pays"), [(0.0, False), (49.0, False), (51.0, True)])
def test_swapping_pays_where_two_copies_are_faster_than_computing(bytes_per_s, pays) -> None:
    """32 tokens of 96 FLOPs at 100 FLOP/s take 30.7 s, two copies of 768 bytes 1,536 / rate."""
    hardware = replace(HARDWARE, host_bytes_per_s=bytes_per_s)
    assert CostModel(SHAPE, hardware).swap_pays == pays


def test_a_single_token_waits_for_its_keys_and_many_do_not() -> None:
    """24 bytes a key at 12 bytes/s: 2 s a key, against 24 FLOPs a pair at 50 FLOP/s: 0.48 s."""
    hardware = replace(HARDWARE, kv_bytes_per_s=12.0)
    lone = CostModel(SHAPE, hardware).parts(make_step([(9, 10)], [])).attention
    assert lone == pytest.approx(10 * 2.0)
    chunk = CostModel(SHAPE, hardware).parts(make_step([(0, 10)], [])).attention
    assert chunk == pytest.approx(55 * 0.48)


def test_windows_limit_keys() -> None:
    counts = num_keys(np.array([0, 1, 3, 4, 10]), 3)
    assert counts.tolist() == [0, 1, 6, 9, 27]
    naive = [sum(min(position + 1, 3) for position in range(n)) for n in (0, 1, 3, 4, 10)]
    assert counts.tolist() == naive
    window = replace(SHAPE.attention[0], window=3, num_layers=2)
    shape = replace(SHAPE, attention=(replace(SHAPE.attention[0], num_layers=1), window))
    step = make_step([(2, 6)], [], num_groups=2)
    expected = (3 + 4 + 5 + 6) * 8 / 50 + (3 * 4) * 16 / 50
    assert CostModel(shape, HARDWARE).parts(step).attention == pytest.approx(expected)
    # All 6 keys in one layer; positions 0 to 5 are within 3 of positions 2 to 5 in two layers.
    weights = 3 * (8 + 8)
    kv_bytes = 4 * (2 * (6 + 4) + 4 * (6 + 4))
    assert CostModel(shape, HARDWARE).num_bytes(step) == weights * 4 + kv_bytes


def test_bytes_of_a_step() -> None:
    """All weights once, 3 + 10 keys read, three of four tokens written."""
    step = make_step([(0, 3), (9, 10)], samples=[3])
    step.kv_slots[0][1] = NO_WRITE
    model = CostModel(SHAPE, HARDWARE, weight_bytes=2, kv_bytes=4)
    assert model.num_bytes(step) == (48 + 14) * 2 + 6 * (3 + 10 + 3) * 4


def test_experts_are_read_as_they_are_chosen() -> None:
    product = Product(2, 4, num_weights=8, share=0.25)
    assert product.flops_per_token == 2 * 8 * 2
    assert product.num_used(1) == pytest.approx(2)
    assert product.num_used(2) == pytest.approx(8 * (1 - 0.75**2))
    shape = replace(SHAPE, products=(product,))
    # With rates that do not depend on rows, time is that of the FLOPs.
    parts = CostModel(shape, HARDWARE).parts(make_step([(0, 5)], []))
    assert parts.layers == pytest.approx(5 * 32 / 100)


def test_rates_between_the_measured_points() -> None:
    curve = RateCurve((10, 20), (100.0, 160.0))
    assert curve.seconds(10, 8) == pytest.approx(10 * 8 / 100)
    assert curve.seconds(1, 8) == curve.seconds(10, 8), "small products are padded"
    assert curve.seconds(15, 8) == pytest.approx((0.8 + 1.0) / 2)
    assert curve.seconds(40, 8) == pytest.approx(40 * 8 / 160)
    assert curve.best == 160.0

"""Prefill, decode and tail, of steps made by hand."""

import pytest

from batchwright.job.engine_counts import EngineCounts
from batchwright.job.step_times import StepTimes
from batchwright.plan.shape import AttentionShape, ModelShape, Product

SHAPE = ModelShape(
    hidden_size=10,
    vocab_size=50,
    num_layers=1,
    products=(Product(10, 5),),  # 100 FLOPs a token
    head=Product(10, 50),  # 1,000 FLOPs a line of logits
    attention=(AttentionShape(None, 1, 1, 1, 1),),  # 4 FLOPs a key
    num_params=0,
)


def prefill(tokens: int, rows: int = 1) -> EngineCounts:
    return EngineCounts(
        steps=1, step_rows=rows, computed_tokens=tokens, prompt_tokens=tokens, prompt_keys=(0,)
    )


def decode(rows: int) -> EngineCounts:
    return EngineCounts(
        steps=1,
        step_rows=rows,
        computed_tokens=rows,
        output_tokens=rows,
        output_keys=(0,),
        logits=rows,
    )


class Steps:
    """Steps of one second each."""

    def __init__(self) -> None:
        self.times = StepTimes(SHAPE)
        self.now_s = 0.0

    def run(self, counts: EngineCounts, *, is_last_work: bool = False) -> None:
        start_s, self.now_s = self.now_s, self.now_s + 1.0
        self.times.add(counts, start_s, self.now_s, compile_s=0.0, is_last_work=is_last_work)


def test_steps_of_one_kind_are_wholly_its_own() -> None:
    steps = Steps()
    steps.run(prefill(512))
    steps.run(decode(4))
    steps.run(decode(4))
    assert (steps.times.prefill_s, steps.times.decode_s) == (1.0, 2.0)


def test_waiting_for_a_step_is_charged_as_the_step() -> None:
    steps = Steps()
    steps.run(EngineCounts())
    steps.run(EngineCounts())
    assert steps.times.step_s == 2.0
    steps.run(prefill(512))
    assert (steps.times.prefill_s, steps.times.decode_s) == (3.0, 0.0)
    steps.run(EngineCounts())
    steps.run(decode(4))
    assert (steps.times.prefill_s, steps.times.decode_s) == (3.0, 2.0)


def test_a_mixed_step_is_divided_by_flops() -> None:
    counts = EngineCounts(
        steps=1,
        computed_tokens=12,
        prompt_tokens=10,
        output_tokens=2,
        prompt_keys=(500,),
        output_keys=(200,),
        logits=2,
    )
    steps = Steps()
    steps.run(counts)
    prefill_flops, decode_flops = 10 * 100 + 4 * 500, 2 * 100 + 4 * 200 + 2 * 1000
    share = prefill_flops / (prefill_flops + decode_flops)
    assert steps.times.prefill_s == pytest.approx(share)
    assert steps.times.step_s == pytest.approx(1.0)


def test_without_a_shape_tokens_divide() -> None:
    times = StepTimes(None)
    counts = EngineCounts(steps=1, computed_tokens=4, prompt_tokens=3, output_tokens=1)
    times.add(counts, 0.0, 1.0, compile_s=0.0, is_last_work=False)
    assert (times.prefill_s, times.decode_s) == (0.75, 0.25)


def test_compiling_is_no_step() -> None:
    times = StepTimes(SHAPE)
    times.add(prefill(5), 0.0, 10.0, compile_s=9.0, is_last_work=False)
    assert (times.compile_s, times.step_s) == (9.0, 1.0)


def test_the_tail_begins_when_fewer_than_half_the_rows_are_left() -> None:
    steps = Steps()
    steps.run(decode(8))
    for rows in (6, 4, 3, 3, 1):
        steps.run(decode(rows), is_last_work=True)
    assert steps.times.tail_since_s == 3.0
    assert (steps.times.tail_prefill_s, steps.times.tail_decode_s) == (0.0, 3.0)


def test_few_rows_are_no_tail_while_others_wait_or_are_to_be_read() -> None:
    steps = Steps()
    steps.run(decode(8))
    steps.run(decode(1), is_last_work=False)
    assert steps.times.tail_since_s is None


def test_a_step_full_of_tokens_is_no_tail_however_few_its_rows() -> None:
    steps = Steps()
    steps.run(decode(256))
    steps.run(prefill(512, rows=2))
    steps.run(prefill(300, rows=1), is_last_work=True)
    assert steps.times.tail_since_s is None
    steps.run(prefill(200, rows=1), is_last_work=True)
    assert steps.times.tail_since_s == 3.0


def test_a_tail_that_fills_again_was_none() -> None:
    steps = Steps()
    steps.run(decode(8))
    steps.run(decode(1), is_last_work=True)
    assert steps.times.tail_since_s == 1.0
    steps.run(decode(7), is_last_work=True)
    assert steps.times.tail_since_s is None
    assert steps.times.tail_decode_s == 0.0
    steps.run(decode(2), is_last_work=True)
    assert steps.times.tail_since_s == 3.0


def test_taking_in_a_late_result_ends_no_tail() -> None:
    steps = Steps()
    steps.run(decode(8))
    steps.run(decode(1), is_last_work=True)
    steps.run(EngineCounts(), is_last_work=True)
    assert steps.times.tail_since_s == 1.0


def test_counts_are_those_since_another_moment() -> None:
    before = EngineCounts(steps=3, generated_tokens=5, prompt_keys=(4, 2))
    now = EngineCounts(steps=7, generated_tokens=5, prompt_keys=(9, 2), output_keys=(1, 1))
    assert now.since(before) == EngineCounts(steps=4, prompt_keys=(5, 0), output_keys=(1, 1))
    assert now.since(EngineCounts()) == now

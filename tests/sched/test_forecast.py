"""The forecast of KV memory against running the rows step by step."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.kv.block_table import BlockTable
from batchwright.kv.groups import KVGroup
from batchwright.request import Request, SamplingParams
from batchwright.sched.forecast import Forecast
from batchwright.sched.limits import StepLimits
from batchwright.sched.slots import Slots
from batchwright.sequence import Sequence

BLOCK_SIZE = 4
NUM_BLOCKS = 4000


def sequence_of(index: int, num_tokens: int, num_left: int, *, num_prompt: int = 1) -> Sequence:
    """It has so many tokens and will have `num_left` more."""
    prompt = np.zeros(num_prompt, np.int32)
    return Sequence(
        request=Request(
            id=str(index),
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=num_tokens + num_left - num_prompt),
        ),
        order=index,
        sample_index=0,
        end_token_ids=(),
        noise_key=0,
        max_len=num_tokens + num_left,
        token_ids=np.zeros(num_tokens, np.int32),
    )


class Running:
    """Rows that have just drawn a token, and a forecast; results are never late."""

    def __init__(self, rows, num_shared=(), num_blocks=NUM_BLOCKS, max_len=512):
        group = KVGroup(None, num_blocks)
        size = max(len(rows), 1) + 4
        self.slots = Slots(size, max_len)
        self.table = BlockTable(
            group, block_size=BLOCK_SIZE, max_num_seqs=size, max_model_len=max_len
        )
        self.forecast = Forecast(self.slots, [self.table], StepLimits(size, 256))
        self.forecast.begin_step(is_late=False)
        self.forecast.begin_step(is_late=False)
        first_slot = 0
        for index, (num_tokens, num_left) in enumerate(rows):
            slot = self.slots.occupy(
                sequence_of(index, num_tokens, num_left), num_tokens - 1, write_from=0
            )
            most = (min(num_tokens, rows[0][0]) - 1) // BLOCK_SIZE  # whole blocks of both
            shared = min(num_shared[index], most) if index and num_shared else 0
            if shared:  # with the first row, whose slot this is
                self.table.adopt(slot, 0, self.table.table[first_slot, :shared].copy())
            elif not index:
                first_slot = slot
            which = np.array([slot], np.int32)
            start = np.array([shared * BLOCK_SIZE], np.int32)
            self.table.grow(which, start, np.array([num_tokens - 1], np.int32))

    def run(self) -> list[int]:
        """Blocks in use after each Step, as the rows go on."""
        used = []
        while True:
            used.append(self.table.pool.num_blocks - self.table.pool.num_free)
            slots = self.slots
            ended = slots.running[slots.num_tokens[slots.running] >= slots.max_len[slots.running]]
            if len(ended):
                self.table.release(*ended.tolist())
                for slot in ended.tolist():
                    slots.vacate(slot)
            running = slots.running
            if not len(running):
                return used
            starts = slots.num_computed[running]
            self.table.grow(running, starts, starts + 1)
            slots.num_computed[running] += 1
            slots.num_tokens[running] += 1
            slots.num_known[running] += 1


ROWS = st.lists(st.tuples(st.integers(2, 40), st.integers(0, 40)), min_size=1, max_size=9)


@settings(max_examples=150)
@given(ROWS, st.data())
def test_the_curve_is_that_of_running_step_by_step(rows, data) -> None:
    counts = st.lists(st.integers(0, 6), min_size=len(rows), max_size=len(rows))
    running = Running(rows, data.draw(counts))
    running.forecast.make()
    curve = running.forecast._curves[0]._curve.tolist()
    used = running.run()
    assert curve == used + [0] * (len(curve) - len(used))


@settings(max_examples=150)
@given(ROWS)
def test_its_highest_point_is_that_of_the_formula(rows) -> None:
    """max over j of the sum over r_i >= r_j of blocks(c_i + r_j): S3 and others, with c_i the
    tokens in memory."""
    running = Running(rows)
    running.forecast.make()
    num_in_memory = np.array([num_tokens - 1 for num_tokens, _ in rows])
    left = np.array([num_left for _, num_left in rows])
    peaks = [
        sum(-(-(c + r) // BLOCK_SIZE) for c in num_in_memory[left >= r].tolist())
        for r in left.tolist()
    ]
    assert int(running.forecast._curves[0]._curve.max()) == max(peaks)


@settings(max_examples=100)
@given(ROWS, st.integers(1, 30), st.integers(1, 30))
def test_a_row_is_let_in_exactly_when_all_fit_to_the_end(rows, num_prompt, num_output) -> None:
    """With as many blocks as running all of them takes, and with one block less."""
    everything = Running(rows)
    newcomer = sequence_of(99, num_prompt, num_output, num_prompt=num_prompt)
    slot = everything.slots.occupy(newcomer, num_prompt, write_from=0)
    everything.slots.num_tokens[slot] += 1  # its prompt is computed in this Step, and drawn from
    everything.table.grow(
        np.array([slot], np.int32), np.zeros(1, np.int32), np.array([num_prompt], np.int32)
    )
    need, alone = max(everything.run()), max(Running(rows).run())
    for num_blocks, fits in ((need, True), (need - 1, False)):
        if num_blocks < alone:  # the others do not fit as it is
            continue
        forecast = Running(rows, num_blocks=num_blocks).forecast
        newcomer = sequence_of(99, num_prompt, num_output, num_prompt=num_prompt)
        nothing = [np.empty(0, np.int32)]
        assert forecast.reserve(newcomer, num_prompt, nothing, 0) == fits


def test_a_row_that_goes_on_is_expected_to_become_twice_as_long() -> None:
    running = Running([(10, 90)])
    slots = running.slots
    slots.expected_len[0] = 10
    running.forecast.make()
    assert slots.expected_len[0] == 1 + 2 * 9
    slots.num_known[0] = slots.num_tokens[0] = 60
    slots.expected_len[0] = 60
    running.forecast.begin_step(is_late=False)
    running.forecast.make()
    assert slots.expected_len[0] == 100  # its limit


@pytest.mark.parametrize("num_rows", [64, 256])
def test_a_step_costs_microseconds_a_row(num_rows: int) -> None:
    """The curve of all that run and one newcomer: less than 20 us a running row, of the CPU."""
    draw = np.random.default_rng(1)
    rows = list(
        zip(draw.integers(2, 1000, num_rows).tolist(), draw.integers(1, 900, num_rows).tolist())
    )
    running = Running(rows, num_blocks=200_000, max_len=2048)
    newcomer, nothing = sequence_of(9999, 300, 200, num_prompt=300), [np.empty(0, np.int32)]
    best_s = np.inf
    for _ in range(20):
        running.forecast.begin_step(is_late=False)
        start_s = time.process_time()
        assert running.forecast.reserve(newcomer, 300, nothing, 0)
        best_s = min(best_s, time.process_time() - start_s)
    assert best_s < 20e-6 * num_rows
    print(f"{num_rows} rows: {1e6 * best_s:.0f} us")

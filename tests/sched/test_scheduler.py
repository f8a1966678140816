"""The scheduler against a symbolic executor: right memory, right tokens, all sequences end."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.kv.groups import KVGroup, blocks_per_sequence
from batchwright.request import Request, SamplingParams
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence
from batchwright.step import Step
from tests.sched.symbolic import SymbolicExecutor, expected_output

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
VOCAB_SIZE = 7
END_TOKEN = 3


def family(order: int, prompt: list[int], max_tokens: int, n: int = 1, end: bool = True) -> Sequence:
    request = Request(
        id=f"r{order}",
        prompt_token_ids=np.array(prompt, np.int32),
        params=SamplingParams(max_tokens=max_tokens, n=n),
    )
    members = [
        Sequence(
            request=request,
            order=order * 100 + index,
            sample_index=index,
            end_token_ids=(END_TOKEN,) if end else (),
            noise_key=0,
            max_len=min(len(prompt) + max_tokens, MAX_MODEL_LEN),
            token_ids=request.prompt_token_ids,
        )
        for index in range(n)
    ]
    members[0].siblings = members[1:]
    return members[0]


class Harness:
    """A scheduler and a symbolic executor with a given look-ahead."""

    def __init__(self, windows, num_blocks, *, budget, max_num_seqs, look_ahead=0, sharing=True):
        self.scheduler = Scheduler(
            [KVGroup(w, n) for w, n in zip(windows, num_blocks, strict=True)],
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            prefix_sharing=sharing,
        )
        self.executor = SymbolicExecutor(
            windows,
            num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
        )
        self.look_ahead = look_ahead
        self.outstanding = deque()
        self.steps: list[Step] = []
        self.finished: list[Sequence] = []

    def round(self) -> bool:
        """One engine round; False when nothing was left to do."""
        while len(self.outstanding) <= self.look_ahead:
            step = self.scheduler.schedule()
            self.scheduler.check_integrity()
            if step is None:
                break
            assert step.num_tokens <= self.scheduler.max_num_batched_tokens
            assert len(set(step.slots.tolist())) == step.num_rows
            self.steps.append(step)
            self.outstanding.append(self.executor.execute(step))
        if not self.outstanding:
            return False
        self.finished += self.scheduler.update(self.outstanding.popleft()).finished
        self.scheduler.check_integrity()
        return True

    def run(self) -> None:
        for _ in range(5000):
            if not self.round():
                break
        assert self.scheduler.num_unfinished == 0, "something never finished"
        for table in self.scheduler.tables:
            assert table.pool.num_free == table.pool.num_blocks, "blocks leaked"
        assert len(self.scheduler.tree) == 0, "prefix nodes leaked"

    def outputs(self) -> dict[tuple[str, int], list[int]]:
        return {
            (s.request.id, s.sample_index): s.token_ids[s.num_prompt_tokens :].tolist()
            for s in self.finished
        }


def smallest_pools(windows, families, budget):
    """Blocks per group that just hold the largest sequence alone."""
    longest = max(first.max_len for first in families)
    return [blocks_per_sequence(w, longest, BLOCK_SIZE, budget) for w in windows]


prompts = st.integers(0, 3).flatmap(
    lambda family_id: st.tuples(
        st.integers(0, 20), st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20)
    ).map(lambda parts: [family_id] * parts[0] + parts[1])
)
rows = st.lists(
    st.tuples(prompts, st.integers(1, 24), st.integers(1, 4)), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(
    rows=rows,
    budget=st.integers(5, 40),
    max_num_seqs=st.integers(1, 5),
    spare=st.integers(0, 6),
    look_ahead=st.integers(0, 1),
    sharing=st.booleans(),
    windows=st.sampled_from([[None], [5], [None, 5], [3, 9], [None, 4, 33]]),
)
def test_any_job_ends_with_the_right_tokens(
    rows, budget, max_num_seqs, spare, look_ahead, sharing, windows
):
    families = [family(i, p, m, n) for i, (p, m, n) in enumerate(rows)]
    num_blocks = [n + spare for n in smallest_pools(windows, families, budget)]
    harness = Harness(
        windows,
        num_blocks,
        budget=budget,
        max_num_seqs=max_num_seqs,
        look_ahead=look_ahead,
        sharing=sharing,
    )
    expected = {}
    for first in families:
        for member in [first, *first.siblings]:
            key = member.request.id, member.sample_index
            expected[key] = expected_output(member, VOCAB_SIZE)
        harness.scheduler.add(first)
    harness.run()
    assert harness.outputs() == expected

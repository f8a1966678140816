"""Any sequence of events: rows arrive, Steps are made, results come, sequences are ended."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from batchwright.request import FinishReason, Task
from batchwright.structured.spec import json_object
from batchwright.techniques import names
from tests.sched.harness import MAX_MODEL_LEN, VOCAB_SIZE, Harness, blocks_alone, family

windows = st.sampled_from([[None], [3], [5], [None, 6], [2, 9], [None, 4, 30]])
tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=14)
generate = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 20), "n": st.sampled_from([1, 1, 1, 2, 3, 4])},
    optional={
        "end": st.just(False),
        "prompt_logprobs": st.integers(0, 2),
        "logprobs": st.just(0),
        "grammar": st.just(json_object()),
        "urgent": st.just(True),
        "expected": st.integers(1, 20),
    },
)
score = st.fixed_dictionaries({"task": st.just(Task.SCORE)})
embed = st.fixed_dictionaries(
    {"task": st.just(Task.EMBED), "pooling": st.sampled_from(["mean", "last"])}
)
rows = st.fixed_dictionaries(
    {
        "place": st.integers(0, 20),
        "num_shared": st.sampled_from([0, 3, 4, 7, 8, 13, MAX_MODEL_LEN]),
        "own": tokens,
        "options": st.one_of(generate, generate, score, embed),
        "namespace": st.sampled_from(["", "", "", "b"]),
        "score_start": st.integers(1, MAX_MODEL_LEN),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Prompts are cut from earlier ones and continued, so that they share prefixes of any length,
    repeat each other, and end at block borders."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[list[int]] = [[]]
        self.num_families = 0

    @initialize(
        windows=windows,
        max_len=st.integers(4, MAX_MODEL_LEN),
        spare=st.integers(0, 6),
        budget=st.integers(4, 24),
        max_num_seqs=st.integers(1, 4),
        look_ahead=st.integers(0, 1),
        sharing=st.sampled_from([True, True, True, False]),
        order=st.sampled_from(names("plan.orders")),
        num_host_blocks=st.sampled_from([0, 1, 3, 12, 40]),
    )
    def start(
        self,
        windows,
        max_len,
        spare,
        budget,
        max_num_seqs,
        look_ahead,
        sharing,
        order,
        num_host_blocks,
    ):
        self.harness = Harness(
            windows,
            [blocks_alone(window, max_len, budget) + spare for window in windows],
            budget=budget,
            max_num_seqs=max_num_seqs,
            look_ahead=look_ahead,
            sharing=sharing,
            order=order,
            num_host_blocks=num_host_blocks,
        )

    @rule(rows=st.lists(rows, min_size=1, max_size=4))
    def add(self, rows):
        for row in rows:
            self.add_row(**row)

    def add_row(self, place, num_shared, own, options, namespace, score_start):
        prompt = (self.prompts[place % len(self.prompts)][:num_shared] + own)[: MAX_MODEL_LEN - 1]
        prompt = prompt or [0]
        if options.get("task") is Task.SCORE:
            prompt = prompt if len(prompt) > 1 else [0, 1]
            options = options | {"score_start": 1 + score_start % (len(prompt) - 1)}
        self.prompts.append(prompt)
        self.harness.add(family(self.num_families, prompt, namespace=namespace, **options))
        self.num_families += 1

    @precondition(lambda self: len(self.harness.outstanding) <= self.harness.look_ahead)
    @rule()
    def schedule(self):
        self.harness.schedule()

    @precondition(lambda self: self.harness.outstanding)
    @rule()
    def deliver(self):
        self.harness.deliver()

    @precondition(lambda self: self.harness.unfinished())
    @rule(num_rounds=st.integers(1, 6))
    def rounds(self, num_rounds):
        for _ in range(num_rounds):
            self.harness.round()
            self.harness.check()

    @precondition(lambda self: self.harness.unfinished())
    @rule(place=st.integers(0, 1000))
    def cancel(self, place):
        unfinished = self.harness.unfinished()
        self.harness.end(unfinished[place % len(unfinished)])

    @precondition(lambda self: len(self.harness.scheduler.books.slots.running))
    @rule(place=st.integers(0, 1000))
    def stop_running(self, place):
        slots = self.harness.scheduler.books.slots
        sequence = slots.sequences[slots.running[place % len(slots.running)]]
        self.harness.end(sequence, FinishReason.STOP)

    @rule(share=st.integers(1, 6))
    def resize_steps(self, share):
        """Memory ran out, or is there again."""
        scheduler = self.harness.scheduler
        limits, slots = scheduler.limits, scheduler.books.slots
        num_slots = len(slots.sequences)
        limits.max_tokens = max(limits.largest_max_tokens // share, 1)
        limits.max_running = max(num_slots // share, slots.num_running, 1)

    @invariant()
    def books_are_right(self):
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self):
        if hasattr(self, "harness"):
            self.harness.run()


class TestScheduler(SchedulerMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=25)


@pytest.mark.slow
class TestSchedulerForLong(SchedulerMachine.TestCase):
    settings = settings(max_examples=4000, stateful_step_count=60, derandomize=False)

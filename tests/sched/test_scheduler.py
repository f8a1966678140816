"""The scheduler against a symbolic executor: right memory, right tokens, all sequences end."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchwright.request import FinishReason, Task
from batchwright.sequence import Sequence
from batchwright.step import Step, StepResult
from batchwright.techniques import names
from tests.sched.harness import (
    BLOCK_SIZE,
    VOCAB_SIZE,
    Harness,
    family,
    smallest_pools,
)

ORDERS = [name for name in names("plan.orders") if name != "fcfs"]

prompts = st.integers(0, 3).flatmap(
    lambda family_id: st.tuples(
        st.integers(0, 20), st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20)
    ).map(lambda parts: [family_id] * parts[0] + parts[1])
)
rows = st.lists(st.tuples(prompts, st.integers(1, 24), st.integers(1, 4)), min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    rows=rows,
    budget=st.integers(5, 40),
    max_num_seqs=st.integers(1, 5),
    spare=st.integers(0, 6),
    look_ahead=st.integers(0, 1),
    sharing=st.booleans(),
    windows=st.sampled_from([[None], [5], [None, 5], [3, 9], [None, 4, 33]]),
    order=st.sampled_from(names("plan.orders")),
    num_host_blocks=st.sampled_from([0, 2, 9, 60]),
)
def test_any_job_ends_with_the_right_tokens(
    rows, budget, max_num_seqs, spare, look_ahead, sharing, windows, order, num_host_blocks
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
        order=order,
        num_host_blocks=num_host_blocks,
    )
    for first in families:
        assert harness.add(first)
    harness.run()


def random_prompt(draw: random.Random, earlier: list[list[int]]) -> list[int]:
    """A prompt that shares any length with an earlier one, and half the time ends its block."""
    prompt = draw.choice([[], *earlier])[: draw.randint(0, 40)]
    prompt = prompt + [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(0, 12))]
    if draw.random() < 0.5:
        prompt = prompt[: len(prompt) // BLOCK_SIZE * BLOCK_SIZE]
    earlier.append(prompt or [0])
    return earlier[-1]


def crowded_job(
    seed: int,
    num_families: int = 14,
    order: str = "fcfs",
    *,
    is_misjudged: bool = True,
    num_host_blocks: int | None = None,
) -> Harness:
    """A job in memory for little more than its largest sequence. Outputs are expected to have one
    token, or, if they are not misjudged, what they will have. With room on a host, which may be for
    0 blocks, there is one group without a window."""
    draw = random.Random(seed)
    earlier: list[list[int]] = []
    families = []
    for place in range(num_families):
        prompt = random_prompt(draw, earlier)
        options = {"max_tokens": draw.randint(1, 24), "n": draw.choice([1, 1, 2, 4])}
        expected = 1 if is_misjudged else None
        kind = draw.randrange(8)
        if kind == 0:
            options["prompt_logprobs"] = draw.randrange(3)
        elif kind == 1 and len(prompt) > 1:
            options = {"task": Task.SCORE, "score_start": draw.randint(1, len(prompt) - 1)}
        elif kind == 2:
            options = {"task": Task.EMBED, "pooling": draw.choice(["mean", "last"])}
        elif kind == 3:
            options["logprobs"] = 0
        end = is_misjudged and draw.random() < 0.3
        families.append(family(place, prompt, end=end, expected=expected, **options))
    windows = [[None], [6], [None, 6], [3, 9], [None, 4, 30]][seed % 5]
    windows = windows if num_host_blocks is None else [None]
    budget = draw.randint(8, 24)
    pools = [num + draw.randint(0, 6) for num in smallest_pools(windows, families, budget)]
    harness = Harness(
        windows,
        pools,
        budget=budget,
        max_num_seqs=8,
        look_ahead=seed // 5 % 2,
        order=order,
        lengths="subtree" if is_misjudged else "declared",
        num_host_blocks=num_host_blocks or 0,
    )
    for first in families:
        assert harness.add(first)
    return harness


@pytest.mark.parametrize("num_host_blocks", [None, 5])
@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_preempted_when_lengths_are_known(seed, num_host_blocks) -> None:
    """Forks, chunked prompts, windows, late results, shared blocks and a host included."""
    harness = crowded_job(seed, is_misjudged=False, num_host_blocks=num_host_blocks)
    harness.run()
    assert harness.scheduler.stats.num_preemptions == 0
    assert harness.scheduler.stats.num_recomputed_tokens == 0


def test_crowded_jobs_end_well_and_go_through_everything_hard() -> None:
    """If memory were never short or never shared, the other tests would prove little."""
    counts: Counter[str] = Counter()
    for seed in range(20):
        harness = crowded_job(seed)
        harness.run()
        stats = harness.scheduler.stats
        counts["preemptions"] += stats.num_preemptions
        counts["recomputed tokens"] += stats.num_recomputed_tokens
        counts["cached tokens"] += stats.num_cached_tokens
        counts["block copies"] += harness.num_copies
        counts["evictions"] += harness.num_evictions
        counts["late tokens"] += harness.num_late
        counts["score runs"] += sum(harness.num_score_runs.values())
        counts["embeddings"] += len(harness.pooled)
    least = {
        "preemptions": 60,
        "recomputed tokens": 600,
        "cached tokens": 1500,
        "block copies": 70,
        "evictions": 100,
        "late tokens": 20,
        "score runs": 40,
        "embeddings": 20,
    }
    assert not {name: counts[name] for name in least if counts[name] < least[name]}


@pytest.mark.slow
def test_many_crowded_jobs() -> None:
    for seed in range(1000, 2000):
        order = names("plan.orders")[seed // 10 % 5]
        crowded_job(seed, num_families=25, order=order).run()
        crowded_job(seed, num_families=25, order=order, num_host_blocks=seed % 40).run()


@pytest.mark.parametrize("order", ORDERS)
def test_crowded_jobs_end_well_in_every_order(order: str) -> None:
    for seed in range(5):
        crowded_job(seed, order=order).run()


def prefill_tokens(prompts: list[list[int]]) -> int:
    """Tokens that must be computed for prompts in job order when memory suffices: the unique trie
    tokens, sharing at depths rounded down to the block, plus one per fully cached prompt."""
    known: set[tuple[int, ...]] = set()
    total = 0
    for prompt in prompts:
        blocks = {tuple(prompt[:end]) for end in range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE)}
        own = len(prompt) - BLOCK_SIZE * len(blocks & known)
        total += own if own else 1
        known |= blocks
    return total


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    num_prompts=st.integers(1, 16),
    budget=st.integers(4, 64),
    max_num_seqs=st.integers(1, 4),
    look_ahead=st.integers(0, 1),
    windows=st.sampled_from([[None], [5], [None, 9]]),
)
def test_a_shared_prefix_is_computed_once(
    seed, num_prompts, budget, max_num_seqs, look_ahead, windows
):
    draw = random.Random(seed)
    earlier: list[list[int]] = []
    harness = Harness(
        windows,
        [1000] * len(windows),
        budget=budget,
        max_num_seqs=max_num_seqs,
        look_ahead=look_ahead,
    )
    for order in range(num_prompts):
        first = family(order, random_prompt(draw, earlier), draw.randint(1, 9), end=False)
        assert harness.add(first)
    harness.run()
    decoded = sum(s.max_len - s.num_prompt_tokens - 1 for s in harness.members)
    computed = harness.scheduler.stats.num_computed_tokens
    assert computed - decoded == prefill_tokens(earlier)
    num_prompt = sum(len(prompt) for prompt in earlier)
    assert harness.scheduler.stats.num_cached_tokens == num_prompt - prefill_tokens(earlier)


def test_without_sharing_every_prompt_is_computed() -> None:
    harness = Harness([None], [100], budget=16, max_num_seqs=4, sharing=False)
    for order in range(4):
        harness.add(family(order, [1] * 9, 1, end=False))
    harness.run()
    assert harness.scheduler.stats.num_computed_tokens == 36


@pytest.mark.parametrize(("n", "num_slots", "num_tokens"), [(4, 4, 10), (4, 1, 10 + 3 * 2)])
def test_samples_share_their_prompt(n: int, num_slots: int, num_tokens: int) -> None:
    """As forks, or from the full blocks if there is no slot for them yet."""
    harness = Harness([None], [100], budget=64, max_num_seqs=num_slots)
    harness.add(family(0, [1] * 10, 1, n, end=False))
    harness.run()
    assert harness.scheduler.stats.num_computed_tokens == num_tokens


def test_rows_of_different_namespaces_share_nothing() -> None:
    harness = Harness([None], [100], budget=64, max_num_seqs=4)
    for order, namespace in enumerate(["", "a", "b", "a"]):
        harness.add(family(order, [1] * 9, 1, end=False, namespace=namespace))
    harness.run()
    assert harness.scheduler.stats.num_computed_tokens == 9 + 9 + 9 + 1


def rows_of(step: Step) -> dict[int, int]:
    """Tokens computed per slot."""
    return dict(zip(step.slots.tolist(), np.diff(step.cu_seqlens_q).tolist()))


def test_single_tokens_go_first_then_job_order() -> None:
    harness = Harness([None], [100], budget=6, max_num_seqs=4, sharing=False)
    for order, length in enumerate([2, 14, 3]):
        harness.add(family(order, [order] * length, 9, end=False))
    for expected in [{0: 2, 1: 4}, {0: 1, 1: 5}, {0: 1, 1: 5, 2: 0}, {0: 1, 1: 1, 2: 3}]:
        harness.round()
        assert rows_of(harness.steps[-1]) == {s: n for s, n in expected.items() if n}


def test_a_decoding_row_does_not_wait_for_the_prompt_of_an_earlier_one() -> None:
    harness = Harness([None], [100], budget=3, max_num_seqs=3, sharing=False)
    harness.add(family(0, [0] * 14, 9, end=False))
    harness.add(family(1, [1], 9, 2, end=False))
    harness.end(harness.members[1])  # the second sample is next now
    harness.round()
    assert rows_of(harness.steps[-1]) == {0: 1, 1: 2}
    harness.round()
    assert harness.steps[-1].slots.tolist() == [0, 1] and rows_of(harness.steps[-1]) == {0: 1, 1: 2}


@pytest.mark.parametrize(("num_blocks", "is_admitted"), [(6, True), (5, False)])
def test_a_row_is_admitted_exactly_when_it_and_the_next_growth_fit(num_blocks, is_admitted) -> None:
    """Row 0 has two blocks and grows by one before row 2 has ended; row 1 left one in the cache,
    where it counts as free, since it can be evicted; row 2 needs three for two Steps."""
    harness = Harness([None], [num_blocks], budget=32, max_num_seqs=2)
    for order, (prompt, max_tokens) in enumerate(
        [([1] * 7, 12), ([2] * 4, 1), ([3] * 11, 2), ([2] * 5, 1)]
    ):
        assert harness.add(family(order, prompt, max_tokens, end=False))
    harness.round()
    assert harness.scheduler.books.cache.num_evictable(0) == 1
    harness.schedule()
    assert (harness.steps[-1].num_rows == 2) == is_admitted
    harness.deliver()
    harness.run()


def test_no_more_is_evicted_than_is_needed() -> None:
    """Row 1 leaves two blocks for row 3. Row 0 takes one of them while row 2, which leaves room for
    the other, waits until row 0 has ended."""
    harness = Harness([None], [5], budget=32, max_num_seqs=2)
    for order, (prompt, max_tokens) in enumerate(
        [([1] * 3, 12), ([2] * 8, 1), ([3] * 15, 2), ([2] * 9, 1)]
    ):
        harness.add(family(order, prompt, max_tokens, end=False))
    harness.run()
    assert harness.num_evictions == 1
    assert [s.num_cached_tokens for s in harness.members] == [0, 0, 0, BLOCK_SIZE]


@pytest.mark.parametrize("max_tokens", [10, 12])
def test_a_preempted_prompt_goes_on_where_its_full_blocks_end(max_tokens) -> None:
    """Row 1 is stopped inside a block, after 15 of its 17 tokens, and computes 3 of them again,
    whether or not row 0 needs that block before it ends."""
    harness = Harness([None], [7], budget=3, max_num_seqs=2)
    harness.add(family(0, [1, 1], max_tokens, end=False, expected=1))
    harness.add(family(1, [2] * 17, 1, end=False))
    harness.run()
    stats = harness.scheduler.stats
    assert (stats.num_preemptions, stats.num_recomputed_tokens) == (1, 3)


def test_equal_prompts_start_in_the_same_step_whatever_their_task() -> None:
    """A score computes all but its last token, hence not its last block: nobody waits for that."""
    harness = Harness([None], [100], budget=64, max_num_seqs=4)
    harness.add(family(0, [1] * 8, task=Task.SCORE))
    harness.add(family(1, [1] * 8, 1, end=False))
    harness.add(family(2, [1] * 8, task=Task.EMBED, pooling="last"))
    harness.round()
    assert rows_of(harness.steps[0]) == {0: 7, 1: 4, 2: 1}
    harness.run()


def test_scores_are_kept_when_the_last_token_is_late() -> None:
    """The row that scored its prompt is preempted before the result and ends with its one token."""
    harness = Harness([None], [6], budget=3, max_num_seqs=2, look_ahead=1)
    harness.add(family(0, [1], 12, end=False, expected=1))
    harness.add(family(1, [2] * 15, 1, end=False, prompt_logprobs=1))
    harness.run()
    assert harness.num_late == 1 and harness.num_starts[harness.members[1]] == 1


@pytest.mark.parametrize("num_rounds", [0, 1, 2, 9])
def test_samples_survive_the_end_of_the_first(num_rounds: int) -> None:
    """Waiting, in its prompt, just forked, decoding: the others go on without it."""
    harness = Harness([None], [100], budget=5, max_num_seqs=5)
    harness.add(family(0, [1] * 9, 20, 4, end=False))
    for _ in range(num_rounds):
        harness.round()
    first, *others = harness.members
    harness.end(first)
    harness.run()
    assert all(other.finish_reason is FinishReason.LENGTH for other in others)


def test_a_refused_row_leaves_no_trace() -> None:
    harness = Harness([None], [3], budget=8, max_num_seqs=2)
    assert not harness.add(family(0, [1] * 9, 4, 3))
    harness.run()
    assert not harness.steps
    assert harness.add(family(0, [1] * 9, 3, 3))
    harness.run()


def test_a_row_must_fit_when_steps_are_large_again() -> None:
    """Behind a window of 5 tokens, chunks of 16 take 7 blocks, chunks of 24 take 9."""
    for num_blocks, fits in ((7, False), (8, False), (9, True)):
        harness = Harness([5], [num_blocks], budget=24, max_num_seqs=2)
        assert harness.scheduler.limits.halve()
        assert harness.scheduler.limits.max_tokens == 16
        assert harness.add(family(0, [1] * 40, 4, end=False)) == fits


def test_after_a_failed_step_no_token_is_waited_for() -> None:
    """Row 1 was preempted with its token in flight when the step fails."""
    harness = Harness([None], [6], budget=3, max_num_seqs=2, look_ahead=1)
    harness.add(family(0, [1], 12, end=False, expected=1))
    harness.add(family(1, [2] * 15, 1, end=False))
    while not harness.num_late:
        harness.schedule()
        if len(harness.outstanding) == 2 and not harness.num_late:
            harness.deliver()
    assert any(member.num_in_flight for member in harness.members)
    harness.scheduler.requeue_running()
    assert not any(member.num_in_flight for member in harness.members)
    assert harness.scheduler.schedule() is not None
    harness.scheduler.check_integrity()


class FailingExecutor:
    """Another executor whose draws for some sequences are not numbers."""

    def __init__(self, executor, is_bad) -> None:
        self.executor, self.is_bad = executor, is_bad

    def execute(self, step: Step) -> StepResult:
        result = self.executor.execute(step)
        result.token_ids[[self.is_bad(slot) for slot in step.sample_slots.tolist()]] = -1
        return result


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_failed_draw_ends_its_sequence_alone(look_ahead: int) -> None:
    harness = Harness([None], [100], budget=32, max_num_seqs=3, look_ahead=look_ahead)
    harness.executor = FailingExecutor(harness.executor, lambda slot: slot == 1)
    for order in range(3):
        harness.add(family(order, [order] * 5, 6, end=False))
    failed: list[Sequence] = []
    check = harness._check_finished
    harness._check_finished = lambda s: failed.append(s) if s.order == 100 else check(s)
    harness.run()
    assert [s.finish_reason for s in failed] == [FinishReason.ERROR]


def started(harness: Harness) -> list[str]:
    """Requests that hold a slot."""
    return sorted(s.request.id for s in harness.scheduler.books.slots.sequences if s is not None)


def test_an_urgent_sequence_starts_before_all_that_wait():
    harness = Harness([None], [100], budget=8, max_num_seqs=2)
    for order in range(6):
        harness.add(family(order, [order, 1, 2], max_tokens=12, end=False))
    harness.round()
    harness.add(family(6, [6, 1], max_tokens=2, end=False, urgent=True))
    harness.round()
    assert started(harness) == ["r0", "r6"]  # the youngest that ran made way, the oldest never does
    assert harness.scheduler.stats.num_preemptions == 1
    harness.run()
    assert harness.finished[0].request.id == "r6"


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_burst_of_urgent_sequences_pushes_out_one_a_step(look_ahead):
    harness = Harness([None], [100], budget=8, max_num_seqs=4, look_ahead=look_ahead)
    for order in range(4):
        harness.add(family(order, [order, 1], max_tokens=30, end=False))
    for _ in range(3):
        harness.round()
    for order in range(4, 20):
        harness.add(family(order, [order % 7, 1], max_tokens=3, end=False, urgent=True))
    before = harness.scheduler.stats.num_preemptions
    harness.schedule()
    assert harness.scheduler.stats.num_preemptions == before + 1
    harness.run()
    assert harness.scheduler.stats.num_preemptions == 2  # half of the slots


def test_an_urgent_sequence_that_is_cancelled_pushes_nobody_out():
    harness = Harness([None], [100], budget=8, max_num_seqs=2)
    for order in range(2):
        harness.add(family(order, [order, 1], max_tokens=12, end=False))
    harness.round()
    first = family(2, [2, 1], urgent=True)
    harness.add(first)
    harness.end(first)
    harness.run()
    assert harness.scheduler.stats.num_preemptions == 0

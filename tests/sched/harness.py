"""Runs a Scheduler on the symbolic executor and checks everything that can be checked.

`Harness.check` compares the scheduler's books with what they should be, derived anew from the
sequences alone; `Harness.deliver` compares every reported token, score and embedding with the
answer that the prompt determines. Private attributes are read, never changed.
"""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

from batchwright.errors import RequestError
from batchwright.kv.groups import KVGroup, blocks_per_sequence
from batchwright.kv.prefix_cache import ABSENT
from batchwright.plan.length_predictor import find_predictor
from batchwright.request import FinishReason, Request, SamplingParams, Task
from batchwright.sched.intake import Update
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import NO_SLOT, Sequence
from batchwright.step import NewSequence, Step, StepResult
from batchwright.structured.spec import GrammarSpec
from batchwright.techniques import find
from tests.sched.symbolic import (
    SymbolicExecutor,
    expected_embedding,
    expected_output,
    expected_scores,
)

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
VOCAB_SIZE = 7
END_TOKEN = 3
URGENT_LEAD = 2**62


def family(
    order: int,
    prompt: list[int],
    max_tokens: int = 8,
    n: int = 1,
    *,
    end: bool = True,
    task: Task = Task.GENERATE,
    score_start: int = 1,
    pooling: str = "mean",
    prompt_logprobs: int | None = None,
    logprobs: int | None = None,
    namespace: str = "",
    grammar: GrammarSpec | None = None,
    urgent: bool = False,
    expected: int | None = None,
) -> Sequence:
    """The first sequence of a request, with its siblings, as the engine makes them.

    `expected`: output tokens that it is expected to have, rightly or not; None: all it may.
    """
    generates = task is Task.GENERATE
    request = Request(
        id=f"r{order}",
        prompt_token_ids=np.array(prompt, np.int32),
        params=SamplingParams(
            max_tokens=max_tokens,
            n=n,
            prompt_logprobs=prompt_logprobs,
            logprobs=logprobs,
            grammar=grammar,
        ),
        task=task,
        score_start=score_start,
        pooling=pooling,
        namespace=namespace,
        urgent=urgent,
    )
    members = [
        Sequence(
            request=request,
            order=order * 100 + index - (URGENT_LEAD if urgent else 0),
            sample_index=index,
            end_token_ids=(END_TOKEN,) if end else (),
            noise_key=1000 + order,
            max_len=min(len(prompt) + max_tokens * generates, MAX_MODEL_LEN),
            token_ids=request.prompt_token_ids,
        )
        for index in range(n if generates else 1)
    ]
    for member in members:
        member.expected_len = min(member.max_len, len(prompt) + (expected or MAX_MODEL_LEN))
    members[0].siblings = members[1:]
    return members[0]


def blocks_alone(window: int | None, max_len: int, budget: int) -> int:
    """Blocks of a group that one sequence of `max_len` tokens needs when it runs alone."""
    return blocks_per_sequence(window, max_len, BLOCK_SIZE, budget)


def smallest_pools(windows, families, budget) -> list[int]:
    """Blocks per group that just hold the largest sequence alone."""
    longest = max(first.max_len for first in families)
    return [blocks_alone(window, longest, budget) for window in windows]


class Harness:
    """A scheduler and a symbolic executor with a given look-ahead."""

    def __init__(
        self,
        windows,
        num_blocks,
        *,
        budget,
        max_num_seqs,
        look_ahead=0,
        sharing=True,
        order="fcfs",
        lengths="subtree",
        num_host_blocks=0,
    ):
        num_host_blocks = num_host_blocks if windows == [None] else 0
        self.scheduler = Scheduler(
            [KVGroup(w, n, num_host_blocks) for w, n in zip(windows, num_blocks, strict=True)],
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            prefix_sharing=sharing,
            order=getattr(find("plan.orders", order), order),
            lengths=find_predictor(lengths),
        )
        self.order = order
        self.executor = SymbolicExecutor(
            windows,
            num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            num_host_blocks=num_host_blocks,
        )
        self.look_ahead = look_ahead
        self.outstanding: deque[StepResult] = deque()
        self.steps: list[Step] = []
        self.members: list[Sequence] = []  # of every family added, in order
        self.finished: list[Sequence] = []
        self.num_starts: Counter[Sequence] = Counter()
        self.num_cached: dict[Sequence, int] = {}
        self.num_computed: dict[Sequence, int] = {}  # the most so far
        self.num_recomputed_tokens = 0
        self.num_score_runs: Counter[Sequence] = Counter()
        self.watched: dict[Sequence, list[int]] = {}
        self.score_run: dict[Sequence, dict[int, int]] = {}  # of the present start
        self.scored: dict[str, dict[int, int]] = {}  # by request: forks leave it to their parent
        self.pooled: dict[Sequence, list[int]] = {}
        # How often the hard things happened.
        self.num_late = self.num_evictions = 0
        self.ended: set[str] = set()  # requests of which a sequence was ended from outside
        self._first_was_cancelled = False
        self._count_evictions()

    # What a test does ------------------------------------------------------------------------

    def add(self, first: Sequence) -> bool:
        """Add a family; False if the scheduler refuses it, which it must do exactly when due."""
        budget = self.scheduler.limits.largest_max_tokens
        fits = all(
            blocks_alone(table.window, first.max_len, budget) <= table.pool.num_blocks
            for table in self.scheduler.books.tables
        )
        try:
            self.scheduler.add(first)
        except RequestError:
            assert not fits, "refused what would fit"
            return False
        assert fits, "took what cannot fit"
        self.members += [first, *first.siblings]
        return True

    def schedule(self) -> bool:
        """Make and execute a Step; False when there is none."""
        lacking = self._lacking()
        num_preemptions = self.scheduler.stats.num_preemptions
        step = self.scheduler.schedule()
        has_preempted = self.scheduler.stats.num_preemptions > num_preemptions
        self.num_late += len(self.scheduler._intake._late)
        if step is None:
            busy = self.outstanding or not self.scheduler.num_unfinished
            assert busy, "sequences are left but nothing can run"
            return False
        assert 0 < step.num_tokens <= self.scheduler.limits.max_tokens
        rows = [self.scheduler.books.slots.sequences[slot] for slot in step.slots.tolist()]
        self._check_division(step, rows, lacking, has_preempted)
        self._note_starts(step)
        self._note_computed(step, rows)
        self._check_constrained(step)
        self.steps.append(step)
        self.outstanding.append(self.executor.execute(step))
        return True

    def deliver(self) -> Update:
        """Give the scheduler the oldest result and check what it makes of it."""
        result = self.outstanding.popleft()
        update = self.scheduler.update(result)
        for sequence, line in update.watched:
            assert sequence.is_watched
            self.watched.setdefault(sequence, []).append(int(result.token_ids[line]))
        for sequence, position, first, end in update.scored:
            self._take_scores(sequence, position, result.score_logprobs.ranks[first:end].tolist())
        for sequence, slot in update.pooled:
            assert sequence not in self.pooled
            self.pooled[sequence] = result.embeddings[slot].astype(int).tolist()
        for sequence in update.finished:
            self._check_finished(sequence)
        self.finished += update.finished
        return update

    def end(self, sequence: Sequence, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a sequence from outside: cancelled, or because of a stop string."""
        self.ended.add(sequence.request.id)
        self._first_was_cancelled |= bool(sequence.siblings)
        self.scheduler.finish(sequence, reason, "stop" if reason is FinishReason.STOP else None)
        output = sequence.token_ids[sequence.num_prompt_tokens :].tolist()
        assert output == expected_output(sequence, VOCAB_SIZE)[: len(output)]
        assert self.watched.get(sequence, []) == (output if sequence.is_watched else [])
        self.finished.append(sequence)

    def round(self) -> bool:
        """One engine round; False when nothing was left to do."""
        while len(self.outstanding) <= self.look_ahead and self.schedule():
            pass
        if not self.outstanding:
            return False
        self.deliver()
        return True

    def run(self) -> None:
        """Run until everything has ended, within a bound that rules out starvation."""
        # The first running sequence is never preempted and gets a token in every Step.
        bound = 10 + 2 * sum(member.max_len for member in self.unfinished())
        for index in range(bound):
            if not self.round():
                break
            if index % 4 == 0:  # the books cost more than the Step
                self.check()
        self.check()
        assert not self.unfinished() and self.scheduler.num_unfinished == 0, "never finished"
        assert Counter(self.finished) == Counter(self.members), "each ends once"
        for table in self.scheduler.books.tables:
            assert table.pool.num_free == table.pool.num_blocks, "blocks leaked"
        self.scheduler.books.host.take_changes()
        host = self.scheduler.books.host
        assert host.num_free == host.num_blocks, "blocks of the host leaked"
        assert len(self.scheduler.books.tree) == 0, "prefix nodes leaked"
        num_outputs = sum(len(s.token_ids) - s.num_prompt_tokens for s in self.members)
        assert self.scheduler.stats.num_generated_tokens == num_outputs
        assert not self.scheduler._intake._late and not self.scheduler._in_flight

    def unfinished(self) -> list[Sequence]:
        return [member for member in self.members if member.finish_reason is None]

    def outputs(self) -> dict[tuple[str, int], list[int]]:
        return {
            (s.request.id, s.sample_index): s.token_ids[s.num_prompt_tokens :].tolist()
            for s in self.finished
        }

    @property
    def num_copies(self) -> int:
        return sum(len(copies) for step in self.steps for copies in step.block_copies)

    # What must hold between any two calls -----------------------------------------------------

    def check(self) -> None:
        self.scheduler.check_integrity()
        self._check_places()
        self._check_tree()
        self._check_cache()
        self._check_prompts()
        self._check_token_counts()

    def _check_prompts(self) -> None:
        """One running row at most is inside its prompt, so no two compute the same prefix."""
        slots = self.scheduler.books.slots
        running = slots.running
        assert (slots.num_computed[running] < slots.num_prompt[running] - 1).sum() <= 1

    def _check_places(self) -> None:
        """Every unfinished sequence is in exactly one place."""
        scheduler = self.scheduler
        plan = scheduler.books.waiting._plan
        waiting = [
            *(sequence for sequence in plan._rows if sequence is not None),
            *plan._new,
            *(sequence for *_, sequence in scheduler.books.waiting._returned),
        ]
        places = Counter(sequence for sequence in waiting if sequence.finish_reason is None)
        places.update(
            sequence for sequence in scheduler.books.slots.sequences if sequence is not None
        )
        for sequence in list(places):
            places.update(s for s in sequence.siblings if s.finish_reason is None)
        assert places == Counter(self.unfinished()), "a sequence was lost or doubled"
        assert scheduler.num_unfinished == len(self.unfinished())
        running = scheduler.books.slots.running.tolist()
        assert {
            s
            for s in range(len(scheduler.books.slots.sequences))
            if scheduler.books.slots.sequences[s]
        } == (set(running))
        orders = scheduler.books.slots.order[scheduler.books.slots.running]
        assert (np.diff(orders) > 0).all(), "running slots are out of order"
        assert all(scheduler.books.slots.sequences[slot].slot == slot for slot in running)

    def _check_tree(self) -> None:
        tree = self.scheduler.books.tree
        num_waiting = np.zeros(tree.capacity, np.int64)
        num_rows = np.zeros(tree.capacity, np.int64)
        for member in self.unfinished():
            num_rows[member.nodes] += 1
            num_waiting[member.nodes] += member.slot == NO_SLOT
        assert (tree.num_waiting == num_waiting).all(), "future users are miscounted"
        assert (tree._num_rows == num_rows).all(), "known rows are miscounted"
        assert len(tree) == np.count_nonzero(num_rows)

    def _check_cache(self) -> None:
        """What is resident has a future user."""
        scheduler = self.scheduler
        blocks = scheduler.books.cache._blocks
        has_user = scheduler.books.tree.num_waiting[: blocks.shape[1]] > 0
        assert has_user[(blocks != ABSENT).any(axis=0)].all(), "kept without a future user"

    def _check_token_counts(self) -> None:
        """The scheduler's own counts against those taken from its Steps."""
        stats = self.scheduler.stats
        assert stats.num_steps == len(self.steps)
        assert stats.num_computed_tokens == sum(step.num_tokens for step in self.steps)
        assert stats.num_recomputed_tokens == self.num_recomputed_tokens
        assert stats.num_cached_tokens == sum(self.num_cached.values())
        assert all(m.num_cached_tokens == self.num_cached.get(m) for m in self.members)

    # What must hold of every Step --------------------------------------------------------------

    def _lacking(self) -> dict[Sequence, int]:
        """Tokens that each running sequence could compute, in job order.

        What has a grammar waits for the token in flight.
        """
        slots = self.scheduler.books.slots
        ends = np.minimum(slots.num_tokens, slots.compute_end)
        held = slots.constrained & (slots.num_known < slots.num_tokens)
        lacking = np.where(held, 0, ends - slots.num_computed)
        return {slots.sequences[slot]: int(lacking[slot]) for slot in slots.running.tolist()}

    def _check_division(self, step, rows, lacking, has_preempted) -> None:
        """Single tokens first, then job order, then new sequences; no budget is held back."""
        oldest = next(iter(lacking), None)
        assert oldest is None or oldest.slot != NO_SLOT, "the oldest sequence was preempted"
        left = self.scheduler.limits.max_tokens
        expected = {}
        order = sorted(lacking, key=lambda sequence: lacking[sequence] > 1)
        for sequence in (s for s in order if s.slot != NO_SLOT):
            expected[sequence] = min(lacking[sequence], left)
            left -= expected[sequence]
        lengths = np.diff(step.cu_seqlens_q).tolist()
        for row, sequence in enumerate(rows):
            if sequence not in lacking:  # it is new
                first = int(step.positions[step.cu_seqlens_q[row]])
                end = min(len(sequence.token_ids), sequence.compute_end)
                expected[sequence] = min(end - first, left)
                left -= expected[sequence]
                freed_for_others = has_preempted and not sequence.request.urgent
                assert not freed_for_others, "what was freed went to a newcomer"
        granted = dict(zip(rows, lengths))
        assert granted == {sequence: num for sequence, num in expected.items() if num}

    def _check_constrained(self, step: Step) -> None:
        """Draws that a grammar restricts are known, and all tokens before them are."""
        slots = self.scheduler.books.slots
        drawn = dict(enumerate(step.sample_slots.tolist()))
        expected = {i: slot for i, slot in drawn.items() if slots.constrained[slot]}
        draws = self.scheduler.constrained_draws(step)
        assert {index: sequence.slot for index, sequence in draws} == expected
        for slot in expected.values():
            assert slots.num_known[slot] == slots.num_tokens[slot] - 1

    def _note_starts(self, step: Step) -> None:
        """Sequences are started in order, except that forks pass each other."""
        first_position = dict(zip(step.slots.tolist(), step.positions[step.cu_seqlens_q[:-1]]))
        for new in step.new_sequences:
            sequence = self.scheduler.books.slots.sequences[new.slot]
            is_fork = new.slot not in first_position
            self._check_new(new, sequence)
            self.num_starts[sequence] += 1
            cached = sequence.num_prompt_tokens if is_fork else int(first_position[new.slot])
            self.num_cached.setdefault(sequence, cached)
            self.num_computed[sequence] = max(cached, self.num_computed.get(sequence, 0))
            # Where rows are started from both ends their numbers only estimate the order.
            if is_fork or self._first_was_cancelled or self.order == "density":
                continue
            earlier = [m for m in self.unfinished() if m.order < sequence.order]
            siblings = {s for m in earlier for s in m.siblings}
            left = {m for m in earlier if m.slot == NO_SLOT} - siblings
            assert not left, "a later sequence was started first"

    def _check_new(self, new: NewSequence, sequence: Sequence) -> None:
        request = sequence.request
        assert new.num_prompt_tokens == sequence.num_prompt_tokens
        assert new.params is request.params and new.noise_key == sequence.noise_key
        assert new.end_token_ids == sequence.end_token_ids
        assert new.pooling == (request.pooling if request.task is Task.EMBED else None)

    def _note_computed(self, step: Step, rows: list[Sequence]) -> None:
        ends = step.positions[step.cu_seqlens_q[1:] - 1] + 1
        scored_rows = np.searchsorted(step.cu_seqlens_q, step.score_tokens, side="right") - 1
        for row, sequence in enumerate(rows):
            first, end = int(step.positions[step.cu_seqlens_q[row]]), int(ends[row])
            most = self.num_computed[sequence]
            self.num_recomputed_tokens += max(0, min(end, most) - first)
            self.num_computed[sequence] = max(end, most)
            is_sampled = step.slots[row] in step.sample_slots
            slot_tokens = self.scheduler.books.slots.num_tokens[step.slots[row]]
            assert is_sampled == (sequence.samples and end == slot_tokens - is_sampled)
            if row in scored_rows:
                assert step.score_top >= (sequence.request.params.prompt_logprobs or 0)

    # What must hold of every report -----------------------------------------------------------

    def _take_scores(self, sequence: Sequence, position: int, lines: list[int]) -> None:
        """Lines come in order, without gaps, from the first scored position of each start."""
        assert lines and sequence.score_start is not None
        scored = self.score_run.setdefault(sequence, {})
        if position == sequence.score_start:
            self.num_score_runs[sequence] += 1
            assert self.num_score_runs[sequence] <= self.num_starts[sequence], "scored twice"
            scored.clear()
        assert position == sequence.score_start + len(scored), "a gap or an overlap in the scores"
        scored.update(enumerate(lines, start=position))
        assert position + len(lines) <= sequence.num_prompt_tokens
        self.scored.setdefault(sequence.request.id, {}).update(scored)

    def _check_finished(self, sequence: Sequence) -> None:
        assert sequence.slot == NO_SLOT and not sequence.siblings
        # The first sample scores the prompt for all, unless it is gone.
        if sequence.sample_index == 0 and sequence.request.id not in self.ended:
            scored = self.scored.get(sequence.request.id, {})
            assert scored == expected_scores(sequence), "wrong scores"
        output = sequence.token_ids[sequence.num_prompt_tokens :].tolist()
        if not sequence.samples:
            assert sequence.finish_reason is FinishReason.STOP and not output
            pools = sequence.request.task is Task.EMBED
            assert self.pooled.get(sequence) == (expected_embedding(sequence) if pools else None)
            return
        assert output == expected_output(sequence, VOCAB_SIZE), "wrong tokens"
        assert self.watched.get(sequence, []) == (output if sequence.is_watched else [])
        if output[-1] in sequence.end_token_ids:
            assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, output[-1])
        else:
            assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.LENGTH, None)

    def _count_evictions(self) -> None:
        cache = self.scheduler.books.cache
        evict = cache.evict

        def counted(group: int, num_blocks: int) -> None:
            before = np.count_nonzero(cache._blocks != ABSENT)
            evict(group, num_blocks)
            self.num_evictions += int(before - np.count_nonzero(cache._blocks != ABSENT))

        cache.evict = counted


def start_what_fits_now(scheduler: Scheduler) -> None:
    """Let rows start as if none grew: where memory is short running ones are then preempted."""
    scheduler._forecast.surely_fits = lambda sequence, num_spare=0: True

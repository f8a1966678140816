"""Scheduler: decides what every Step computes. No torch, no wall clock, no tokens in Python.

There is no prefill and no decode: a sequence has tokens that exist and tokens whose KV is
scheduled, and each Step lets it catch up, within a token budget. Sequences that lack one token go
first, then those that lack more, each in job order; what is left of the budget admits new ones.

Admission cannot deadlock: whenever nothing runs, everything but the newcomer's own blocks can be
evicted, and `add` refuses sequences larger than the pool. The oldest running sequence is never
preempted, so it always ends.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np

from batchwright.errors import RequestError
from batchwright.kv.block_table import BlockTable
from batchwright.kv.groups import KVGroup, blocks_per_sequence
from batchwright.kv.prefix_cache import PrefixCache
from batchwright.plan.plan import Plan
from batchwright.plan.prefix_tree import PrefixTree
from batchwright.request import FinishReason, Int32Array
from batchwright.sched.intake import Ending, Intake, SchedulerStats, Update
from batchwright.sched.slots import Slots
from batchwright.sched.step_builder import InFlight, StepBuilder
from batchwright.sequence import NO_SLOT, Sequence
from batchwright.step import Step, StepResult

MIN_TOKEN_BUDGET = 16
"""Token budget below which a Step takes hardly less memory (products are padded to 12 rows)."""


class Scheduler:
    """See the module docstring.

    Args:
        groups: KV groups of the model with their pool sizes.
        block_size: tokens per KV block.
        max_num_seqs: slots, i.e. sequences that run at once.
        max_num_batched_tokens: token budget of a Step, at least max_num_seqs.
        max_model_len: most tokens of a sequence.
        prefix_sharing: whether prompts share blocks.
    """

    def __init__(
        self,
        groups: Seq[KVGroup],
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        prefix_sharing: bool = True,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs
        self._groups = groups
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self.max_running = max_num_seqs  # slots in use at once; memory may run short
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefix_sharing = prefix_sharing
        self.stats = SchedulerStats()
        self._make_books()

    def _make_books(self) -> None:
        """Everything that is known about sequences, empty."""
        self.tables = [
            BlockTable(
                group,
                block_size=self.block_size,
                max_num_seqs=self._max_num_seqs,
                max_model_len=self._max_model_len,
            )
            for group in self._groups
        ]
        self.slots = Slots(self._max_num_seqs, self._max_model_len)
        self.plan = Plan()
        self.tree = PrefixTree(self.block_size)
        self.cache = PrefixCache(self.tree, self.tables)
        self.num_unfinished = 0
        self._simple: list[tuple[int, int]] = []  # (slot, tokens) that start, see _is_simple
        self._num_promised_blocks = 0  # what these will take in each group
        self._only: frozenset[str] | None = None  # requests that may start; None: all
        self._held: list[Sequence] = []  # waiting like those in _returned, but not in _only
        # Sequences that were started or held back before: by order, ahead of the plan.
        self._returned: list[tuple[int, Sequence]] = []
        self._in_flight: deque[InFlight] = deque()
        self._intake = Intake(self.slots, self.stats, self._finish_all)
        self._builder = StepBuilder(self.slots, self.tables)

    def add(self, sequence: Sequence) -> None:
        """Make a sequence (with its siblings) known; it waits in the plan.

        Raises:
            RequestError: it would not fit into KV memory even alone.
        """
        for table in self.tables:
            need = blocks_per_sequence(
                table.window, sequence.max_len, self.block_size, self.max_num_batched_tokens
            )
            if need > table.pool.num_blocks:
                raise RequestError(
                    f"prompt and output may reach {sequence.max_len} tokens, KV memory holds "
                    f"{table.pool.num_blocks * self.block_size}; lower max_tokens, shorten the "
                    "prompt or give more KV memory",
                    code="kv_capacity_exceeded",
                )
        draws_a_token = sequence.max_len > sequence.num_prompt_tokens or not sequence.samples
        assert draws_a_token and sequence.first_needed_position < sequence.compute_end
        self._register(sequence)
        self.plan.append(sequence)

    def _register(self, sequence: Sequence) -> None:
        family = [sequence, *sequence.siblings]
        if self.prefix_sharing:
            nodes = self.tree.add(
                sequence.request.namespace, sequence.request.prompt_token_ids, len(family)
            )
            for member in family:
                member.nodes = nodes
        self.num_unfinished += len(family)

    def schedule(self) -> Step | None:
        """The next Step, or None when there is nothing to compute now.

        With results outstanding, None may only mean that nothing can go on without them.
        """
        slots, grants, preempted = self._grant_running()
        self._advance(slots, grants)
        budget = self.max_num_batched_tokens - int(grants.sum())
        if not preempted:  # what preemption freed belongs to the rows that needed it
            self._admit(budget)
        step, record = self._builder.build()
        if step is None or record is None:
            return None
        self._in_flight.append(record)
        self.stats.num_steps += 1
        self.stats.num_computed_tokens += step.num_tokens
        windows = [table.window for table in self.tables]
        self.stats.work.add(step, self.slots.num_prompt, self.slots.computed_once, windows)
        return step

    def update(self, result: StepResult) -> Update:
        """Take in the oldest outstanding Step's result."""
        record = self._in_flight.popleft()
        assert record.step_id == result.step_id, "results must come in order"
        return self._intake.take(record, result.token_ids)

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """End a sequence, running or waiting, and free what it holds."""
        self._finish_all([Ending(sequence, reason, stop_reason)])

    def _finish_all(self, endings: list[Ending]) -> None:
        """End some sequences, at least one."""
        for sequence, reason, stop_reason in endings:
            assert sequence.finish_reason is None
            sequence.finish_reason, sequence.stop_reason = reason, stop_reason
            if sequence.slot == NO_SLOT:
                self._nobody_waits(self.tree.start(sequence.nodes))
        self.num_unfinished -= len(endings)
        slots = [ending.sequence.slot for ending in endings if ending.sequence.slot != NO_SLOT]
        if slots:
            self._leave(*slots)
        self.tree.forget(*(ending.sequence.nodes for ending in endings))
        for ending in endings:
            siblings = ending.sequence.siblings
            heirs = [sibling for sibling in siblings if sibling.finish_reason is None]
            if heirs:  # it ended before they forked: the next one computes the prompt
                heirs[0].siblings = heirs[1:]
                self._wait(heirs[0])

    def requests_of(self, step: Step) -> list[str]:
        """Ids of the requests that have rows in the newest Step."""
        sequences = (self.slots.sequences[slot] for slot in step.slots.tolist())
        return list(dict.fromkeys(s.request.id for s in sequences if s is not None))

    def constrained_draws(self, step: Step) -> list[tuple[int, Sequence]]:
        """(index of the draw, sequence) of the newest Step's draws that a grammar restricts."""
        draws = []
        for index in np.flatnonzero(self.slots.constrained[step.sample_slots]).tolist():
            sequence = self.slots.sequences[step.sample_slots[index]]
            assert sequence is not None
            draws.append((index, sequence))
        return draws

    def requeue_running(self) -> None:
        """A Step could not be computed: everything that runs goes back to waiting.

        Nothing is expected of Steps handed out, and no block is shared any more: what a failed
        Step has written cannot be trusted. Sequences keep the tokens that are known.
        """
        self._in_flight.clear()
        self._intake.forget_late()
        for _, waiting in self._returned:
            waiting.num_in_flight = 0
        for slot in self.slots.running.tolist():
            sequence = self.slots.sequences[slot]
            assert sequence is not None
            self.tree.wait_again(sequence.nodes)
            self._leave(slot)
            sequence.num_in_flight = 0
            self._wait(sequence)
        self.cache.clear()
        self._builder.reset()

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Begin anew with these sequences (and their siblings), none of which has started.

        For a caller who was interrupted, perhaps while the books were being changed.
        """
        self._make_books()
        self._builder.reset()
        for sequence in sequences:
            self._register(sequence)
            self._wait(sequence)

    def admit_only(self, request_ids: frozenset[str] | None) -> None:
        """Start only sequences of these requests, all of which wait or run; None: of all again.

        While it is set the plan is not asked. To be called when no other sequence runs.
        """
        self._only = request_ids
        waiting = [*self._held, *(sequence for _, sequence in self._returned)]
        self._held, self._returned = [], []
        for sequence in waiting:
            if sequence.finish_reason is None:
                self._wait(sequence)

    def halve_limits(self) -> bool:
        """Use half as many slots and half the token budget from now on; False: both are minimal."""
        smallest = min(MIN_TOKEN_BUDGET, self.max_num_batched_tokens)
        if self.max_running == 1 and self.max_num_batched_tokens == smallest:
            return False
        self.max_running = max(self.max_running // 2, 1)
        self.max_num_batched_tokens = max(self.max_num_batched_tokens // 2, smallest)
        return True

    def check_integrity(self) -> None:
        """Conservation law: every block reference is held by a slot or by the prefix cache."""
        for group, table in enumerate(self.tables):
            held = np.concatenate((table.held(), self.cache.held(group)))
            table.pool.check_integrity(held)

    # Running sequences -----------------------------------------------------------------------

    def _grant_running(self) -> tuple[Int32Array, Int32Array, bool]:
        """Divide the budget among running slots; preempt until their blocks suffice."""
        preempted = False
        while True:
            slots, grants = self._divide(self.slots.running)
            self._release_behind_windows(slots)
            if self._make_room(slots, grants):
                return slots, grants, preempted
            self._preempt(int(self.slots.running[-1]))
            preempted = True

    def _divide(self, slots: Int32Array) -> tuple[Int32Array, Int32Array]:
        """Tokens each slot may compute now: single tokens first, then job order."""
        state = self.slots
        wanted = np.minimum(state.num_tokens[slots], state.compute_end[slots])
        wanted = wanted - state.num_computed[slots]
        # What may follow a token in flight is not known yet where a grammar decides it.
        wanted[state.constrained[slots] & (state.num_known[slots] < state.num_tokens[slots])] = 0
        slots, wanted = slots[wanted > 0], wanted[wanted > 0]
        singles_first = np.argsort(wanted > 1, kind="stable")
        slots, wanted = slots[singles_first], wanted[singles_first]
        before = np.cumsum(wanted) - wanted
        grants = np.clip(self.max_num_batched_tokens - before, 0, wanted).astype(np.int32)
        return slots[grants > 0], grants[grants > 0]

    def _make_room(self, slots: Int32Array, grants: Int32Array) -> bool:
        """Evict until the slots can grow. False: even that is not enough."""
        starts, ends = self._write_range(slots, grants)
        for group, table in enumerate(self.tables):
            need = int(table.num_blocks_to_grow(slots, starts, ends).sum())
            if need > table.pool.num_free:
                self.cache.evict(group, need - table.pool.num_free)
            if need > table.pool.num_free:
                assert len(self.slots.running) > 1, "a sequence outgrew the pool"
                return False
        return True

    def _advance(self, slots: Int32Array, grants: Int32Array, *, shared: bool = True) -> None:
        """Schedule the next `grants` tokens of each slot; the blocks are there.

        Args:
            shared: whether anyone else may want the blocks of their prompts.
        """
        if not len(slots):
            return
        state = self.slots
        starts, ends = self._write_range(slots, grants)
        for table in self.tables:
            table.grow(slots, starts, ends)
        computed = state.num_computed[slots]
        self._builder.add_rows(slots, computed, ends)
        state.num_computed[slots] = ends
        for slot, start, end in self._prompt_progress(slots, computed, ends) if shared else ():
            self._keep_prefix(slot, start // self.block_size, end // self.block_size)
        sampled = slots[state.samples[slots] & (ends == state.num_tokens[slots])]
        state.num_tokens[sampled] += 1
        self._builder.add_samples(sampled)
        for slot in sampled[ends_prompt(state, sampled)].tolist():
            self._fork_siblings(slot)

    def _prompt_progress(
        self, slots: Int32Array, starts: Int32Array, ends: Int32Array
    ) -> list[tuple[int, int, int]]:
        """Slots still inside their prompt, with the range they compute."""
        inside = starts < self.slots.num_prompt[slots]
        columns = (slots[inside].tolist(), starts[inside].tolist(), ends[inside].tolist())
        return list(zip(*columns, strict=True))

    def _write_range(self, slots: Int32Array, grants: Int32Array) -> tuple[Int32Array, Int32Array]:
        """First position each slot will write, and the end of what it will compute."""
        computed = self.slots.num_computed[slots]
        return np.maximum(computed, self.slots.write_from[slots]), computed + grants

    def _release_behind_windows(self, slots: Int32Array) -> None:
        for table in self.tables:
            table.release_behind_window(slots, self.slots.num_computed[slots])

    def _fork_siblings(self, slot: int) -> None:
        """The prompt is computed: samples 1..n-1 share its blocks and draw from its logits.

        Siblings that find no slot wait as sequences of their own and share the full blocks.
        """
        parent = self.slots.sequences[slot]
        assert parent is not None
        siblings, parent.siblings = parent.siblings, []
        for sibling in siblings:
            if sibling.finish_reason is not None:
                continue
            if not self._num_free_slots:
                self._wait(sibling)
                continue
            computed = int(self.slots.num_computed[slot])
            child = self.slots.occupy(sibling, computed, write_from=0)
            for table in self.tables:
                table.fork(slot, child)
            self._started(sibling, num_cached=computed)
            self.slots.num_tokens[child] += 1
            self._builder.add_fork(child, slot)

    def _preempt(self, slot: int) -> None:
        """Send a slot back to waiting; its prompt stays resident as long as memory allows."""
        sequence = self.slots.sequences[slot]
        assert sequence is not None
        self.tree.wait_again(sequence.nodes)
        num_full = int(self.slots.num_computed[slot]) // self.block_size
        self._keep_prefix(slot, 0, num_full)
        epoch = int(self.slots.epoch[slot])
        self._leave(slot)
        if sequence.num_in_flight:
            self._intake.expect_late(slot, epoch, sequence)
        self.stats.num_preemptions += 1
        self._wait(sequence)

    def _leave(self, *slots: int) -> None:
        """Vacate slots, at least one, and drop their blocks."""
        for slot in slots:
            self.slots.vacate(slot)
            self._builder.release(slot)
        for table in self.tables:
            table.release(*slots)

    # Admission -------------------------------------------------------------------------------

    def _admit(self, budget: int) -> None:
        """Start waiting sequences while budget, slots and blocks last.

        No two of them compute the same prefix: there is budget for another only while every row
        that runs has all its prompt scheduled, and what is scheduled is shared.
        """
        while budget > 0 and self._num_free_slots:
            sequence = self._next_waiting()
            if sequence is None:
                break
            if self._is_simple(sequence):
                budget -= self._start_simple(sequence, budget)
                continue
            self._advance_simple()
            nodes, limit = sequence.nodes, sequence.first_needed_position
            num_matched = self.cache.match(nodes, limit) if len(nodes) else 0
            if not self._has_room(sequence, num_matched):
                self._wait(sequence)
                break
            budget -= self._start(sequence, num_matched, budget)
        self._advance_simple()

    def _is_simple(self, sequence: Sequence) -> bool:
        """Whether a sequence can start at once and shares nothing with anyone.

        Such sequences are what a job without common prefixes consists of. They are advanced
        together; that comes to the same as one by one, because none has anything to do with
        another, and costs a tenth.
        """
        if sequence.num_cached_tokens is not None or sequence.siblings:
            return False  # its blocks may be resident, or its siblings want to fork
        if not self.tree.is_alone(sequence.nodes):
            return False
        num_running = self.slots.num_running
        for table in self.tables:
            need = self._blocks_to_start(table, sequence) + num_running
            if need > table.pool.num_free - self._num_promised_blocks:
                return False
        return num_running > 0

    def _start_simple(self, sequence: Sequence, budget: int) -> int:
        """Give a slot to a simple sequence; returns the tokens that it will compute."""
        slot = self.slots.occupy(sequence, 0, write_from=0)
        num_tokens = min(len(sequence.token_ids), sequence.compute_end, budget)
        self._simple.append((slot, num_tokens))
        self._num_promised_blocks += -(-num_tokens // self.block_size)
        self._builder.add_new(slot)
        sequence.num_cached_tokens = 0
        return num_tokens

    def _advance_simple(self) -> None:
        """Schedule the simple sequences that have been given slots."""
        if not self._simple:
            return
        slots, grants = np.array(self._simple, np.int32).T
        self._simple, self._num_promised_blocks = [], 0
        sequences = (self.slots.sequences[slot] for slot in slots.tolist())
        self.tree.start(np.concatenate([s.nodes for s in sequences if s is not None]))
        self._advance(slots, grants, shared=False)

    def _next_waiting(self) -> Sequence | None:
        while self._returned:
            _, sequence = heapq.heappop(self._returned)
            if sequence.finish_reason is None:
                assert not sequence.num_in_flight
                return sequence
        return self.plan.next_admission() if self._only is None else None

    @property
    def _num_free_slots(self) -> int:
        return max(min(self.slots.num_free, self.max_running - self.slots.num_running), 0)

    def _has_room(self, sequence: Sequence, num_matched: int) -> bool:
        """Whether all known tokens fit, with one block of growth left for every running slot."""
        num_running = self.slots.num_running
        if not num_running:
            return True
        nodes, limit = sequence.nodes[:num_matched], sequence.first_needed_position
        for group, table in enumerate(self.tables):
            need = self._blocks_to_start(table, sequence)
            shared, cache_only = self.cache.num_adopted(group, nodes, limit)
            missing = need - shared + num_running - table.pool.num_free
            if missing > 0 and missing > self.cache.num_evictable(group) - cache_only:
                return False
        return True

    def _blocks_to_start(self, table: BlockTable, sequence: Sequence) -> int:
        """Blocks that all known tokens of a sequence and its next one take in a group."""
        num_tokens = len(sequence.token_ids) + 1
        return blocks_per_sequence(
            table.window, num_tokens, self.block_size, self.max_num_batched_tokens
        )

    def _start(self, sequence: Sequence, num_matched: int, budget: int) -> int:
        """Admit a sequence on top of its matched prefix; returns the tokens scheduled."""
        limit = sequence.first_needed_position
        covered = num_matched * self.block_size
        slot = self.slots.occupy(sequence, min(covered, limit), write_from=covered)
        if num_matched:
            self.cache.adopt(slot, sequence.nodes[:num_matched], limit)
        self._started(sequence, num_cached=int(self.slots.num_computed[slot]))
        self._builder.add_new(slot)
        slots, wanted = self._divide(np.array([slot], np.int32))
        grants = np.minimum(wanted, np.int32(budget))
        if not self._make_room(slots, grants):  # siblings' copies may have taken the rest
            grants = grants[:0]
            slots = slots[:0]
        self._advance(slots, grants)
        return int(grants.sum())

    def _started(self, sequence: Sequence, num_cached: int) -> None:
        """Book a sequence as no longer waiting."""
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            self.stats.num_cached_tokens += sequence.num_cached_tokens
        self._nobody_waits(self.tree.start(sequence.nodes))

    def _nobody_waits(self, nodes: Int32Array) -> None:
        if len(nodes):
            self.cache.drop(nodes)

    def _keep_prefix(self, slot: int, first: int, end: int) -> None:
        """Prompt blocks [first, end) of a slot are scheduled: share them."""
        sequence = self.slots.sequences[slot]
        assert sequence is not None
        end = min(end, len(sequence.nodes))
        if first < end:
            self.cache.insert(slot, sequence.nodes, first, end)

    def _wait(self, sequence: Sequence) -> None:
        if self._only is None or sequence.request.id in self._only:
            heapq.heappush(self._returned, (sequence.order, sequence))
        else:
            self._held.append(sequence)


def ends_prompt(state: Slots, slots: Int32Array) -> np.ndarray:
    """[num slots] bool: the slot draws its first output token now."""
    return state.num_tokens[slots] == state.num_prompt[slots] + 1

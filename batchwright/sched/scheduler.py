"""Scheduler: decides what every Step computes. No torch, no wall clock, no tokens in Python.

There is no prefill and no decode: a sequence has tokens that exist and tokens whose KV is
scheduled, and each Step lets it catch up, within a token budget. Running sequences go first
(`progress.py`); what is left of the budget admits new ones (`admission.py`).

It cannot deadlock: `add` refuses sequences larger than the pool, and the oldest running sequence
is never preempted, so it always ends. Sequences of urgent requests come before all
others in the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Seq

import numpy as np

from batchwright.errors import RequestError
from batchwright.kv.groups import KVGroup, blocks_per_sequence
from batchwright.kv.segments import segment_blocks
from batchwright.plan.expected_lengths import ExpectedLengths
from batchwright.plan.length_predictor import LengthPredictor
from batchwright.plan.lengths.subtree import Predictor as Subtree
from batchwright.plan.order import OrderFunction
from batchwright.plan.orders.fcfs import fcfs
from batchwright.request import FinishReason
from batchwright.sched.admission import Admission
from batchwright.sched.books import Books
from batchwright.sched.closed_steps import ClosedSteps
from batchwright.sched.equal_steps import Foresight
from batchwright.sched.forecast import Forecast
from batchwright.sched.intake import Ending, Intake, SchedulerStats, Update
from batchwright.sched.limits import StepLimits
from batchwright.sched.progress import Progress
from batchwright.sched.step_builder import InFlight
from batchwright.sequence import NO_SLOT, Sequence
from batchwright.step import EqualResults, EqualSteps, Step, StepResult


class Scheduler:
    """See the module docstring.

    Args:
        groups: KV groups of the model with their pool sizes.
        block_size: tokens per KV block.
        max_num_seqs: slots, i.e. sequences that run at once.
        max_num_batched_tokens: token budget of a Step, at least max_num_seqs.
        max_model_len: most tokens of a sequence.
        prefix_sharing: whether prompts share blocks.
        order: in which order rows start, a function of `plan/orders`.
        lengths: guesses output lengths, by default from the rows that have ended.

    Attributes:
        order: as given.
        limits: slots and token budget in use; memory may run short.
        stats: counts since the start.
        books: what is known about sequences.
        num_unfinished: sequences that have not ended.
        expected: how long outputs will be.
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
        order: OrderFunction = fcfs,
        lengths: LengthPredictor | None = None,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs
        self._groups = groups
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._prefix_sharing = prefix_sharing
        self.order = order
        self.expected = ExpectedLengths(lengths or Subtree())
        self.block_size = block_size
        self.limits = StepLimits(max_num_seqs, max_num_batched_tokens)
        self.stats = SchedulerStats()
        self._make_books()

    def _make_books(self) -> None:
        """Everything that is known about sequences, empty."""
        self.books = Books(
            self._groups,
            block_size=self.block_size,
            max_num_seqs=self._max_num_seqs,
            max_model_len=self._max_model_len,
            order=self.order,
            expected=self.expected,
        )
        self.num_unfinished = 0
        self._in_flight: deque[InFlight] = deque()
        self._intake = Intake(self.books.slots, self.stats, self._finish_all)
        self._forecast = Forecast(self.books.slots, self.books.tables, self.limits)
        self._progress = Progress(self.books, self.limits, self._forecast, self._intake, self.stats)
        self._admission = Admission(self.books, self.limits, self._progress, self._forecast)
        self._foresight = Foresight(
            self.books,
            self.limits,
            ClosedSteps(self.books, self._admission, self._forecast),
            self._forecast,
            self._intake,
            self.stats,
        )

    def add(self, sequence: Sequence, *, is_first: bool = False) -> None:
        """Make a sequence (with its siblings) known; it waits in the plan.

        Args:
            is_first: it waits ahead of all in the plan.
        Raises:
            RequestError: it would not fit into KV memory even alone, or it has a layout and the
                model a sliding window.
        """
        max_chunk = self.limits.largest_max_tokens
        layout = sequence.request.layout
        if layout is not None:
            self._check_no_window()
        for table in self.books.tables:
            need = blocks_per_sequence(table.window, sequence.max_len, self.block_size, max_chunk)
            if layout is not None:  # its segments must be there when it starts
                need += segment_blocks(layout.segments, self.block_size)
            if need > table.pool.num_blocks:
                also = f" and its modules take {layout.num_imported} more" if layout else ""
                raise RequestError(
                    f"prompt and output may reach {sequence.max_len} tokens{also}, KV memory holds "
                    f"{table.pool.num_blocks * self.block_size}; lower max_tokens, shorten the "
                    "prompt or give more KV memory",
                    code="kv_capacity_exceeded",
                )
        draws_a_token = sequence.max_len > sequence.num_prompt_tokens or not sequence.samples
        assert draws_a_token and sequence.first_needed_position < sequence.compute_end
        self._register(sequence)
        if is_first:
            self.books.waiting.put_back(sequence)
        else:
            self.books.waiting.append(sequence)

    def _check_no_window(self) -> None:
        if any(table.window is not None for table in self.books.tables):
            raise RequestError(
                "prompt_cache is not supported for models with a sliding window; "
                "give the whole prompt as text",
                code="unsupported_parameter",
                param="prompt_cache",
            )

    def _register(self, sequence: Sequence) -> None:
        family = [sequence, *sequence.siblings]
        request = sequence.request
        namespace: Hashable = request.namespace
        if request.layout is not None:
            self.books.segments.wait(request.layout, len(family))
            namespace = (namespace, request.layout.prefix_key)
        if self._prefix_sharing:
            nodes = self.books.tree.add(namespace, request.prompt_token_ids, len(family))
            for member in family:
                member.nodes = nodes
        self.num_unfinished += len(family)

    def schedule(self) -> Step | None:
        """The next Step, or None when there is nothing to compute now.

        With results outstanding, None may only mean that nothing can go on without them.
        """
        self.limits.max_prompt_tokens = self.books.waiting.max_prompt_tokens
        self._forecast.begin_step(is_late=bool(self._in_flight))
        self.books.segments.begin_schedule()
        self._progress.make_way()
        budget, preempted = self._progress.advance_running()
        if not preempted:  # what preemption freed belongs to the rows that needed it
            self._admission.admit(budget)
        step, record = self.books.builder.build()
        if step is None or record is None:
            return None
        self._in_flight.append(record)
        self.stats.num_steps += 1
        self.stats.num_computed_tokens += step.num_tokens
        self.stats.num_swapped_blocks += step.num_swapped
        slots, windows = self.books.slots, [table.window for table in self.books.tables]
        self.stats.work.add(step, slots.num_prompt, slots.computed_once, windows)
        return step

    def update(self, result: StepResult) -> Update:
        """Take in the oldest outstanding Step's result."""
        record = self._in_flight.popleft()
        assert record.step_id == result.step_id, "results must come in order"
        self.limits.step_succeeded()
        return self._intake.take(record, result.token_ids)

    def steps_until_change(self) -> EqualSteps | None:
        """Coming Steps that differ by one more token per row only; None: the next may be another.

        For a simulator, which may `skip` them. To be asked after all results have been taken in.
        """
        assert not self._in_flight, "results are outstanding"
        self.limits.max_prompt_tokens = self.books.waiting.max_prompt_tokens
        return self._foresight.look()

    def skip(self, steps: EqualSteps, results: EqualResults) -> Update:
        """As if `schedule` and `update` had been called for these results, one by one.

        Args:
            steps: what `steps_until_change` said; nothing has been done since.
        """
        return self._foresight.take(steps, results)

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
                self.books.no_longer_waits(sequence)
                self.books.parking.forget(sequence)
        self.num_unfinished -= sum(ending.sequence.segment is None for ending in endings)
        slots = [ending.sequence.slot for ending in endings if ending.sequence.slot != NO_SLOT]
        if slots:
            self.books.leave(*slots)
        for ending in endings:
            self.expected.note_end(ending.sequence)
        self.books.tree.forget(*(ending.sequence.nodes for ending in endings))
        for ending in endings:
            siblings = ending.sequence.siblings
            heirs = [sibling for sibling in siblings if sibling.finish_reason is None]
            if heirs:  # it ended before they forked: the next one computes the prompt
                heirs[0].siblings = heirs[1:]
                self.books.waiting.put_back(heirs[0])

    def requests_of(self, step: Step) -> list[str]:
        """Ids of the requests that have rows in the newest Step."""
        sequences = (self.books.slots.sequences[slot] for slot in step.slots.tolist())
        return list(dict.fromkeys(s.request.id for s in sequences if s is not None))

    def constrained_draws(self, step: Step) -> list[tuple[int, Sequence]]:
        """(index of the draw, sequence) of the newest Step's draws that a grammar restricts."""
        is_constrained = self.books.slots.constrained[step.sample_slots]
        return [
            (index, self.books.occupant(step.sample_slots[index]))
            for index in np.flatnonzero(is_constrained).tolist()
        ]

    def requeue_running(self) -> None:
        """A Step could not be computed: everything that runs goes back to waiting.

        Nothing is expected of Steps handed out, and no block is shared any more: what a failed
        Step has written cannot be trusted. Sequences keep the tokens that are known.
        """
        books = self.books
        self._in_flight.clear()
        self._intake.forget_late()
        books.waiting.forget_in_flight()
        for slot in books.slots.running.tolist():
            books.move_to_waiting(slot, keep_prefix=False).num_in_flight = 0
        books.forget_kept()
        books.builder.reset()

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Begin anew with these sequences (and their siblings), none of which has started.

        For a caller who was interrupted, perhaps while the books were being changed.
        """
        self._make_books()
        self.books.builder.reset()
        for sequence in sequences:
            self._register(sequence)
            self.books.waiting.put_back(sequence)

    def admit_only(self, request_ids: frozenset[str] | None) -> None:
        """Start only sequences of these requests, all of which wait or run; None: of all again.

        While it is set the plan is not asked. To be called when no other sequence runs.
        """
        self.books.waiting.admit_only(request_ids)

    def check_integrity(self) -> None:
        """Raise AssertionError if a KV block is lost or held twice."""
        self.books.check_integrity()

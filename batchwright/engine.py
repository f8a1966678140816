"""Engine: requests in, results out. Schedule, execute, update, repeat.

It ties the scheduler to an executor and keeps what neither should know: which sequences belong to
which request, stop strings, log-probabilities, text.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from batchwright.errors import ConfigError, RequestError, ResourceError
from batchwright.exec.executor import Executor
from batchwright.exec.memory import is_out_of_memory
from batchwright.folding import Folding, answer_as, fold_key
from batchwright.limits import ModelLimits
from batchwright.outputs import (
    RunningRequest,
    Stream,
    cancelled,
    failed,
    make_result,
)
from batchwright.plan.cost import ModelShape
from batchwright.recovery import Isolation, describe, internal_error
from batchwright.request import FinishReason, Request, Result, Task
from batchwright.sampling.noise import noise_key
from batchwright.sched.intake import SchedulerStats, Update
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import NO_SLOT, Sequence
from batchwright.step import Step, StepResult
from batchwright.structured.compile import CompiledGrammar, GrammarCompiler
from batchwright.structured.masks import with_masks
from batchwright.text.tokenizer import Tokenizer
from batchwright.watchdog import Watchdog

logger = logging.getLogger(__name__)

HORIZON = 4096
"""Rows `run` keeps in the engine at once: enough to see shared prefixes, bounded in memory."""


class EngineLoad(NamedTuple):
    """How busy an engine is: sequences that run and that wait, and the share of blocks in use.

    The share is that of the KV group that is fullest.
    """

    num_running_seqs: int
    num_waiting_seqs: int
    kv_used_fraction: float


class Engine:
    """Continuous batching over any source of requests.

    Args:
        scheduler: decides the Steps.
        executor: computes them.
        tokenizer: end tokens and text.
        max_model_len: most tokens of a sequence, prompt and output.
        vocab_size: token ids are below it.
        job_seed: keys the randomness of rows without a seed of their own.
        look_ahead: Steps handed out before the oldest result is read (0 or 1).
        grammars: compiles what structured output asks for; None refuses such requests.
        shape: the model's sizes, for reports.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int,
        job_seed: int = 0,
        look_ahead: int = 0,
        grammars: GrammarCompiler | None = None,
        shape: ModelShape | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._tokenizer = tokenizer
        self._limits = ModelLimits(max_model_len, vocab_size)
        self._job_seed = job_seed
        self._look_ahead = look_ahead
        self.grammars = grammars
        self.shape = shape
        self._requests: dict[str, RunningRequest] = {}
        self._outstanding: deque[StepResult] = deque()
        self._num_added = 0
        self._done: dict[str, Result] = {}  # results not returned yet, by request
        self._is_running = False  # between the first and the last result of a `run`
        self._folding = Folding()
        self._isolation = Isolation()
        self._watchdog = Watchdog()
        self._is_torn = False  # a round was interrupted; the books may contradict each other
        self._resource_error: ResourceError | None = None

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt and output."""
        return self._limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._limits.vocab_size

    @property
    def stats(self) -> SchedulerStats:
        """Counts since the start."""
        return self._scheduler.stats

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        pools = [table.pool for table in self._scheduler.tables]
        num_running = self._scheduler.slots.num_running
        return EngineLoad(
            num_running_seqs=num_running,
            num_waiting_seqs=self._scheduler.num_unfinished - num_running,
            kv_used_fraction=max(1 - pool.num_free / pool.num_blocks for pool in pools),
        )

    @property
    def num_unfinished(self) -> int:
        """Requests added whose result has not been returned."""
        return len(self._requests) + len(self._folding) + len(self._done)

    def add(self, request: Request) -> None:
        """Take a request in; its result comes out of a later `step`.

        A request that asks for the same computation as another one, in flight or finished
        recently, gets that one's result (`folding.py`).

        Raises:
            RequestError: it can never run (too long, unknown token ids, id in use, a grammar that
                does not compile).
        """
        self._mend()
        if request.id in self._requests or request.id in self._folding or request.id in self._done:
            raise RequestError(
                f"id {request.id!r} is already running; ids must be unique",
                code="duplicate_custom_id",
            )
        key = fold_key(request)
        if key is not None:
            if (result := self._folding.recall(key)) is not None:
                self._answer_as(request, result)
                return
            if self._folding.follow(key, request):
                return
        max_len = self._limits.check(request)
        sequences = [self._sequence(request, index, max_len) for index in range(self._num(request))]
        first = sequences[0]
        first.siblings = sequences[1:]
        streams = [Stream(sequence) for sequence in sequences]
        running = RunningRequest(request, streams, grammar=self._grammar(request))
        running.start_over(self._tokenizer)
        self._scheduler.add(first)
        self._requests[request.id] = running
        if key is not None:
            self._folding.lead(key, request.id)

    def step(self) -> list[Result]:
        """One round: compute a Step if there is one; returns the results that are complete.

        Whatever goes wrong inside ends as the result of the request that is to blame.
        KeyboardInterrupt and SystemExit pass; the engine can be used afterwards.

        Raises:
            ResourceError: memory does not suffice for one row. Nothing is lost; a later call
                tries again.
        """
        self._mend()
        self._is_torn = True
        try:
            self._round()
        except Exception as error:  # not in a Step, so the books may be torn
            if not self._requests:
                raise
            suspects = self._started()
            self._start_over()
            self._recover(error, suspects)
        self._is_torn = False
        lack, self._resource_error = self._resource_error, None
        done = list(self._done.values())
        if lack is not None and not done:  # else the next call fails in the same way
            raise lack
        self._done = {}  # last: an interrupt before it loses nothing
        return done

    def _round(self) -> None:
        while len(self._outstanding) <= self._look_ahead:
            step = self._next_step()
            if step is None:
                break
            try:
                result = self._execute(step)
            except Exception as error:  # noqa: BLE001 - recovery finds the row that causes it
                suspects = self._scheduler.requests_of(step)
                self._outstanding.clear()
                self._scheduler.requeue_running()
                self._recover(error, suspects)
                return
            self._outstanding.append(result)
        if self._outstanding:
            result = self._outstanding.popleft()
            self._take(self._scheduler.update(result), result)
        else:
            assert not self._requests, "requests are left but nothing can run"

    def _next_step(self) -> Step | None:
        step = self._scheduler.schedule()
        while step is None and not self._outstanding and self._isolation.group is not None:
            self._isolation.end_group()
            self._scheduler.admit_only(self._isolation.group)
            step = self._scheduler.schedule()
        return step

    def _execute(self, step: Step) -> StepResult:
        step = self._masked(step)
        self._watchdog.begin(step.num_tokens, step.num_rows)
        try:
            return self._executor.execute(step)
        finally:
            self._watchdog.end()

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results of all requests as they finish, reading ahead at most HORIZON rows.

        A request the engine refuses yields a result with its error. Closing the iterator early
        ends what has not finished.

        Raises:
            ConfigError: another run of this engine is not finished.
        """
        if self._requests or self._is_running:
            raise ConfigError(
                "this engine is still running other requests; finish or close their results first"
            )
        source = iter(requests)
        exhausted = False
        self._is_running = True
        try:
            while True:
                while not exhausted and self.num_unfinished < HORIZON:
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                        break
                    try:
                        self.add(request)
                    except RequestError as error:
                        yield failed(request, error)
                if not self.num_unfinished:
                    return
                yield from self.step()
        finally:
            self._is_running = False
            self._abandon()

    def _abandon(self) -> None:
        """End everything; nobody reads the results."""
        if self._scheduler.num_unfinished or self._outstanding or self._is_torn:
            self._outstanding.clear()
            self._scheduler.restart([])
        self._requests.clear()
        self._done.clear()
        self._isolation.clear()
        self._folding = Folding()
        self._resource_error, self._is_torn = None, False

    def waiting_ids(self) -> list[str]:
        """Requests none of whose sequences has started, and those that wait for their results."""
        waiting = [
            request_id
            for request_id, running in self._requests.items()
            if all(stream.sequence.num_cached_tokens is None for stream in running.streams)
        ]
        followers = (f.id for leader in waiting for f in self._folding.followers(leader))
        return [*waiting, *followers]

    def cancel(self, request_id: str) -> None:
        """End a request now; its result, with what there is of it, comes out of a later `step`.

        Identical requests are not affected: one of them takes over what has been computed.
        """
        self._mend()
        if request_id in self._done:
            return  # its result is on its way
        if request_id in self._folding:
            self._done[request_id] = cancelled(self._folding.leave(request_id))
            return
        running = self._requests[request_id]
        heir = self._folding.hand_over(request_id)
        if heir is not None:
            self._done[request_id] = cancelled(running.request)
            self._replace(running, heir)
            return
        for stream in running.streams:
            if stream.sequence.finish_reason is None:
                self._scheduler.finish(stream.sequence, FinishReason.CANCELLED)
                self._finish(stream.sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError if a KV block is lost or held twice."""
        self._mend()
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Give back the executor's memory."""
        self._watchdog.close()
        if self.grammars is not None:
            self.grammars.close()
        self._executor.close()

    # Taking requests in ----------------------------------------------------------------------

    @staticmethod
    def _num(request: Request) -> int:
        return request.params.n if request.task is Task.GENERATE else 1

    def _sequence(self, request: Request, index: int, max_len: int) -> Sequence:
        params = request.params
        ends = () if params.ignore_eos else self._tokenizer.end_token_ids
        if params.stop_token_ids:
            ends = tuple(dict.fromkeys((*ends, *params.stop_token_ids)))
        sequence = Sequence(
            request=request,
            order=self._num_added,
            sample_index=index,
            end_token_ids=tuple(ends),
            noise_key=noise_key(params.seed, self._job_seed, request.id),
            max_len=max_len,
            token_ids=request.prompt_token_ids,
        )
        self._num_added += 1
        return sequence

    def _grammar(self, request: Request) -> CompiledGrammar | None:
        spec = request.params.grammar
        if spec is None or request.task is not Task.GENERATE:
            return None
        if self.grammars is None:
            raise RequestError("structured output is not available here; remove it")
        return self.grammars.compile(spec)

    def _masked(self, step: Step) -> Step:
        """The newest Step with masks for the sequences that have a grammar."""
        draws = []
        for index, sequence in self._scheduler.constrained_draws(step):
            matcher = self._requests[sequence.request.id].streams[sequence.sample_index].matcher
            assert matcher is not None
            draws.append((index, matcher))
        return with_masks(step, draws) if draws else step

    # When something fails --------------------------------------------------------------------

    def _recover(self, error: Exception, suspects: list[str]) -> None:
        """A step with rows of `suspects` failed; everything waits again. Decide what runs next."""
        if is_out_of_memory(error):
            self._take_less_memory(error)
        else:
            culprit = self._isolation.failed(suspects, self._requests)
            logger.warning(
                "a step with rows of %d requests failed (%s); %s",
                len(suspects),
                describe(error),
                "they run again in smaller groups" if culprit is None else f"row {culprit!r} fails",
            )
            logger.debug("the failed step", exc_info=error)
            if culprit is not None:
                self._fail(culprit, error)
        self._scheduler.admit_only(self._isolation.group)

    def _take_less_memory(self, error: Exception) -> None:
        """Out of memory is no row's fault: go on with smaller batches, if there are any."""
        scheduler = self._scheduler
        if scheduler.halve_limits():
            logger.warning(
                "memory ran out (%s); going on with at most %d rows and %d tokens in a step",
                describe(error),
                scheduler.max_running,
                scheduler.max_num_batched_tokens,
            )
            return
        self._resource_error = ResourceError(
            f"memory does not suffice for one row in steps of {scheduler.max_num_batched_tokens} "
            f"tokens ({describe(error)}); give less memory to keys and values, use a smaller "
            "model or free memory; finished rows are kept"
        )
        self._resource_error.__cause__ = error

    def _fail(self, request_id: str, error: Exception) -> None:
        """End a request with an internal error, and those that wait for its result."""
        running = self._requests[request_id]
        for stream in running.streams:
            if stream.sequence.finish_reason is None:
                self._scheduler.finish(stream.sequence, FinishReason.ERROR)
        self._answer(running, failed(running.request, internal_error(error)))

    def _mend(self) -> None:
        """After an interrupted round, begin anew with what has not been answered."""
        if self._is_torn:
            self._start_over()
            self._scheduler.admit_only(self._isolation.group)
            self._is_torn = False

    def _start_over(self) -> None:
        """All requests run again from their prompts. Draws do not change by that."""
        self._outstanding.clear()
        for request_id, result in list(self._done.items()):
            if request_id in self._requests:  # interrupted while it was being answered
                self._answer(self._requests[request_id], result)
        for running in self._requests.values():
            sequences = [stream.sequence for stream in running.streams]
            for sequence in sequences:
                sequence.start_over()
            sequences[0].siblings = sequences[1:]
            running.start_over(self._tokenizer)
        self._scheduler.restart(r.streams[0].sequence for r in self._requests.values())

    def _started(self) -> list[str]:
        """Requests that a failure outside of a Step may be due to: those that have started."""
        allowed = self._isolation.group
        open_ids = [i for i in self._requests if i not in self._done]
        candidates = [i for i in open_ids if allowed is None or i in allowed]
        started = [
            request_id
            for request_id in candidates
            for sequence in (stream.sequence for stream in self._requests[request_id].streams)
            if sequence.slot != NO_SLOT or sequence.finish_reason is not None
        ]
        return list(dict.fromkeys(started)) or candidates

    def _replace(self, running: RunningRequest, heir: Request) -> None:
        """Let a request go on as an identical one."""
        old = running.request.id
        del self._requests[old]
        running.request = heir
        for stream in running.streams:
            stream.sequence.request = heir
        self._requests[heir.id] = running
        if self._isolation.group is not None:
            self._isolation.replace(old, heir.id)
            self._scheduler.admit_only(self._isolation.group)

    # Taking results in -----------------------------------------------------------------------

    def _take(self, update: Update, result: StepResult) -> None:
        for sequence, position, first, end in update.scored:
            self._requests[sequence.request.id].take_scores(position, first, end, result)
        for sequence, slot in update.pooled:
            assert result.embeddings is not None
            self._requests[sequence.request.id].embedding = result.embeddings[slot]
        # last: a stop string may complete the request
        for sequence, line in update.watched:
            if sequence.request.id in self._requests:
                self._watch(sequence, line, result)
        for sequence in update.finished:
            self._finish(sequence)

    def _watch(self, sequence: Sequence, line: int, result: StepResult) -> None:
        """Let a request look at a token of its own; it may end with it."""
        running = self._requests[sequence.request.id]
        try:
            is_whole, stop = running.take_token(sequence.sample_index, line, result)
        except Exception as error:  # noqa: BLE001 - text of this row only; the row fails
            self._fail(sequence.request.id, error)
            return
        if is_whole and sequence.finish_reason is None:
            self._scheduler.finish(sequence, FinishReason.STOP, stop)
            self._finish(sequence)
        elif is_whole and sequence.finish_reason is FinishReason.LENGTH:
            sequence.finish_reason = FinishReason.STOP  # with the last token it was allowed

    def _finish(self, sequence: Sequence) -> None:
        running = self._requests.get(sequence.request.id)
        if running is None:  # it has failed while its last results were taken in
            return
        running.num_unfinished -= 1
        if running.num_unfinished:
            return
        try:
            result = make_result(running, self._tokenizer)
        except Exception as error:  # noqa: BLE001 - text of this row only; the row fails
            result = failed(running.request, internal_error(error))
        self._answer(running, result)

    def _answer(self, running: RunningRequest, result: Result) -> None:
        """A request has its result, and so have those that follow it.

        That holds for errors too. A leader that failed has failed at least twice, once alone; an
        identical row would do the same and hold everybody up again.
        """
        request_id = running.request.id
        self._done[request_id] = result
        for follower in self._folding.followers(request_id):
            self._answer_as(follower, result)
        self._folding.close(request_id, result)
        del self._requests[request_id]

    def _answer_as(self, request: Request, result: Result) -> None:
        self._done[request.id] = answer_as(request, result)
        self.stats.num_folded += 1

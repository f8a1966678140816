"""Engine: requests in, results out. Schedule, execute, update, repeat.

It ties the scheduler to an executor. What neither should know (which sequences belong to which
request, stop strings, log-probabilities, text) is kept in `open_requests.py`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from batchwright.errors import ConfigError, RankError, RequestError, ResourceError
from batchwright.exec.executor import Executor, PendingResult
from batchwright.exec.memory import is_out_of_memory
from batchwright.folding import fold_key
from batchwright.length_questions import LengthQuestions
from batchwright.limits import ModelLimits
from batchwright.open_requests import OpenRequests
from batchwright.outputs import RunningRequest, Stream, failed
from batchwright.parts import Parts
from batchwright.plan.lengths.self_report import Predictor as SelfReport
from batchwright.plan.order import OrderFunction
from batchwright.plan.shape import ModelShape
from batchwright.recovery import Isolation, describe
from batchwright.request import Request, Result, Task
from batchwright.run_through import run_through
from batchwright.sampling.noise import noise_key
from batchwright.sched.intake import SchedulerStats
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence
from batchwright.step import Step, StepResult
from batchwright.structured.masks import with_masks
from batchwright.text.tokenizer import Tokenizer
from batchwright.watchdog import Watchdog

if TYPE_CHECKING:  # the engine runs without what compiles grammars
    from batchwright.structured.compile import CompiledGrammar, GrammarCompiler

logger = logging.getLogger(__name__)

HORIZON = 4096
"""Rows `run` keeps in the engine at once: enough to see shared prefixes, bounded in memory."""

URGENT_LEAD = 2**62
"""How far ahead of all others, in the order of sequences, those of urgent requests are."""


class EngineLoad(NamedTuple):
    """How busy an engine is: sequences that run and that wait, and the share of blocks in use.

    The share is that of the KV group that is fullest. `helper_bytes` is the most memory that
    processes beside this one have had for themselves.
    """

    num_running_seqs: int
    num_waiting_seqs: int
    kv_used_fraction: float
    helper_bytes: int = 0


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
        expected = scheduler.expected
        self._questions: LengthQuestions | None = None
        if isinstance(expected.predictor, SelfReport):
            self._questions = LengthQuestions(expected.predictor, expected, tokenizer, self._limits)
        self._open = OpenRequests(scheduler, tokenizer)
        self.shape = shape
        self._outstanding: deque[tuple[Step, PendingResult]] = deque()
        self._num_added = 0
        self._is_running = False  # between the first and the last result of a `run`
        self._parts = Parts()
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
    def order(self) -> OrderFunction:
        """In which order requests are started."""
        return self._scheduler.order

    @property
    def stats(self) -> SchedulerStats:
        """Counts since the start."""
        return self._scheduler.stats

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        pools = [table.pool for table in self._scheduler.books.tables]
        num_running = self._scheduler.books.slots.num_running
        return EngineLoad(
            num_running_seqs=num_running,
            num_waiting_seqs=max(self._scheduler.num_unfinished - num_running, 0),
            kv_used_fraction=max(1 - pool.num_free / pool.num_blocks for pool in pools),
        )

    @property
    def num_unfinished(self) -> int:
        """Requests added whose result has not been returned."""
        return len(self._open)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open or request_id in self._parts

    def add(self, request: Request) -> None:
        """Take a request in; its result comes out of a later `step`.

        A request that asks for the same computation as another one, in flight or finished
        recently, gets that one's result (`folding.py`).

        Raises:
            RequestError: it can never run (too long, unknown token ids, id in use, a grammar that
                does not compile).
        """
        self._mend()
        if request.id in self:
            raise RequestError(
                f"id {request.id!r} is already running; ids must be unique",
                code="duplicate_custom_id",
            )
        if request.parts:
            self._add_parts(request)
            return
        key = fold_key(request)
        if key is not None and self._open.fold(key, request):
            return
        max_len = self._limits.check(request)
        sequences = [self._sequence(request, index, max_len) for index in range(self._num(request))]
        sequences[0].siblings = sequences[1:]
        streams = [Stream(sequence) for sequence in sequences]
        running = RunningRequest(request, streams, grammar=self._grammar(request))
        self._open.open(running, key)
        if self._questions is not None and (question := self._questions.ask_about(sequences[0])):
            asking = self._sequence(question, 0, self._limits.check(question))
            self._open.open(
                RunningRequest(question, [Stream(asking)], grammar=None), None, is_first=True
            )

    def _add_parts(self, request: Request) -> None:
        """A part that cannot run ends its request in the next `step`."""
        self._parts.open(request)
        for part in request.parts:
            try:
                self.add(part)
            except RequestError as error:
                self._open.done[part.id] = failed(part, error)

    def note_earlier(self, request: Request, num_output: int) -> None:
        """A request that is not run here has had so many output tokens a sequence: what is like it
        may be about as long."""
        try:
            max_len = self._limits.check(request)
        except RequestError:
            return
        most = max_len - request.num_prompt_tokens
        if 0 < num_output <= most and request.params.least_output(most) < most:
            self._scheduler.expected.note_earlier(request.prompt_token_ids, most, num_output)

    def step(self) -> list[Result]:
        """One round: compute a Step if there is one; returns the results that are complete.

        Whatever goes wrong inside ends as the result of the request that is to blame.
        KeyboardInterrupt and SystemExit pass; the engine can be used afterwards.

        Raises:
            ResourceError: memory does not suffice for one row. Nothing is lost; a later call
                tries again.
            RankError: a process that has a part of the model is gone. Nothing is lost, but nothing
                can be computed any more.
        """
        self._mend()
        self._is_torn = True
        try:
            self._round()
        except Exception as error:  # not in a Step, so the books may be torn
            if not self._open.running:
                raise
            suspects = self._open.started(self._isolation.group)
            self._start_over()
            self._recover(error, suspects)
        self._is_torn = False
        lack, self._resource_error = self._resource_error, None
        if self._questions is not None:
            self._open.done = self._questions.take(self._open.done)
        if self._parts:
            self._join_parts()
        done = list(self._open.done.values())
        if lack is not None and not done:  # else the next call fails in the same way
            raise lack
        self._open.done = {}  # last: an interrupt before it loses nothing
        return done

    def _join_parts(self) -> None:
        """Put results of whole requests in the place of their parts' results.

        An interrupt anywhere loses nothing: taking results in again does no harm.
        """
        needless: list[str] | None = None
        while needless is None or needless:
            whole, needless = self._parts.take(self._open.done.values())
            self._open.done = {result.request_id: result for result in whole}
            self._parts.close(whole)
            for request_id in needless:
                self.cancel(request_id)  # its result is there at once

    def _round(self) -> None:
        while len(self._outstanding) <= self._look_ahead:
            step = self._next_step()
            if step is None:
                break
            try:
                pending = self._execute(step)
            except Exception as error:  # noqa: BLE001 - recovery finds the row that causes it
                self._step_failed(step, error)
                return
            self._outstanding.append((step, pending))
        if self._outstanding:
            step, pending = self._outstanding.popleft()
            try:
                result = self._wait(step, pending)
            except Exception as error:  # noqa: BLE001 - a device tells late
                self._step_failed(step, error)
                return
            self._open.take(self._scheduler.update(result), result)
        else:
            assert not self._open.running, "requests are left but nothing can run"

    def _step_failed(self, step: Step, error: Exception) -> None:
        """Everything waits again; the rows that now are where the step's were are suspects."""
        suspects = [
            request_id
            for request_id in self._scheduler.requests_of(step)
            if request_id in self._open.running  # an encoder may outlive its row
        ]
        self._outstanding.clear()
        self._scheduler.requeue_running()
        self._recover(error, suspects)

    def _next_step(self) -> Step | None:
        step = self._scheduler.schedule()
        while step is None and not self._outstanding and self._isolation.group is not None:
            self._isolation.end_group()
            self._scheduler.admit_only(self._isolation.group)
            step = self._scheduler.schedule()
        return step

    def _execute(self, step: Step) -> PendingResult:
        step = self._masked(step)
        self._watchdog.begin(step.num_tokens, step.num_rows)
        try:
            return self._executor.execute(step)
        finally:
            self._watchdog.end()

    def _wait(self, step: Step, pending: PendingResult) -> StepResult:
        if isinstance(pending, StepResult):
            return pending
        self._watchdog.begin(step.num_tokens, step.num_rows)
        try:
            return pending.wait()
        finally:
            self._watchdog.end()

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results of all requests as they finish, reading ahead at most HORIZON rows.

        A request the engine refuses yields a result with its error. Closing the iterator early
        ends what has not finished.

        Raises:
            ConfigError: another run of this engine is not finished.
        """
        if self._open.running or self._is_running:
            raise ConfigError(
                "this engine is still running other requests; finish or close their results first"
            )
        self._is_running = True
        try:
            yield from run_through(self, requests, HORIZON)
        finally:
            self._is_running = False
            self.abandon()

    def abandon(self) -> None:
        """End everything; nobody reads the results. The engine can be used again."""
        if self._scheduler.num_unfinished or self._outstanding or self._is_torn:
            self._outstanding.clear()
            self._scheduler.restart([])
        self._open.clear()
        self._isolation.clear()
        self._scheduler.admit_only(None)
        self._parts = Parts()
        if self._questions is not None:
            self._questions.clear()
        self._resource_error, self._is_torn = None, False

    def waiting_ids(self) -> list[str]:
        """Requests none of whose sequences has started, and those that wait for their results."""
        waiting = self._open.waiting_ids()
        if self._questions is not None:
            waiting = [request_id for request_id in waiting if request_id not in self._questions]
        return self._parts.waiting(waiting)

    def cancel(self, request_id: str) -> None:
        """End a request now; its result, with what there is of it, comes out of a later `step`.

        Identical requests are not affected: one of them takes over what has been computed.
        """
        self._mend()
        if request_id in self._parts:
            for part in self._parts.missing(request_id):
                self.cancel(part)
            return
        heir = self._open.cancel(request_id)
        if heir is not None and self._isolation.group is not None:
            self._isolation.replace(request_id, heir)
            self._scheduler.admit_only(self._isolation.group)

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
            order=self._num_added - (URGENT_LEAD if request.urgent else 0),
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
            matcher = self._open.running[sequence.request.id].streams[sequence.sample_index].matcher
            assert matcher is not None
            draws.append((index, matcher))
        return with_masks(step, draws) if draws else step

    # When something fails --------------------------------------------------------------------

    def _recover(self, error: Exception, suspects: list[str]) -> None:
        """A step with rows of `suspects` failed; everything waits again. Decide what runs next."""
        if isinstance(error, RankError):
            self._resource_error = error  # no row's fault, and nothing can run
        elif is_out_of_memory(error):
            self._take_less_memory(error)
        else:
            culprit = self._isolation.failed(suspects, self._open.running)
            logger.warning(
                "a step with rows of %d requests failed (%s); %s",
                len(suspects),
                describe(error),
                "they run again in smaller groups" if culprit is None else f"row {culprit!r} fails",
            )
            logger.debug("the failed step", exc_info=error)
            if culprit is not None:
                self._open.fail(culprit, error)
        self._scheduler.admit_only(self._isolation.group)

    def _take_less_memory(self, error: Exception) -> None:
        """Out of memory is no row's fault: go on with smaller batches, if there are any."""
        limits = self._scheduler.limits
        if limits.halve():
            logger.warning(
                "memory ran out (%s); going on with at most %d rows and %d tokens in a step",
                describe(error),
                limits.max_running,
                limits.max_tokens,
            )
            return
        self._resource_error = ResourceError(
            f"memory does not suffice for one row in steps of {limits.max_tokens} "
            f"tokens ({describe(error)}); give less memory to keys and values, use a smaller "
            "model or free memory; finished rows are kept"
        )
        self._resource_error.__cause__ = error

    def _mend(self) -> None:
        """After an interrupted round, begin anew with what has not been answered."""
        if self._is_torn:
            self._start_over()
            self._scheduler.admit_only(self._isolation.group)
            self._is_torn = False

    def _start_over(self) -> None:
        """All requests run again from their prompts."""
        self._outstanding.clear()
        self._scheduler.restart(self._open.start_over())

"""Engine: requests in, results out. Schedule, execute, update, repeat.

It ties the scheduler to an executor and keeps what neither should know: which sequences belong to
which request, stop strings, log-probabilities, text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from batchwright.errors import ConfigError, RequestError
from batchwright.exec.executor import Executor
from batchwright.outputs import RunningRequest, Stream, failed, make_result, token_logprobs
from batchwright.request import (
    DEFAULT_MAX_TOKENS,
    FinishReason,
    Request,
    Result,
    SamplingParams,
    Task,
)
from batchwright.sampling.noise import noise_key
from batchwright.sched.intake import SchedulerStats, Update
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence
from batchwright.step import StepResult
from batchwright.text.detokenizer import StopStringChecker
from batchwright.text.tokenizer import Tokenizer

HORIZON = 4096
"""Rows `run` keeps in the engine at once: enough to see shared prefixes, bounded in memory."""


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
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._job_seed = job_seed
        self._look_ahead = look_ahead
        self._requests: dict[str, RunningRequest] = {}
        self._outstanding: deque[StepResult] = deque()
        self._num_added = 0
        self._done: list[Result] = []
        self._is_running = False  # between the first and the last result of a `run`

    @property
    def stats(self) -> SchedulerStats:
        """Counts since the start."""
        return self._scheduler.stats

    @property
    def num_unfinished(self) -> int:
        """Requests added whose result has not been returned."""
        return len(self._requests) + len(self._done)

    def add(self, request: Request) -> None:
        """Take a request in; its result comes out of a later `step`.

        Raises:
            RequestError: it can never run (too long, unknown token ids, id in use).
        """
        if request.id in self._requests:
            raise RequestError(
                f"id {request.id!r} is already running; ids must be unique",
                code="duplicate_custom_id",
            )
        max_len = self._max_len(request)
        self._check_token_ids(request.params)
        sequences = [self._sequence(request, index, max_len) for index in range(self._num(request))]
        first = sequences[0]
        first.siblings = sequences[1:]
        if request.task is Task.SCORE and max_len <= request.score_start:
            raise RequestError("there is no token to score; give a non-empty continuation")
        self._scheduler.add(first)
        streams = [Stream(sequence, self._stop_checker(request)) for sequence in sequences]
        self._requests[request.id] = RunningRequest(request, streams, len(streams))

    def step(self) -> list[Result]:
        """One round: compute a Step if there is one; returns the results that are complete."""
        while len(self._outstanding) <= self._look_ahead:
            step = self._scheduler.schedule()
            if step is None:
                break
            self._outstanding.append(self._executor.execute(step))
        if self._outstanding:
            result = self._outstanding.popleft()
            self._take(self._scheduler.update(result), result)
        else:
            assert not self._requests, "requests are left but nothing can run"
        done, self._done = self._done, []
        return done

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
        for request_id in list(self._requests):
            self.cancel(request_id)
        self._done.clear()
        self._outstanding.clear()
        self._scheduler.forget_in_flight()

    def waiting_ids(self) -> list[str]:
        """Requests none of whose sequences has started."""
        return [
            request_id
            for request_id, running in self._requests.items()
            if all(stream.sequence.num_cached_tokens is None for stream in running.streams)
        ]

    def cancel(self, request_id: str) -> None:
        """End a request now; its result, with what there is of it, comes out of a later `step`."""
        for stream in self._requests[request_id].streams:
            if stream.sequence.finish_reason is None:
                self._scheduler.finish(stream.sequence, FinishReason.CANCELLED)
                self._finish(stream.sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError if a KV block is lost or held twice."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Give back the executor's memory."""
        self._executor.close()

    # Taking requests in ----------------------------------------------------------------------

    @staticmethod
    def _num(request: Request) -> int:
        return request.params.n if request.task is Task.GENERATE else 1

    def _max_len(self, request: Request) -> int:
        """Tokens at which the request's sequences end; checks the prompt."""
        num_prompt, token_ids = len(request.prompt_token_ids), request.prompt_token_ids
        if not num_prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if (wrong := (token_ids < 0) | (token_ids >= self.vocab_size)).any():
            index = int(wrong.argmax())
            raise RequestError(
                f"prompt has token id {token_ids[index]} at index {index}; "
                f"the model's are 0 to {self.vocab_size - 1}",
                param="prompt",
            )
        generates = request.task is Task.GENERATE
        limit = self.max_model_len - 1 if generates else self.max_model_len
        if num_prompt > limit:
            raise RequestError(
                f"prompt has {num_prompt} tokens, model allows {limit}"
                f"{' and one to generate' if generates else ''}; shorten it "
                f"(custom_id={request.id})",
                code="context_length_exceeded",
                param="prompt",
            )
        if not generates:
            return num_prompt
        max_tokens = request.params.max_tokens or DEFAULT_MAX_TOKENS
        return min(num_prompt + max_tokens, self.max_model_len)

    def _check_token_ids(self, params: SamplingParams) -> None:
        for param in ("logit_bias", "stop_token_ids"):
            for token_id in getattr(params, param):
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(
                        f"{param} names token id {token_id}; the model's ids are "
                        f"0 to {self.vocab_size - 1}",
                        param=param,
                    )

    def _sequence(self, request: Request, index: int, max_len: int) -> Sequence:
        params = request.params
        ends = () if params.ignore_eos else self._tokenizer.end_token_ids
        sequence = Sequence(
            request=request,
            order=self._num_added,
            sample_index=index,
            end_token_ids=tuple(dict.fromkeys((*ends, *params.stop_token_ids))),
            noise_key=noise_key(params.seed, self._job_seed, request.id),
            max_len=max_len,
            token_ids=request.prompt_token_ids,
        )
        self._num_added += 1
        return sequence

    def _stop_checker(self, request: Request) -> StopStringChecker | None:
        if not request.params.stop:
            return None
        return StopStringChecker(self._tokenizer, request.params)

    # Taking results in -----------------------------------------------------------------------

    def _take(self, update: Update, result: StepResult) -> None:
        for sequence, position, first, end in update.scored:
            assert result.score_logprobs is not None
            running = self._requests[sequence.request.id]
            targets = running.request.prompt_token_ids[position : position + end - first]
            num_top = running.request.params.prompt_logprobs
            lines = token_logprobs(targets.tolist(), result.score_logprobs, first, num_top or 0)
            running.scores.update(enumerate(lines, start=position))
        for sequence, slot in update.pooled:
            assert result.embeddings is not None
            self._requests[sequence.request.id].embedding = result.embeddings[slot]
        # last: a stop string may complete the request
        for sequence, line in update.watched:
            self._watch(sequence, line, result)
        for sequence in update.finished:
            self._finish(sequence)

    def _watch(self, sequence: Sequence, line: int, result: StepResult) -> None:
        """Note a token's log-probability and look for stop strings."""
        running = self._requests[sequence.request.id]
        stream = running.streams[sequence.sample_index]
        if running.request.params.logprobs is not None and result.sample_logprobs is not None:
            num_top = running.request.params.logprobs
            drawn = [int(result.token_ids[line])]
            stream.logprobs += token_logprobs(drawn, result.sample_logprobs, line, num_top)
        if stream.stop_checker is None or result.token_ids[line] < 0:
            return
        stream.stop_match = stream.stop_checker.append([int(result.token_ids[line])])
        if stream.stop_match is not None and sequence.finish_reason is None:
            self._scheduler.finish(sequence, FinishReason.STOP, stream.stop_match.stop)
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        running = self._requests[sequence.request.id]
        running.num_unfinished -= 1
        if not running.num_unfinished:
            del self._requests[sequence.request.id]
            self._done.append(make_result(running, self._tokenizer))

"""Engine: requests in, results out. Schedule, execute, update, repeat.

It ties the scheduler to an executor and keeps what neither should know: which sequences belong to
which request, stop strings, log-probabilities, text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from batchwright.errors import RequestError
from batchwright.exec.executor import Executor
from batchwright.request import (
    DEFAULT_MAX_TOKENS,
    Completion,
    FinishReason,
    Float32Array,
    Request,
    Result,
    SamplingParams,
    Score,
    Task,
    TokenLogprob,
)
from batchwright.sampling.noise import noise_key
from batchwright.sched.scheduler import Scheduler, SchedulerStats, Update
from batchwright.sequence import Sequence
from batchwright.step import StepResult, TokenLogprobs
from batchwright.text.detokenizer import StopMatch, StopStringChecker
from batchwright.text.tokenizer import Tokenizer

HORIZON = 4096
"""Rows `run` keeps in the engine at once: enough to see shared prefixes, bounded in memory."""


@dataclass(slots=True, eq=False)
class _Stream:
    """What the engine collects about one sequence while it runs."""

    sequence: Sequence
    stop_checker: StopStringChecker | None = None
    stop_match: StopMatch | None = None
    num_kept: int | None = None  # output tokens that count, when a stop string ended it
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Running:
    """A request and its parts, until all of them are there."""

    request: Request
    streams: list[_Stream]
    num_unfinished: int
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by position
    embedding: Float32Array | None = None


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
        self._requests: dict[str, _Running] = {}
        self._outstanding: deque[StepResult] = deque()
        self._num_added = 0
        self._done: list[Result] = []

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
        if request.task is Task.SCORE and max_len == request.score_start:
            raise RequestError("there is no token to score; give a non-empty continuation")
        self._scheduler.add(first)
        streams = [_Stream(sequence, self._stop_checker(request)) for sequence in sequences]
        self._requests[request.id] = _Running(request, streams, len(streams))

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

        A request the engine refuses yields a result with its error.
        """
        source = iter(requests)
        exhausted = False
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
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self.vocab_size:
            raise RequestError(
                f"prompt has token ids from {int(token_ids.min())} to {int(token_ids.max())}; "
                f"the model's are 0 to {self.vocab_size - 1}",
                param="prompt",
            )
        generates = request.task is Task.GENERATE
        limit = self.max_model_len - 1 if generates else self.max_model_len
        if num_prompt > limit:
            raise RequestError(
                f"prompt has {num_prompt} tokens, model allows {limit}"
                f"{' and one to generate' if generates else ''}; shorten it (custom_id={request.id})",
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
        for sequence, line in update.watched:
            self._watch(sequence, line, result)
        for sequence, position, first, end in update.scored:
            assert result.score_logprobs is not None
            running = self._requests[sequence.request.id]
            targets = running.request.prompt_token_ids[position : position + end - first]
            lines = token_logprobs(targets.tolist(), result.score_logprobs, first)
            running.prompt_logprobs.update(enumerate(lines, start=position))
        for sequence, slot in update.pooled:
            assert result.embeddings is not None
            self._requests[sequence.request.id].embedding = result.embeddings[slot]
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
        if stream.stop_checker is None:
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
            self._done.append(self._result(running))

    def _result(self, running: _Running) -> Result:
        request, sequences = running.request, [stream.sequence for stream in running.streams]
        result = Result(
            request_id=request.id,
            prompt_token_ids=request.prompt_token_ids.tolist(),
            prompt=request.prompt,
            num_cached_tokens=sequences[0].num_cached_tokens or 0,
        )
        if any(sequence.finish_reason is FinishReason.ERROR for sequence in sequences):
            result.error = RequestError(
                "the model's logits were not numbers; check the weights and the prompt",
                code="invalid_logits",
            )
            return result
        if request.params.prompt_logprobs is not None and request.task is Task.GENERATE:
            entries = running.prompt_logprobs
            num_prompt = len(request.prompt_token_ids)
            result.prompt_logprobs = [entries.get(position) for position in range(num_prompt)]
        if request.task is Task.GENERATE:
            result.outputs = [self._completion(stream, request) for stream in running.streams]
        elif request.task is Task.SCORE:
            result.score = score(running.prompt_logprobs)
        else:
            result.embedding = running.embedding
        return result

    def _completion(self, stream: _Stream, request: Request) -> Completion:
        sequence, params = stream.sequence, request.params
        assert sequence.finish_reason is not None
        token_ids = sequence.token_ids[sequence.num_prompt_tokens :].tolist()
        reason, stop_reason = sequence.finish_reason, sequence.stop_reason
        if stream.stop_match is not None:
            token_ids = token_ids[: stream.stop_match.num_tokens]
            text, reason, stop_reason = stream.stop_match.text, FinishReason.STOP, stream.stop_match.stop
        else:
            visible = token_ids
            if reason is FinishReason.STOP and token_ids and token_ids[-1] == stop_reason:
                visible = token_ids[:-1]  # the token that ended it is no part of the text
            text = self._tokenizer.decode(visible, skip_special_tokens=params.skip_special_tokens)
            if stop_reason in self._tokenizer.end_token_ids:
                stop_reason = None
        wants_logprobs = params.logprobs is not None
        logprobs = stream.logprobs[: len(token_ids)] if wants_logprobs else None
        return Completion(
            index=sequence.sample_index,
            text=text,
            token_ids=token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=logprobs,
            cumulative_logprob=sum(entry.logprob for entry in logprobs) if logprobs else None,
        )


def token_logprobs(
    token_ids: list[int], lines: TokenLogprobs, first: int, num_top: int | None = None
) -> list[TokenLogprob]:
    """Lines of a TokenLogprobs, from `first` on, one per token, with at most num_top rivals."""
    return [
        TokenLogprob(
            token_id,
            float(lines.logprobs[line]),
            int(lines.ranks[line]),
            tuple(
                zip(
                    lines.top_ids[line, :num_top].tolist(),
                    lines.top_logprobs[line, :num_top].tolist(),
                    strict=True,
                )
            ),
        )
        for line, token_id in enumerate(token_ids, start=first)
    ]


def score(entries: dict[int, TokenLogprob]) -> Score:
    """The score of a request from its scored positions."""
    ordered = [entries[position] for position in sorted(entries)]
    return Score(
        token_logprobs=np.array([entry.logprob for entry in ordered], np.float32),
        is_greedy=all(entry.rank == 1 for entry in ordered),
    )


def failed(request: Request, error: RequestError) -> Result:
    """The result of a request that could not run."""
    return Result(
        request_id=request.id,
        prompt_token_ids=request.prompt_token_ids.tolist(),
        prompt=request.prompt,
        error=error,
    )

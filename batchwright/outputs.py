"""From what an engine collected about a request to its Result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from batchwright.errors import RequestError
from batchwright.repetition import RepetitionChecker
from batchwright.request import (
    Completion,
    FinishReason,
    Float32Array,
    Request,
    Result,
    Score,
    Task,
    TokenLogprob,
)
from batchwright.sequence import Sequence
from batchwright.step import StepResult, TokenLogprobs
from batchwright.text.detokenizer import StopMatch, StopStringChecker
from batchwright.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # an engine runs without what compiles grammars
    from batchwright.structured.compile import CompiledGrammar
    from batchwright.structured.matcher import Matcher


class End(NamedTuple):
    """How a text ends; `stop_reason` as in Completion."""

    reason: FinishReason
    stop_reason: str | None = None


@dataclass(slots=True, eq=False)
class Stream:
    """What is collected about one sequence while it runs."""

    sequence: Sequence
    stop_checker: StopStringChecker | None = None
    stop_match: StopMatch | None = None
    repetition: RepetitionChecker | None = None
    matcher: Matcher | None = None  # has taken exactly the output tokens that are known
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request and its parts, until all of them are there."""

    request: Request
    streams: list[Stream]
    num_unfinished: int = 0
    scores: dict[int, TokenLogprob] = field(default_factory=dict)  # by position in the prompt
    embedding: Float32Array | None = None
    grammar: CompiledGrammar | None = None

    def start_over(self, tokenizer: Tokenizer) -> None:
        """All streams run, and nothing of their outputs is known."""
        params, grammar = self.request.params, self.grammar
        self.num_unfinished = len(self.streams)
        for stream in self.streams:
            stream.stop_checker, stream.stop_match, stream.repetition = None, None, None
            if params.stop:
                stream.stop_checker = StopStringChecker(
                    tokenizer,
                    params,
                    keep=self.request.markup.visible_token_ids,
                    accepts=grammar.accepts if grammar else lambda text: True,
                )
            if params.repetition_detection is not None:
                stream.repetition = RepetitionChecker(
                    params.repetition_detection, params.min_tokens
                )
            stream.matcher = grammar.matcher(params) if grammar else None
            stream.logprobs.clear()

    def take_scores(self, position: int, first: int, end: int, result: StepResult) -> None:
        """Lines [first, end) of the scores are those of the prompt's tokens from `position` on."""
        assert result.score_logprobs is not None
        targets = self.request.prompt_token_ids[position : position + end - first]
        num_top = self.request.params.prompt_logprobs or 0
        lines = token_logprobs(targets.tolist(), result.score_logprobs, first, num_top)
        self.scores.update(enumerate(lines, start=position))

    def take_token(self, sample_index: int, line: int, result: StepResult) -> End | None:
        """Note a token's log-probability, follow the grammar, look for stop strings and loops.

        Returns:
            How the text ends with this token; None: nothing here ends it.
        """
        stream = self.streams[sample_index]
        token_id = int(result.token_ids[line])
        if self.request.params.logprobs is not None and result.sample_logprobs is not None:
            num_top = self.request.params.logprobs
            stream.logprobs += token_logprobs([token_id], result.sample_logprobs, line, num_top)
        if token_id < 0:
            return None
        if stream.matcher is not None:
            stream.matcher.consume(token_id)
        if stream.stop_checker is not None:
            stream.stop_match = stream.stop_checker.append([token_id])
        if stream.stop_match is not None:
            return End(FinishReason.STOP, stream.stop_match.stop)
        if stream.matcher is not None and stream.matcher.is_complete:
            return End(FinishReason.STOP)
        if stream.repetition is not None and stream.repetition.append(token_id):
            return End(FinishReason.REPETITION, "repetition_detected")
        return None


def make_result(running: RunningRequest, tokenizer: Tokenizer) -> Result:
    """The result of a request whose sequences have all ended."""
    request, sequences = running.request, [stream.sequence for stream in running.streams]
    result = Result(
        request_id=request.id,
        prompt_token_ids=request.prompt_token_ids.tolist(),
        prompt=request.prompt,
        num_cached_tokens=sequences[0].num_cached_tokens or 0,
    )
    reasons = {sequence.finish_reason for sequence in sequences}
    if FinishReason.ERROR in reasons:
        dead_ends = (stream.matcher.error for stream in running.streams if stream.matcher)
        result.error = next(filter(None, dead_ends), None) or RequestError(
            "the model's logits were not numbers; check the weights and the prompt",
            code="invalid_logits",
        )
    elif request.task is Task.GENERATE:
        result.outputs = [_completion(stream, request, tokenizer) for stream in running.streams]
        result.prompt_logprobs = _prompt_logprobs(running)
    elif FinishReason.CANCELLED in reasons:
        result.error = RequestError("the request was cancelled", code="cancelled")
    elif request.task is Task.SCORE:
        result.score = _score(running.scores)
        result.prompt_logprobs = _prompt_logprobs(running)
    else:
        result.embedding = running.embedding
    return result


def cancelled(request: Request) -> Result:
    """The result of a request that was cancelled before anything was computed for it."""
    if request.task is not Task.GENERATE:
        return failed(request, RequestError("the request was cancelled", code="cancelled"))
    return Result(
        request_id=request.id,
        prompt_token_ids=request.prompt_token_ids.tolist(),
        prompt=request.prompt,
        outputs=[
            Completion(index=index, text="", token_ids=[], finish_reason=FinishReason.CANCELLED)
            for index in range(request.params.n)
        ],
    )


def failed(request: Request, error: RequestError) -> Result:
    """The result of a request that could not run."""
    return Result(
        request_id=request.id,
        prompt_token_ids=request.prompt_token_ids.tolist(),
        prompt=request.prompt,
        error=error,
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


def _completion(stream: Stream, request: Request, tokenizer: Tokenizer) -> Completion:
    sequence, params = stream.sequence, request.params
    assert sequence.finish_reason is not None
    token_ids = sequence.token_ids[sequence.num_prompt_tokens :].tolist()
    reason, stop_reason = sequence.finish_reason, sequence.stop_reason
    if stream.stop_match is not None:
        # found in the token that also ended it otherwise, or just before: the string counts
        reason, stop_reason = FinishReason.STOP, stream.stop_match.stop
        token_ids, text = token_ids[: stream.stop_match.num_tokens], stream.stop_match.text
    else:
        visible = token_ids[:-1] if isinstance(stop_reason, int) else token_ids
        if stream.matcher is not None:
            text = stream.matcher.text(visible)
        else:
            text = tokenizer.decode(
                visible,
                skip_special_tokens=params.skip_special_tokens,
                keep=request.markup.visible_token_ids,
            )
        if stop_reason in tokenizer.end_token_ids:
            stop_reason = None  # the model's own end is no stop the user set
    logprobs = None if params.logprobs is None else stream.logprobs[: len(token_ids)]
    return Completion(
        index=sequence.sample_index,
        text=text,
        token_ids=token_ids,
        finish_reason=reason,
        stop_reason=stop_reason,
        logprobs=logprobs,
        cumulative_logprob=None if logprobs is None else sum(entry.logprob for entry in logprobs),
    )


def _prompt_logprobs(running: RunningRequest) -> list[TokenLogprob | None] | None:
    """By position in the prompt, if they were asked for; None where nothing was scored."""
    if running.request.params.prompt_logprobs is None:
        return None
    return [running.scores.get(i) for i in range(len(running.request.prompt_token_ids))]


def _score(entries: Mapping[int, TokenLogprob]) -> Score:
    """The score of a request from its scored positions."""
    ordered = [entries[position] for position in sorted(entries)]
    return Score(
        token_logprobs=np.array([entry.logprob for entry in ordered], np.float32),
        is_greedy=all(entry.rank == 1 for entry in ordered),
    )

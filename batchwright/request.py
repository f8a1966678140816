"""What a user asks for and what comes back: Request, SamplingParams, Result.

No torch, no files, no clock. A `Request` is one user row after validation, templating and
tokenisation; the engine makes `params.n` sequences of it and answers with one `Result`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from batchwright.errors import RequestError
from batchwright.prompt_layout import PromptLayout
from batchwright.repetition import RepetitionDetection
from batchwright.structured.spec import GrammarSpec

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

DEFAULT_MAX_TOKENS = 1024
"""Output limit of a generating row that names none (cut further by the model's context)."""


class Task(StrEnum):
    """What a request wants from the model."""

    GENERATE = "generate"
    SCORE = "score"
    EMBED = "embed"


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's context was reached
    REPETITION = "repetition"  # it went round in a loop, see repetition.py
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Checked by `validate()`.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches top_p.
        min_p: keep tokens at least min_p times as likely as the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in the
            prompt or the output (CTRL, arXiv:1909.05858).
        presence_penalty, frequency_penalty: subtracted once, or once per occurrence, for tokens
            of the output.
        logit_bias: token id -> value added to its logit.
        max_tokens: output limit; None means DEFAULT_MAX_TOKENS, cut to what the context leaves.
        min_tokens: end tokens and stop tokens cannot be drawn before this many output tokens, and
            stop strings are not looked for.
        stop: strings that end the output; the text is cut before them.
        include_stop_str_in_output: keep the stop string in the text.
        stop_token_ids: token ids that end the output, besides the model's end tokens.
        ignore_eos: the model's end tokens do not end the output.
        repetition_detection: ends an output that has fallen into a loop, not before min_tokens;
            None lets it run.
        n: sequences per request; they share the prompt.
        seed: key of the row's own randomness; None derives it from the job seed and the row id.
        logprobs: number of likeliest alternatives to report per output token (0: only the chosen
            token's own log-probability; None: nothing). Log-probabilities are those of the
            model's raw logits, before temperature, penalties and filters.
        prompt_logprobs: the same for prompt tokens.
        skip_special_tokens: leave special tokens out of the text.
        grammar: the form the text must have. It comes before everything else here: min_tokens
            does not hold back the end of a finished text, and stop strings and stop tokens end
            the output only where its text is whole.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_detection: RepetitionDetection | None = None
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: GrammarSpec | None = None

    def least_output(self, most: int) -> int:
        """Output tokens that a sequence has at least, if it may have `most`."""
        if self.grammar is not None:
            return min(1, most)
        can_end = self.stop or self.stop_token_ids or self.repetition_detection is not None
        if self.ignore_eos and not can_end:
            return most
        return min(max(self.min_tokens, 1), most)


@dataclass(frozen=True, slots=True)
class Markup:
    """How a model's chat template marks reasoning and tool calls in an answer.

    Attributes:
        reasons: reasoning stands between `<think>` and `</think>`.
        tool_calls: the form of tool calls, a key of `text.markup.TOOL_MARKS`; None: no known one.
        visible_token_ids: special tokens that spell marks; they stay in the text although
            special tokens are left out.
    """

    reasons: bool = False
    tool_calls: str | None = None
    visible_token_ids: frozenset[int] = frozenset()


NO_MARKUP = Markup()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One row, ready to run.

    Attributes:
        id: the user's custom_id, unique within a job; randomness is keyed by it.
        prompt_token_ids: [num_prompt_tokens] int32, at least one token.
        prompt: the text the tokens came from, if there was one.
        score_start: for Task.SCORE, the first position whose token is scored (>= 1); tokens
            before it are context.
        pooling: for Task.EMBED, "mean" or "last".
        namespace: prefixes are shared only between requests of one namespace.
        layout: where the prompt's tokens stand, if not at 0, 1, 2, ...; such a request never
            shares keys and values with one that has none.
        markup: what a chat's answer is split by.
        urgent: it starts before all requests that are not, whenever they came.
        parts: requests of the same task that are run instead, and answered by one Result; then
            prompt_token_ids is empty.
    """

    id: str
    prompt_token_ids: Int32Array
    params: SamplingParams = SamplingParams()
    task: Task = Task.GENERATE
    prompt: str | None = None
    score_start: int = 1
    pooling: str = "mean"
    namespace: str = ""
    layout: PromptLayout | None = None
    markup: Markup = NO_MARKUP
    urgent: bool = False
    parts: tuple[Request, ...] = ()

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens, of all parts."""
        return len(self.prompt_token_ids) + sum(part.num_prompt_tokens for part in self.parts)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log) of one token, its rank (1 is likeliest), and its rivals.

    `top` holds (token id, log-probability), likeliest first, as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, kw_only=True)
class Completion:
    """One finished sequence of a request."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of given tokens.

    Attributes:
        token_logprobs: [num_scored] float32, natural log, one per scored token.
        is_greedy: every scored token was the likeliest at its place.
    """

    token_logprobs: Float32Array
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Sum over the scored tokens, accumulated in float64."""
        return float(self.token_logprobs.sum(dtype=np.float64))


@dataclass(slots=True, kw_only=True)
class Result:
    """The one answer to a request: outputs, a score, an embedding, or an error.

    A request made of parts has their results in `parts`; its prompt_token_ids, outputs and
    num_cached_tokens are those of all parts, one after another.
    """

    request_id: str
    prompt_token_ids: list[int]
    prompt: str | None = None
    outputs: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None  # None for the first token
    score: Score | None = None
    embedding: Float32Array | None = None  # [hidden_size]
    error: RequestError | None = None
    num_cached_tokens: int = 0  # prompt tokens taken from shared KV blocks instead of computed
    parts: list[Result] = field(default_factory=list)

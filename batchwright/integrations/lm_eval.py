"""A model class for lm-evaluation-harness (extra `lm-eval`): the harness's tasks on this engine.

    python -m batchwright.integrations.lm_eval run --model batchwright \\
        --model_args pretrained=smollm2 --tasks arc_easy

runs the harness's own command line with the model "batchwright" known to it; from Python, pass a
`BatchwrightLM` to `lm_eval.simple_evaluate`. Texts are encoded, joined, windowed and cut as the
harness's Hugging Face class does, so scores agree with it up to rounding. The engine sees all rows
of a task at once and batches them itself; `batch_size` is accepted and has no effect.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

from batchwright.errors import ConfigError, RequestError
from batchwright.llm import LLM
from batchwright.request import Request, Result, SamplingParams, Task

logger = logging.getLogger(__name__)

SAMPLING_KWARGS = (
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
"""Generation arguments that are passed on under the same name."""

READ_KWARGS = ("do_sample", "temperature", "until", "max_gen_toks")
"""Generation arguments that are translated."""

NEUTRAL_KWARGS = {"num_beams": 1, "use_cache": True}
"""Generation arguments that may be spelled out with the only value there is."""


@register_model("batchwright")
class BatchwrightLM(TemplateLM):
    """The harness's view of an engine.

    Args:
        pretrained: "smollm2", a Hugging Face directory, a GGUF file, or a hub id.
        max_length: most tokens a prediction may look back on, as the harness counts them: the
            token that is predicted comes on top. None takes what the engine allows less that one
            token; at most the model's context less one.
        max_gen_toks: output limit of tasks that name none.
        prefix_token_id: stands before a text without context; None takes the begin token, else
            the end token.
        chat_template_args: further variables of the chat template.
        batch_size, max_batch_size, device: the harness passes them; they change nothing, since
            batches are the engine's business and it runs on the CPU.
        settings: fields of `EngineConfig`.
    Raises:
        ConfigError, ModelError: before any request runs.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if device not in (None, "cpu"):  # the harness's command line says cuda:0 unless told
            logger.warning("device %r is not used: this version runs on the CPU", device)
        if max_length is not None:
            settings["max_model_len"] = max_length + 1
        self._llm = LLM(pretrained, **settings)
        self._name = pretrained
        self._prefix_token_id = prefix_token_id
        self._chat_template_args = dict(chat_template_args or {})
        self._max_gen_toks = max_gen_toks
        self.tokenizer = self._llm.tokenizer  # where TemplateLM looks for the chat template

    @property
    def max_length(self) -> int:
        """Tokens a prediction may look back on."""
        return self._llm.config.max_model_len - 1

    @property
    def max_gen_toks(self) -> int:
        """Output limit of tasks that name none."""
        return self._max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The model's end token."""
        token_id = self._llm.tokenizer.eos_token_id
        return self._llm.prefix_token_id if token_id is None else token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return self._llm.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's request cache."""
        return "batchwright__" + self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode, special tokens spelled in the text included: a chat arrives rendered as text.

        Args:
            string: a prompt, a continuation, or a rendered chat.
            add_special_tokens: None adds what the model's own tokenizer adds, unless the text
                begins with the prefix token already.
            kwargs: none is used.
        """
        if add_special_tokens is None:
            prefix = self._llm.tokenizer.id_to_token(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, prefix)
        return self._llm.tokenizer.encode(
            string, add_special_tokens=add_special_tokens, parse_special=True
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation; a template that refuses system messages gets it without them."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except RequestError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            logger.warning("chat template failed (%s); trying without system messages", error)
            return self._render(rest, add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text, _ = self._llm.tokenizer.encode_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            template_kwargs=self._chat_template_args,
            parse_special=True,
        )
        return text

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each continuation given its context, both as token ids.

        Pairs that are too long lose context from the left, with a warning.
        """
        rows = [
            self._score_request(index, context, continuation)
            for index, (_, context, continuation) in enumerate(requests)
        ]
        results = self._run(rows, "loglikelihood", disable_tqdm)
        answers = []
        for (texts, _, _), result in zip(requests, results, strict=True):
            assert result.score is not None
            answer = (result.score.logprob, result.score.is_greedy)
            if texts is not None:  # a window of a rolling request has none
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            answers.append(answer)
        return answers

    def _score_request(self, index: int, context: list[int], continuation: list[int]) -> Request:
        if len(continuation) > self.max_length:
            raise RequestError(
                f"request {index}: its continuation has {len(continuation)} tokens, max_length is "
                f"{self.max_length}; shorten it or raise max_length"
            )
        token_ids = self._cut([*context, *continuation], self.max_length + 1, index)
        return Request(
            id=str(index),
            prompt_token_ids=np.asarray(token_ids, np.int32),
            task=Task.SCORE,
            score_start=len(token_ids) - len(continuation),
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, every token predicted once, in windows of max_length."""
        windows: list[tuple[None, list[int], list[int]]] = []
        num_windows = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            num_windows.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in num_windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, an end token or its output limit.

        Raises:
            ConfigError: a generation argument that is not supported.
            RequestError: a request that cannot run, named in the message.
        """
        rows = [
            self._generate_request(index, *request.args) for index, request in enumerate(requests)
        ]
        results = self._run(rows, "generate_until", disable_tqdm)
        texts = [result.outputs[0].text for result in results]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate_request(self, index: int, context: str, gen_kwargs: dict[str, Any]) -> Request:
        params = self._sampling_params(gen_kwargs)
        assert params.max_tokens is not None
        limit = self.max_length - params.max_tokens
        if limit < 1:
            raise RequestError(
                f"request {index}: max_gen_toks is {params.max_tokens}, max_length is "
                f"{self.max_length}; lower the one or raise the other"
            )
        token_ids = self._cut(self.tok_encode(context), limit, index)
        return Request(
            id=str(index), prompt_token_ids=np.asarray(token_ids, np.int32), params=params
        )

    def _sampling_params(self, gen_kwargs: dict[str, Any]) -> SamplingParams:
        """The harness's generation arguments as ours. Greedy unless a temperature is given."""
        given = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        known = {*SAMPLING_KWARGS, *READ_KWARGS}
        unknown = {
            name: value
            for name, value in given.items()
            if name not in known and NEUTRAL_KWARGS.get(name) != value
        }
        if unknown:
            raise ConfigError(
                f"generation arguments that are not supported: {unknown}; "
                f"supported: {', '.join(sorted(known))}"
            )
        sampling = {name: given[name] for name in SAMPLING_KWARGS if name in given}
        stop, stop_token_ids = self._stops(given["until"])
        return SamplingParams(
            temperature=given.get("temperature", 0.0) if given["do_sample"] else 0.0,
            max_tokens=given["max_gen_toks"],
            stop=stop,
            stop_token_ids=stop_token_ids,
            **sampling,
        )

    def _stops(self, until: Iterable[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Stop strings, and stop tokens: special tokens are no part of the text."""
        tokenizer = self._llm.tokenizer
        strings, token_ids = [], []
        for text in until:
            token_id = tokenizer.backend.token_to_id(text)
            if token_id in tokenizer.special_token_ids:
                token_ids.append(token_id)
            elif text:
                strings.append(text)
        return tuple(strings), tuple(token_ids)

    def _cut(self, token_ids: list[int], limit: int, index: int) -> list[int]:
        """The last `limit` tokens."""
        if len(token_ids) > limit:
            logger.warning(
                "request %d has %d tokens, %d fit (max_length %d); cut from the left",
                index,
                len(token_ids),
                limit,
                self.max_length,
            )
        return token_ids[-limit:]

    def _run(self, rows: list[Request], kind: str, disable_tqdm: bool) -> list[Result]:
        """Results in order.

        Raises:
            RequestError: rows failed; the message names how many and the first.
        """
        finished = tqdm(
            self._llm.engine.run(rows),
            total=len(rows),
            desc=f"Running {kind} requests",
            disable=disable_tqdm,
        )
        results = sorted(finished, key=lambda result: int(result.request_id))
        failed = [result for result in results if result.error is not None]
        if failed:
            first = failed[0]
            raise RequestError(
                f"{len(failed)} of {len(rows)} {kind} requests failed; the first is request "
                f"{first.request_id}: {first.error}"
            )
        return results


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

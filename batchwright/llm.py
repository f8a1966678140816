"""LLM: the Python entry point, a few lines on top of the engine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import torch

from batchwright import kernels
from batchwright.config import EngineConfig, ResolvedConfig
from batchwright.data_parallel.engine import ReplicatedEngine
from batchwright.data_parallel.start import start_replicas
from batchwright.engine import Engine
from batchwright.engine_around import engine_around
from batchwright.errors import BatchwrightError, ConfigError, RequestError
from batchwright.exec.build import build_executor, use_threads
from batchwright.exec.device.formats import check_formats
from batchwright.exec.device.memory import free_bytes, has_gpu, num_gpus
from batchwright.exec.executor import Executor
from batchwright.exec.machine_cost import with_useful_swap
from batchwright.exec.memory import available_memory_bytes, check_room_on_host
from batchwright.kv.groups import KVGroup
from batchwright.models.loader import build_empty, load_model, read_config
from batchwright.models.shape import read_shape, shape_of
from batchwright.opened_model import answer_identity, engine_settings
from batchwright.plan.order import OrderFunction
from batchwright.plan.shape import ModelShape
from batchwright.request import Request, Result, SamplingParams, Task
from batchwright.structured.compile import GrammarCompiler
from batchwright.tensor_parallel.executor import TensorParallelExecutor
from batchwright.tensor_parallel.followers import Followers
from batchwright.tensor_parallel.sharding import check_divisible
from batchwright.text.continuation import join, prefix_token_id
from batchwright.text.token_bytes import token_bytes
from batchwright.text.tokenizer import Tokenizer, load_tokenizer
from batchwright.validation.messages import (
    check_messages,
    check_template_kwargs,
    check_tools,
)
from batchwright.validation.params import check_params
from batchwright.weights.checkpoint import Checkpoint, open_checkpoint
from batchwright.weights.locate import locate_model

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model ready to run batches.

    Args:
        model: "smollm2", a Hugging Face directory, a GGUF file, or a hub id.
        settings: fields of `EngineConfig`.
    Raises:
        ConfigError, ModelError: before any request runs.

    Example:
        >>> llm = LLM("smollm2")  # doctest: +SKIP
        >>> results = llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))
        >>> print(results[0].outputs[0].text)
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        config = engine_settings(settings)
        self.name = str(model)
        path = locate_model(self.name)
        self.tokenizer: Tokenizer = load_tokenizer(path)
        checkpoint = open_checkpoint(path)
        self._fingerprint = checkpoint.fingerprint
        self.engine, self.config = build_engine(checkpoint, self.tokenizer, config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Result]:
        """Complete texts or token-id lists; results in input order, failures in `.error`."""
        return _in_order(self.stream(prompts, params))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Result]:
        """The same as rows finish; `request_id` is the row's index in the input."""
        rows = _as_list(prompts)

        def request(id: str, prompt: Prompt, row_params: SamplingParams) -> Request:
            return _request(id, *self._encode(prompt), params=check_params(row_params))

        return self._run(request, rows, _per_row(params, len(rows)))

    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Result]:
        """Answer message lists through the model's chat template; results in input order.

        Raises:
            RequestError: tools or chat_template_kwargs are wrong, which are those of all rows.
        """
        rows = _as_conversations(conversations)
        given_tools = check_tools(tools) if tools else None
        kwargs = check_template_kwargs(chat_template_kwargs or {})

        def request(id: str, messages: Messages, row_params: SamplingParams) -> Request:
            text, token_ids = self.tokenizer.encode_chat(
                check_messages(messages), tools=given_tools, template_kwargs=kwargs
            )
            return _request(id, text, token_ids, params=check_params(row_params))

        return _in_order(self._run(request, rows, _per_row(params, len(rows))))

    def score(self, pairs: Sequence[tuple[Prompt, Prompt]]) -> list[Result]:
        """Log-likelihood of each continuation given its context, in `.score`.

        The two are joined as lm-evaluation-harness does; see `text/continuation.py`.
        """

        def request(id: str, pair: tuple[Prompt, Prompt]) -> Request:
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise RequestError(f"a row must be (context, continuation), not {pair!r:.60}")
            for part in pair:
                if not isinstance(part, str) and not _are_token_ids(part):
                    raise _no_prompt(part)
            token_ids, score_start = join(self.tokenizer, *pair)
            return _request(id, None, token_ids, task=Task.SCORE, score_start=score_start)

        return _in_order(self._run(request, _rows(pairs, "(context, continuation) pairs")))

    def embed(self, texts: Prompt | Sequence[Prompt], pooling: str = "mean") -> list[Result]:
        """Mean or last final hidden state of each text, in `.embedding`."""
        if pooling not in ("mean", "last"):
            raise ConfigError(f"pooling is {pooling!r}, must be 'mean' or 'last'")

        def request(id: str, text: Prompt) -> Request:
            return _request(id, *self._encode(text), task=Task.EMBED, pooling=pooling)

        return _in_order(self._run(request, _as_list(texts)))

    def _run(
        self, make_request: Callable[..., Request], *columns: Sequence[Any]
    ) -> Iterator[Result]:
        """Results as rows finish; a row that cannot be made a request fails alone."""
        refused: list[Result] = []

        def requests() -> Iterator[Request]:
            for index, row in enumerate(zip(*columns, strict=True)):
                try:
                    request = make_request(str(index), *row)
                except RequestError as error:
                    result = Result(request_id=str(index), prompt_token_ids=[], error=error)
                    refused.append(result)
                else:
                    yield request

        yield from self.engine.run(requests())
        yield from refused

    def _encode(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        if _are_token_ids(prompt):
            return None, prompt
        raise _no_prompt(prompt)

    @property
    def grammars(self) -> GrammarCompiler:
        """Compiles what structured output asks for, and renders templates that rows bring."""
        assert self.engine.grammars is not None
        return self.engine.grammars

    @cached_property
    def token_bytes(self) -> Callable[[int], bytes]:
        """The bytes that a token id stands for."""
        return token_bytes(self.tokenizer.backend)

    def identity(self) -> dict[str, Any]:
        """What answers depend on besides the rows: a job that goes on must have the same."""
        return answer_identity(self._fingerprint, self.tokenizer, self.config)

    @property
    def shape(self) -> ModelShape | None:
        """The model's sizes."""
        return self.engine.shape

    @property
    def order(self) -> OrderFunction:
        """In which order the engine starts rows."""
        return self.engine.order

    def compile_s(self) -> float:
        """Seconds spent compiling kernels; of replicas, by the one that took longest."""
        replicas_s = self.engine.compile_s if isinstance(self.engine, ReplicatedEngine) else 0.0
        return kernels.compile_seconds() + replicas_s

    def settings(self) -> dict[str, Any]:
        """The engine's settings as they were settled, for logs."""
        return dataclasses.asdict(self.config)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the begin token, else the end token."""
        return prefix_token_id(self.tokenizer)


def build_engine(
    checkpoint: Checkpoint, tokenizer: Tokenizer, config: EngineConfig
) -> tuple[Engine | ReplicatedEngine, ResolvedConfig]:
    """Load a model and put an engine around it, or start replicas of one."""
    model_config = read_config(checkpoint.config)
    on_gpu = config.uses_gpu(has_gpu())
    resolved = config.resolve(
        context_length=model_config["max_position_embeddings"],
        free_memory_bytes=free_bytes() if on_gpu else available_memory_bytes(),
        num_gpus=num_gpus(),
    )
    check_formats(checkpoint.config, resolved)
    if resolved.swap_space_bytes:
        resolved = with_useful_swap(resolved, read_shape(checkpoint.config))
        check_room_on_host(resolved.swap_space_bytes * resolved.tensor_parallel_size)
    if resolved.data_parallel_size > 1:
        return start_replicas(checkpoint, tokenizer, resolved), resolved
    use_threads(resolved.num_threads)
    followers = None
    if resolved.tensor_parallel_size > 1:
        check_divisible(build_empty(checkpoint.config, 1), resolved.tensor_parallel_size)
        followers = Followers(resolved.tensor_parallel_size, on_gpu=on_gpu)
    try:
        executor, groups, resolved, shape = _load(
            checkpoint, resolved, followers, vocab_size=model_config["vocab_size"]
        )
    except BaseException as error:
        if followers is None:
            raise
        if isinstance(error, Exception) and not isinstance(error, BatchwrightError):
            raise followers.failure(error) from error  # the others' reason, if they have one
        followers.close()
        raise
    logger.info(
        "memory for keys and values: up to %s, %s",
        " and ".join(
            f"{group.num_blocks * resolved.block_size:,} tokens"
            + (f" (window {group.window})" if group.window else "")
            for group in groups
        ),
        "taken now" if on_gpu else "taken as needed",
    )
    return engine_around(executor, groups, resolved, shape, checkpoint, tokenizer), resolved


def _load(
    checkpoint: Checkpoint,
    config: ResolvedConfig,
    followers: Followers | None,
    *,
    vocab_size: int,
) -> tuple[Executor, list[KVGroup], ResolvedConfig, ModelShape]:
    """The model's weights, its executor with KV groups, the config, and the whole model's sizes."""
    ranks = None
    if followers is not None:
        ranks = followers.ranks
        checkpoint.tensor(checkpoint.names()[0])  # a GGUF file is unpacked once, not by every rank
        followers.load(checkpoint.path, config)
    model = load_model(
        checkpoint,
        dtype=getattr(torch, config.dtype),
        max_positions=config.max_model_len,
        device=config.device,
        quantize=config.quantize,
        ranks=ranks,
    )
    if followers is not None:
        followers.start()
    executor, groups, config = build_executor(model, config, vocab_size=vocab_size, ranks=ranks)
    if followers is None:
        return executor, groups, config, shape_of(model)
    shape = read_shape(checkpoint.config)
    return TensorParallelExecutor(executor, followers), groups, config, shape


def _request(id: str, prompt: str | None, token_ids: Sequence[int], **fields: Any) -> Request:
    ids = np.asarray(token_ids, np.int32)
    return Request(id=id, prompt=prompt, prompt_token_ids=ids, **fields)


def _no_prompt(value: Any) -> RequestError:
    return RequestError(
        f"a prompt is a text or a list of token ids, not {value!r:.60}", param="prompt"
    )


def _are_token_ids(prompt: Any) -> TypeGuard[Sequence[int]]:
    """Whether this is a sequence of whole numbers that fit into 32 bits."""
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence | np.ndarray):
        return False
    return all(
        isinstance(i, int | np.integer) and not isinstance(i, bool) and abs(int(i)) < 2**31
        for i in prompt
    )


def _as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list; a flat list of ints is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    rows = _rows(prompts, "texts or lists of token ids")
    is_one = len(rows) > 0 and isinstance(rows[0], int | np.integer)
    return [cast(Prompt, rows)] if is_one else cast(list[Prompt], rows)


def _rows(given: Iterable[Any], what: str) -> list[Any]:
    """Rows as a list; what has no order, or is no collection of rows, is not guessed at."""
    if isinstance(given, bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise ConfigError(f"rows are a list of {what}, not {type(given).__name__}")
    return list(given)


def _as_conversations(conversations: Messages | Sequence[Messages]) -> list[Messages]:
    """One list of messages or many, as a list."""
    if isinstance(conversations, str | Mapping) or not isinstance(conversations, Sequence):
        raise ConfigError(
            "chat takes a list of messages, or a list of such lists, "
            f"not {type(conversations).__name__}: [{{'role': 'user', 'content': 'Hello'}}]"
        )
    if conversations and isinstance(conversations[0], Mapping):
        return [cast(Messages, conversations)]
    return list(cast(Sequence[Messages], conversations))


def _per_row(
    params: SamplingParams | Sequence[SamplingParams] | None, num_rows: int
) -> list[SamplingParams]:
    """One SamplingParams a row; each is checked with its row, so that a bad one fails alone."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_rows
    if isinstance(params, str | Mapping) or not isinstance(params, Sequence):
        raise ConfigError(
            f"params must be SamplingParams or a list of them, not {type(params).__name__}"
        )
    if len(params) != num_rows:
        raise ConfigError(f"{len(params)} sampling params for {num_rows} prompts; give one or all")
    return list(params)


def _in_order(results: Iterable[Result]) -> list[Result]:
    return sorted(results, key=lambda result: int(result.request_id))

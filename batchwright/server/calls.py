"""Single calls: the same way as a row of a file, from its body to its answer's body.

A list of inputs (embeddings) or prompts (completions) is several requests, whose answers are put
together again; a file's row holds one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from uuid import uuid4

from batchwright.errors import RequestError, ResourceError
from batchwright.job.answer import AnswerForm, answer_form
from batchwright.job.formats.response_body import response_body
from batchwright.job.prepare import prepare_rows
from batchwright.job.rows import COMPLETIONS, EMBEDDINGS, InputRow
from batchwright.job.run_job import JobModel
from batchwright.job.validate import parse_row
from batchwright.request import FinishReason, Request, Result
from batchwright.server.api_error import ApiError, busy, from_request_error
from batchwright.server.shared_engine import (
    CALL_PREFIX,
    Call,
    ServerStoppingError,
    SharedEngine,
    TooManyCallsError,
)

MAX_INPUTS = 256
PREPARING_THREADS = 4  # a row's template or schema may take seconds, in its own process


@dataclass(frozen=True, slots=True)
class Begun:
    """A call that the engine has: its requests and the forms of their answers."""

    calls: list[Call]
    forms: list[AnswerForm]


class Calls:
    """Answers single calls.

    Args:
        model: templates, tokens and grammars.
        engine: computes.
        model_name: the model's name, which bodies have to give if they give one.
        max_preparing: calls whose templates and tokens are being made at once.
    """

    def __init__(
        self, model: JobModel, engine: SharedEngine, *, model_name: str, max_preparing: int
    ) -> None:
        self._model = model
        self._engine = engine
        self._model_name = model_name
        self._pool = ThreadPoolExecutor(PREPARING_THREADS, "prepare")
        self._max_preparing = max_preparing
        self._num_preparing = 0
        self._token_bytes = lru_cache(maxsize=65536)(lambda id: model.token_bytes(id))

    async def begin(self, endpoint: str, body: dict[str, Any]) -> Begun:
        """Check a call and hand it to the engine.

        Raises:
            ApiError: it is refused.
        """
        self._check_model(body)
        if self._num_preparing >= self._max_preparing:
            raise busy("too many calls are being prepared; try again later")
        self._num_preparing += 1
        try:
            loop = asyncio.get_running_loop()
            prepared = await loop.run_in_executor(self._pool, self._prepare, endpoint, body)
            calls = self._engine.submit([request for request, _ in prepared])
        except RequestError as error:
            raise from_request_error(error) from None
        except TooManyCallsError as error:
            raise busy(f"{error}; try again later") from None
        except ServerStoppingError as error:
            raise _stopping(error) from None
        finally:
            self._num_preparing -= 1
        return Begun(calls, [form for _, form in prepared])

    async def finish(self, begun: Begun, gone: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
        """The body of a call's answer.

        Args:
            gone: returns when the client does not wait any more; the call is withdrawn then.
        Raises:
            ApiError: the call has failed.
        """
        results = asyncio.ensure_future(_all_results(begun.calls))
        leaving = asyncio.ensure_future(gone())
        try:
            await asyncio.wait({results, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise ApiError(499, "the client has gone")
            return await asyncio.to_thread(self._write, results.result(), begun.forms)
        except RequestError as error:
            raise from_request_error(error) from None
        except ServerStoppingError as error:
            raise _stopping(error) from None
        except ResourceError as error:
            raise ApiError(503, str(error), code="out_of_memory") from None
        finally:
            leaving.cancel()
            results.cancel()
            for call in begun.calls:
                if not call.result.done():
                    self._engine.withdraw(call)

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check_model(self, body: dict[str, Any]) -> None:
        model = body.get("model")
        if isinstance(model, str) and model != self._model_name:
            raise ApiError(
                404,
                f"there is no model {model!r:.100}; this server has {self._model_name!r}",
                code="model_not_found",
                param="model",
            )

    def _prepare(self, endpoint: str, body: dict[str, Any]) -> list[tuple[Request, AnswerForm]]:
        """In a thread of the pool: the requests of a call. One that is bad fails all."""
        rows = [
            parse_row(InputRow(1, f"{CALL_PREFIX}{uuid4().hex}", endpoint, part))
            for part in _parts(endpoint, body)
        ]
        prepared = []
        requests = prepare_rows(rows, self._model.tokenizer, self._model.grammars)
        for row, request in zip(rows, requests, strict=True):
            if isinstance(request, RequestError):
                raise request
            prepared.append((replace(request, urgent=True), answer_form(row, request)))
        return prepared

    def _write(self, results: list[Result], forms: list[AnswerForm]) -> dict[str, Any]:
        created = int(time.time())
        return _join(
            [
                response_body(
                    _sound(result),
                    form,
                    self._token_bytes,
                    model=self._model_name,
                    created=created,
                )
                for result, form in zip(results, forms, strict=True)
            ]
        )


async def _all_results(calls: list[Call]) -> list[Result]:
    return await asyncio.gather(*(asyncio.wrap_future(call.result) for call in calls))


def _stopping(error: ServerStoppingError) -> ApiError:
    return busy(str(error), status=503, retry_after_s=30)


def _sound(result: Result) -> Result:
    if result.error is not None:
        raise result.error
    if any(output.finish_reason is FinishReason.CANCELLED for output in result.outputs):
        raise RequestError("the call was cancelled", code="cancelled")
    return result


def _parts(endpoint: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A body for each input; the given one where there is one input."""
    name = {EMBEDDINGS: "input", COMPLETIONS: "prompt"}.get(endpoint)
    values = body.get(name) if name is not None else None
    if name is None or not isinstance(values, list) or len(values) < 2:
        return [body]
    if not all(isinstance(value, str | list) for value in values):
        return [body]  # token ids, or nothing that makes sense
    if len(values) > MAX_INPUTS:
        raise RequestError(
            f"{name} is a list of {len(values)}; at most {MAX_INPUTS} are taken", param=name
        )
    return [{**body, name: [value]} for value in values]


def _join(bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer of several; choices and embeddings are counted through."""
    first = bodies[0]
    if len(bodies) == 1:
        return first
    for name in ("choices", "data"):
        if name in first:
            items = [item for body in bodies for item in body[name]]
            first[name] = [{**item, "index": index} for index, item in enumerate(items)]
    first["usage"] = _sum([body["usage"] for body in bodies])
    return first


def _sum(usages: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for name, value in usages[0].items():
        values = [usage[name] for usage in usages]
        total[name] = _sum(values) if isinstance(value, dict) else sum(values)
    return total

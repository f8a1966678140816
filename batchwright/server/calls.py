"""Single calls: the same way as a row of a file, from its body to its answer's body."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from uuid import uuid4

from batchwright.errors import GoneError, RequestError, ResourceError
from batchwright.job.answer import AnswerForm, answer_form
from batchwright.job.formats.response_body import response_body
from batchwright.job.prepare import prepare_rows
from batchwright.job.rows import InputRow
from batchwright.job.run_job import JobModel
from batchwright.job.validate import parse_row
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.request import FinishReason, Request, Result
from batchwright.server.api_error import ApiError, busy, from_request_error
from batchwright.server.shared_engine import (
    CALL_PREFIX,
    Call,
    ServerStoppingError,
    SharedEngine,
    TooManyCallsError,
)

_OUR_NAME = re.compile(rf" \(custom_id={CALL_PREFIX}[^)]*\)")
PREPARING_THREADS = 4  # a row's template or schema may take seconds, in its own process


@dataclass(frozen=True, slots=True)
class Begun:
    """A call that the engine has, and the form of its answer."""

    call: Call
    form: AnswerForm


class Calls:
    """Answers single calls.

    Args:
        model: templates, tokens and grammars.
        engine: computes.
        model_name: the model's name, which bodies have to give if they give one.
        max_preparing: calls whose templates and tokens are being made at once.
        schemas: that calls may name in prompt_cache.
    """

    def __init__(
        self,
        model: JobModel,
        engine: SharedEngine,
        *,
        model_name: str,
        max_preparing: int,
        schemas: PromptSchemas | None = None,
    ) -> None:
        self._model = model
        self._engine = engine
        self._model_name = model_name
        self._pool = ThreadPoolExecutor(PREPARING_THREADS, "prepare")
        self._max_preparing = max_preparing
        self._schemas = schemas
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
            request, form = await loop.run_in_executor(self._pool, self._prepare, endpoint, body)
            call = self._engine.submit(request)
        except RequestError as error:
            raise _told(error) from None
        except TooManyCallsError as error:
            raise busy(f"{error}; try again later") from None
        except ServerStoppingError as error:
            raise _stopping(error) from None
        finally:
            self._num_preparing -= 1
        return Begun(call, form)

    async def finish(self, begun: Begun, gone: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
        """The body of a call's answer.

        Args:
            gone: returns when the client does not wait any more; the call is withdrawn then.
        Raises:
            ApiError: the call has failed.
        """
        result = asyncio.wrap_future(begun.call.result)
        leaving = asyncio.ensure_future(gone())
        try:
            await asyncio.wait({result, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise ApiError(499, "the client has gone")
            return await asyncio.to_thread(self._write, result.result(), begun.form)
        except RequestError as error:
            raise _told(error) from None
        except (ServerStoppingError, GoneError) as error:
            raise _stopping(error) from None
        except ResourceError as error:
            raise ApiError(503, str(error), code="out_of_memory") from None
        finally:
            leaving.cancel()
            result.cancel()
            if not begun.call.result.done():
                self._engine.withdraw(begun.call)

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

    def _prepare(self, endpoint: str, body: dict[str, Any]) -> tuple[Request, AnswerForm]:
        """In a thread of the pool: the request of a call, and the form of its answer."""
        row = parse_row(InputRow(1, f"{CALL_PREFIX}{uuid4().hex}", endpoint, body))
        model = self._model
        (request,) = prepare_rows([row], model.tokenizer, model.grammars, self._schemas)
        if isinstance(request, RequestError):
            raise request
        parts = tuple(replace(part, urgent=True) for part in request.parts)
        return replace(request, urgent=True, parts=parts), answer_form(row, request)

    def _write(self, result: Result, form: AnswerForm) -> dict[str, Any]:
        return response_body(
            _sound(result),
            form,
            self._token_bytes,
            model=self._model_name,
            created=int(time.time()),
        )


def _told(error: RequestError) -> ApiError:
    """A call's error without the name that only we know."""
    error.message = _OUR_NAME.sub("", error.message)
    return from_request_error(error)


def _stopping(error: Exception) -> ApiError:
    return busy(str(error), status=503, retry_after_s=30)


def _sound(result: Result) -> Result:
    if result.error is not None:
        raise result.error
    if any(output.finish_reason is FinishReason.CANCELLED for output in result.outputs):
        raise RequestError("the call was cancelled", code="cancelled")
    return result

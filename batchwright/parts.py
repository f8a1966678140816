"""Requests made of parts: a row with several inputs is answered once, when all of them are done.

Each part runs as a request of its own. If one of them fails, the whole request fails with its
error and its index, and the other parts are cancelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable
from itertools import chain

from batchwright.errors import RequestError
from batchwright.request import Request, Result


class _Whole:
    """A request and the results of its parts that are there."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.results: dict[str, Result] = {}

    @property
    def missing(self) -> list[str]:
        return [part.id for part in self.request.parts if part.id not in self.results]


class Parts:
    """Requests that are made of parts, until they are answered."""

    def __init__(self) -> None:
        self._wholes: dict[str, _Whole] = {}
        self._whole_of: dict[str, _Whole] = {}

    def __bool__(self) -> bool:
        return bool(self._wholes)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._wholes

    def open(self, request: Request) -> None:
        """Wait for the results of a request's parts."""
        whole = _Whole(request)
        self._wholes[request.id] = whole
        self._whole_of.update(dict.fromkeys((part.id for part in request.parts), whole))

    def missing(self, request_id: str) -> list[str]:
        """Parts of a request that have no result yet."""
        return self._wholes[request_id].missing

    def take(self, results: Iterable[Result]) -> tuple[list[Result], list[str]]:
        """Take results in.

        Returns:
            (results of whole requests, parts that need not run any more). Taking the same results
            again gives the same, until `close`.
        """
        out: list[Result] = []
        touched: dict[str, _Whole] = {}
        for result in results:
            whole = self._whole_of.get(result.request_id)
            if whole is None:
                out.append(result)
            else:
                whole.results[result.request_id] = result
                touched[whole.request.id] = whole
        needless: list[str] = []
        for whole in touched.values():
            if not whole.missing:
                out.append(_put_together(whole))
            elif any(result.error is not None for result in whole.results.values()):
                needless += whole.missing
        return out, needless

    def close(self, results: Iterable[Result]) -> None:
        """Forget the requests that these results answer."""
        for result in results:
            whole = self._wholes.pop(result.request_id, None)
            for part in whole.request.parts if whole else ():
                del self._whole_of[part.id]

    def waiting(self, request_ids: list[str]) -> list[str]:
        """Of requests and parts that wait: the requests no part of which has started."""
        if not self:
            return request_ids
        waiting: Container[str] = set(request_ids)
        wholes = [
            request_id
            for request_id, whole in self._wholes.items()
            if not whole.results and all(part.id in waiting for part in whole.request.parts)
        ]
        return [i for i in request_ids if i not in self._whole_of] + wholes


def _put_together(whole: _Whole) -> Result:
    """One result of those of all parts; choices are numbered through. An error stands alone."""
    request = whole.request
    parts = [whole.results[part.id] for part in request.parts]
    error = _error(parts, request)
    if error is not None:
        parts = [dataclasses.replace(part, outputs=[]) for part in parts]
    outputs = list(chain.from_iterable(part.outputs for part in parts))
    numbered = iter([dataclasses.replace(o, index=index) for index, o in enumerate(outputs)])
    parts = [
        dataclasses.replace(part, outputs=[next(numbered) for _ in part.outputs]) for part in parts
    ]
    return Result(
        request_id=request.id,
        prompt_token_ids=list(chain.from_iterable(part.prompt_token_ids for part in parts)),
        outputs=list(chain.from_iterable(part.outputs for part in parts)),
        error=error,
        num_cached_tokens=sum(part.num_cached_tokens for part in parts),
        parts=parts,
    )


def _error(parts: list[Result], request: Request) -> RequestError | None:
    """That of the first part that failed by itself, else that of one that was cancelled."""
    errors = [(index, part.error) for index, part in enumerate(parts) if part.error is not None]
    for index, error in errors:
        if error.code != "cancelled":
            named = error.message.replace(request.parts[index].id, request.id)
            return entry_error(index, RequestError(named, code=error.code, param=error.param))
    return errors[0][1] if errors else None


def part_id(request_id: str, index: int) -> str:
    """The id of a part, which also keys its randomness."""
    return f"{request_id}\0{index}"


def entry_error(index: int, error: RequestError) -> RequestError:
    """The error of one part, as that of its request."""
    message = f"entry {index} of the list: {error.message}"
    return RequestError(message, code=error.code, param=error.param, line=error.line)

"""run_through: requests through an engine, as many at once as it may have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from batchwright.errors import RequestError
from batchwright.outputs import failed
from batchwright.request import Request, Result


class StepEngine(Protocol):
    """What is needed of an engine."""

    @property
    def num_unfinished(self) -> int: ...
    def add(self, request: Request) -> None: ...
    def step(self) -> list[Result]: ...


def run_through(engine: StepEngine, requests: Iterable[Request], horizon: int) -> Iterator[Result]:
    """Results of all requests as they finish, reading ahead at most `horizon` rows.

    A request the engine refuses yields a result with its error.
    """
    source = iter(requests)
    exhausted = False
    while True:
        while not exhausted and engine.num_unfinished < horizon:
            request = next(source, None)
            if request is None:
                exhausted = True
                break
            try:
                engine.add(request)
            except RequestError as error:
                yield failed(request, error)
        if not engine.num_unfinished:
            return
        yield from engine.step()

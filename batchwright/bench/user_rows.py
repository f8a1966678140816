"""A file of the user's as a workload: its prompts, with outputs as long as its rows allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from batchwright.bench.workloads import WorkRequest
from batchwright.errors import InputError, RequestError
from batchwright.job.prepare import Tokenizer, prepare_rows
from batchwright.job.rows import InputRow, RowError, groups
from batchwright.job.validate import parse_row
from batchwright.limits import ModelLimits
from batchwright.request import Request, Task

CHUNK_ROWS = 256


class UserRows(NamedTuple):
    """What can be measured of a file, and how many of its rows cannot."""

    requests: list[WorkRequest]
    num_left_out: int


def read_user_rows(
    rows: Iterator[InputRow | RowError], tokenizer: Tokenizer, limits: ModelLimits
) -> UserRows:
    """Read and tokenise a whole file.

    Rows that are wrong, and those that do not generate (scores, embeddings), are left out. All
    others generate one output of exactly their max_tokens, or of what the context leaves: lengths
    must be the same for every engine.

    Raises:
        InputError: no row is left, or the file cannot be read.
    """
    requests: list[WorkRequest] = []
    num_read = 0
    for chunk in groups(rows, CHUNK_ROWS):
        num_read += len(chunk)
        parsed = []
        for row in chunk:
            if isinstance(row, InputRow):
                try:
                    parsed.append(parse_row(row))
                except RequestError:
                    continue
        for request in prepare_rows(parsed, tokenizer):
            if isinstance(request, Request) and (work := _as_work(request, limits)) is not None:
                requests.append(work)
    if not requests:
        raise InputError("no row of the input generates text, so there is nothing to measure")
    return UserRows(requests, num_read - len(requests))


def _as_work(request: Request, limits: ModelLimits) -> WorkRequest | None:
    if request.task is not Task.GENERATE or request.parts or request.layout is not None:
        return None
    try:
        end = limits.check(request)
    except RequestError:
        return None
    prompt = request.prompt_token_ids.tolist()
    return WorkRequest(prompt, end - len(prompt)) if end > len(prompt) else None

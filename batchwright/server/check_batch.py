"""Checking a batch's file before it runs: one pass without the model.

Bad rows do not stop a batch: they end in its error file, like those of `batchwright run`. A batch
fails here only if no row of its file is sound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from batchwright.errors import InputError, RequestError
from batchwright.job.formats.read_input import read_input
from batchwright.job.model_names import ModelNames
from batchwright.job.rows import SCORE, SCORE_ALIAS, InputRow, RowError
from batchwright.job.validate import ParsedRow, parse_row
from batchwright.server.batch_record import BatchError

MAX_ERRORS = 100


@dataclass(frozen=True, slots=True)
class Checked:
    """What a pass found.

    Attributes:
        num_rows: all of them.
        num_sound: those that can be run, as far as can be told without the model.
        errors: the first MAX_ERRORS of the others.
    """

    num_rows: int
    num_sound: int
    errors: tuple[BatchError, ...]


def batch_rows(path: Path) -> Iterator[InputRow | RowError]:
    """The rows of a batch's file; it is read as JSON lines whatever it is called."""
    return read_input(str(path))


class RowChecks:
    """What a row of a batch has to have besides being sound.

    Args:
        endpoint: where all rows of the batch go.
        model: the name of our model.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        self._endpoints = {endpoint}
        if endpoint in (SCORE, SCORE_ALIAS):
            self._endpoints = {SCORE, SCORE_ALIAS}
        self._endpoint = endpoint
        self._names = ModelNames(model)

    def watch(self, rows: Iterator[InputRow | RowError]) -> Iterator[InputRow | RowError]:
        """The rows as they are; all of the batch goes through here (see ModelNames)."""
        return self._names.watch(rows)

    def check(self, row: ParsedRow) -> None:
        """Check a row that was seen by `watch`.

        Raises:
            RequestError: its url is not the batch's (url_mismatch), or its model (model_mismatch).
        """
        if row.endpoint not in self._endpoints:
            raise RequestError(
                f"url is {row.endpoint!r}, the batch was made for {self._endpoint!r}",
                code="url_mismatch",
                param="url",
                line=row.line,
            )
        self._names.check(row)


def check_file(path: Path, checks: RowChecks, go_on: Callable[[], bool]) -> Checked:
    """Look at every row of a file.

    Args:
        go_on: asked now and then; False ends the pass early.
    """
    num_rows = num_sound = 0
    errors: list[BatchError] = []
    try:
        for row in checks.watch(batch_rows(path)):
            if not num_rows % 1000 and not go_on():
                break
            num_rows += 1
            try:
                if isinstance(row, RowError):
                    raise row.error
                checks.check(parse_row(row))
                num_sound += 1
            except RequestError as error:
                if len(errors) < MAX_ERRORS:
                    errors.append(BatchError(error.code, error.message, row.line, error.param))
    except InputError as error:
        code = "invalid_file" if num_rows or "empty_file" not in str(error) else "empty_file"
        message = str(error).replace(str(path), "the file")
        return Checked(num_rows, 0, (BatchError(code, message),))
    return Checked(num_rows, num_sound, tuple(errors))

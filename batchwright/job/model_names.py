"""The model names that rows give: a job runs one model.

Files made for another service name its model. One foreign name throughout a file is taken to mean
ours, and is worth a warning; a second one is an error of the row that brings it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from batchwright.errors import RequestError
from batchwright.job.rows import InputRow, RowError
from batchwright.job.validate import ParsedRow

logger = logging.getLogger(__name__)


class ModelNames:
    """Checks the model names of one input.

    Args:
        own: the name of the model that runs; None if that is not known yet.

    Attributes:
        foreign: the first other name that rows give, if they do.
    """

    def __init__(self, own: str | None) -> None:
        self._own = own
        self.foreign: str | None = None

    def watch(self, rows: Iterator[InputRow | RowError]) -> Iterator[InputRow | RowError]:
        """The rows as they are. All of the input goes through here, also rows that an earlier run
        finished: which name is the first must not depend on what is left to do."""
        for row in rows:
            if self.foreign is None and isinstance(row, InputRow):
                self._note(row.body.get("model"))
            yield row

    def _note(self, name: Any) -> None:
        if not isinstance(name, str) or name == self._own:
            return
        self.foreign = name
        if self._own is not None:
            logger.warning("rows name the model %.100r; %s answers them", name, self._own)

    def check(self, row: ParsedRow) -> None:
        """Check a row that was seen by `watch`.

        Raises:
            RequestError: its model is neither ours nor the one foreign name (model_mismatch).
        """
        if row.model not in (None, self._own, self.foreign):
            raise RequestError(
                f"model is {row.model!r:.100}, but earlier rows name {self.foreign!r:.100}; "
                "a job runs one model",
                code="model_mismatch",
                param="model",
                line=row.line,
            )

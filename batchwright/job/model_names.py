"""The model names that rows give: a job runs one model.

Files made for another service name its model. One foreign name throughout a file is taken to mean
ours, and is worth a warning; a second one is an error of the row that brings it.
"""

from __future__ import annotations

import logging

from batchwright.errors import RequestError
from batchwright.job.validate import ParsedRow

logger = logging.getLogger(__name__)


class ModelNames:
    """Checks rows in input order.

    Args:
        own: the name of the model that runs; None if that is not known yet.

    Attributes:
        foreign: the other name that rows give, if they do.
    """

    def __init__(self, own: str | None) -> None:
        self._own = own
        self.foreign: str | None = None

    def check(self, row: ParsedRow) -> None:
        """Take note of a row's model.

        Raises:
            RequestError: it is neither ours nor the one foreign name (model_mismatch).
        """
        if row.model is None or row.model == self._own:
            return
        if self.foreign is None:
            self.foreign = row.model
            if self._own is not None:
                logger.warning("rows name the model %.100r; %s answers them", row.model, self._own)
        if row.model != self.foreign:
            raise RequestError(
                f"model is {row.model!r:.100}, but earlier rows name {self.foreign!r:.100}; "
                "a job runs one model",
                code="model_mismatch",
                param="model",
                line=row.line,
            )

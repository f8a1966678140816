"""GrammarCheck: whether grammars compile, before there is a model."""

from __future__ import annotations

import re
from functools import lru_cache

from batchwright.errors import RequestError
from batchwright.structured.compile import CACHE_SIZE, refusal
from batchwright.structured.spec import GrammarKind, GrammarSpec
from batchwright.structured.vocabulary import Vocabulary
from batchwright.structured.worker import Worker

# Any text can be spelled with these, so what does not compile here compiles for no model.
_BYTES = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>"], [256], [256])
_SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>")


class GrammarCheck:
    """Tries grammars in a worker process, each once; a grammar may take the worker's deadline.

    A grammar that names special tokens may be right for a model that has them: it passes.
    """

    def __init__(self) -> None:
        self._worker = Worker()
        self._reason = lru_cache(maxsize=CACHE_SIZE)(self._try)

    def check(self, spec: GrammarSpec) -> None:
        """Return if a model may be able to use it.

        Raises:
            RequestError: it cannot be compiled, or not within the worker's limits.
        """
        reason = self._reason(spec)
        if reason is not None:
            raise refusal(spec, reason)

    def close(self) -> None:
        """End the worker process."""
        self._worker.close()

    def _try(self, spec: GrammarSpec) -> str | None:
        try:
            self._worker.compile(_BYTES, spec)
        except RequestError as error:
            names_tokens = spec.kind is GrammarKind.GRAMMAR and _SPECIAL_TOKEN.search(spec.text)
            return None if names_tokens else error.message
        return None

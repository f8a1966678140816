"""GrammarCompiler: from a GrammarSpec to matchers, with a bounded cache of what was compiled."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property

import llguidance

from batchwright.errors import RequestError
from batchwright.request import SamplingParams
from batchwright.structured.grammar_text import mask_words, open_matcher
from batchwright.structured.matcher import Matcher
from batchwright.structured.spec import GrammarSpec
from batchwright.structured.vocabulary import Vocabulary, guidance_tokenizer, read_vocabulary
from batchwright.structured.worker import RowTemplate, Worker
from batchwright.text.tokenizer import Tokenizer

CACHE_SIZE = 1024
"""Grammars kept, the last used; a usual one takes some 90 kB."""

MAX_REASON_CHARS = 300


class CompiledGrammar:
    """One grammar, ready to make matchers (some 10 us and 1.4 kB each).

    Args:
        start: llguidance's matcher at the start of an output; never moved.
        tokenizer: the one it was made with.
        vocabulary: the same tokens.
    """

    def __init__(
        self,
        start: llguidance.LLMatcher,
        tokenizer: llguidance.LLTokenizer,
        vocabulary: Vocabulary,
    ) -> None:
        self._start = start
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def matcher(self, params: SamplingParams) -> Matcher:
        """A matcher for one sequence."""
        num_words = mask_words(self._tokenizer)
        return Matcher(self._start.deep_copy(), self._vocabulary, params, num_words)

    def accepts(self, text: str) -> bool:
        """Whether a whole output may read so."""
        matcher = self._start.deep_copy()
        tokens = self._tokenizer.greedy_tokenize(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


class GrammarCompiler:
    """Compiles grammars for one model, each first in the worker process. Thread-safe.

    Args:
        tokenizer: the model's.
        vocab_size: columns of the model's logits.
        worker: where text from rows is tried first.
        cache_size: grammars, and reasons why there are none, that are kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        worker: Worker | None = None,
        *,
        cache_size: int = CACHE_SIZE,
    ) -> None:
        self.worker = worker or Worker()
        self._source = tokenizer, vocab_size
        self._cache_size = cache_size
        self._cache: OrderedDict[GrammarSpec, CompiledGrammar | str] = OrderedDict()
        self._lock = threading.Lock()  # of the cache
        self._compiling = threading.Lock()  # the same grammar is not compiled twice

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """The grammar of a spec; free if it was compiled lately.

        Raises:
            RequestError: it cannot be compiled, or not within the worker's limits.
        """
        found = self._find(spec)
        if found is None:
            with self._compiling:
                found = self._find(spec)
                if found is None:
                    found = self._compile(spec)
                    self._keep(spec, found)
        if isinstance(found, str):
            raise refusal(spec, found)
        return found

    def template(self, source: str) -> RowTemplate:
        """A chat template that a row brings, to be rendered in the worker process."""
        return RowTemplate(source, self.worker)

    def close(self) -> None:
        """End the worker process."""
        self.worker.close()

    def _find(self, spec: GrammarSpec) -> CompiledGrammar | str | None:
        with self._lock:
            if spec in self._cache:
                self._cache.move_to_end(spec)
            return self._cache.get(spec)

    def _keep(self, spec: GrammarSpec, found: CompiledGrammar | str) -> None:
        with self._lock:
            self._cache[spec] = found
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar | str:
        try:
            grammar = self.worker.compile(self._vocabulary, spec)
            # It takes us as long as the worker. llguidance lets other threads run meanwhile.
            start = open_matcher(self._tokenizer, grammar)
        except RequestError as error:
            return error.message
        except ValueError as error:
            return str(error)
        return CompiledGrammar(start, self._tokenizer, self._vocabulary)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return read_vocabulary(*self._source)

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return guidance_tokenizer(self._vocabulary)


def refusal(spec: GrammarSpec, reason: str) -> RequestError:
    """The error of a row whose grammar is refused for this reason."""
    reason = " ".join(reason.replace("<non-verbose/>", "").split())
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[: MAX_REASON_CHARS - 3] + "..."
    return RequestError(
        f"the {spec.kind} cannot be used: {reason}",
        code="unsupported_grammar",
        param=spec.param,
    )

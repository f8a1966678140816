"""The real model's tokenizer, and a compiler for it, once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchwright.structured.compile import GrammarCompiler
from batchwright.text.tokenizer import Tokenizer, load_tokenizer
from batchwright.weights.locate import locate_model

VOCAB_SIZE = 49_152


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(locate_model("smollm2"))


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    yield compiler
    compiler.close()

"""Random outputs that a matcher allows, without a model."""

from __future__ import annotations

import numpy as np

from batchwright.structured.matcher import Matcher


def allowed(matcher: Matcher) -> np.ndarray:
    """Ids that may come next."""
    mask = np.full(matcher.num_words, 0xFFFFFFFF, np.uint32)
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def random_output(
    matcher: Matcher, end_ids: set[int], rng: np.random.Generator, max_tokens: int = 80
) -> tuple[list[int], bool]:
    """(tokens, whether they are a whole output); one that may end often does."""
    tokens: list[int] = []
    for _ in range(max_tokens):
        if matcher.is_complete:
            return tokens, True
        ids = allowed(matcher)
        assert len(ids), matcher.error
        token_id = int(rng.choice(ids))
        if np.isin(list(end_ids), ids).any() and rng.random() < 0.3:
            token_id = min(end_ids)
        if token_id in end_ids:
            return tokens, True
        matcher.consume(token_id)
        tokens.append(token_id)
    return tokens, False

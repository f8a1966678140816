"""SentencePiece BPE, as GGUF files store it (pieces with scores), as a `tokenizers` pipeline.

SentencePiece joins, again and again, the two neighbours whose join is the piece with the best score
(leftmost on ties; Kudo & Richardson, arXiv:1808.06226). BPE with ranked merges does the same when
every split of a piece into two pieces is a merge, ranked by the piece's score. The two can differ
only where one piece can be made in two overlapping ways, which published vocabularies do not show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from batchwright.errors import ModelFormatError

SPACE = "\u2581"  # stands for a space inside pieces
MAX_MERGE_WORK = 1 << 30  # characters copied while splitting pieces; real vocabularies need < 2^26


def spm_backend(
    tokens: list[str],
    *,
    scores: np.ndarray[Any, Any],
    mergeable: np.ndarray[Any, Any],
    byte_fallback: bool,
    unknown_id: int | None,
    add_space_prefix: bool,
) -> tokenizers.Tokenizer:
    """Build a pipeline from pieces.

    Args:
        tokens: pieces; the id of a piece is its place.
        scores: [num_tokens] float32, larger is merged earlier.
        mergeable: [num_tokens] bool, whether a piece may be made by merging.
        byte_fallback: characters without a piece become pieces "<0xHH>", one per UTF-8 byte.
        add_space_prefix: text that does not start with a space gets one.
    Raises:
        ModelFormatError: pieces too long to be a vocabulary.
    """
    work = sum(len(token) ** 2 for token in tokens)
    if work > MAX_MERGE_WORK:
        raise ModelFormatError(
            f"the file's pieces are too long to be a vocabulary (longest: {max(map(len, tokens))} "
            "characters); fetch the file again"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocab,
        merges=derive_merges(vocab, scores, mergeable),
        unk_token=None if unknown_id is None else tokens[unknown_id],
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )
    backend = tokenizers.Tokenizer(model)
    scheme = "first" if add_space_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def derive_merges(
    vocab: dict[str, int], scores: np.ndarray[Any, Any], mergeable: np.ndarray[Any, Any]
) -> list[tuple[str, str]]:
    """List every split of a piece into two pieces, best piece first.

    Pieces of equal score keep the order of their ids; of one piece's splits, the one with the
    longer left part comes first, as in transformers' conversion.
    """
    merges: list[tuple[str, str]] = []
    order = sorted(vocab.items(), key=lambda item: (-float(scores[item[1]]), item[1]))
    for token, token_id in order:
        if not mergeable[token_id]:
            continue
        for end in range(len(token) - 1, 0, -1):
            if token[:end] in vocab and token[end:] in vocab:
                merges.append((token[:end], token[end:]))
    return merges

"""How narrow a checkpoint's weights are, from its headers."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from batchwright.weights.block_tensor import FORM_BYTES
from batchwright.weights.checkpoint import Checkpoint

_TABLES = ("embed_tokens.weight", "wte.weight", "lm_head.weight")


class StoredForms(NamedTuple):
    """Keys of FORM_BYTES.

    Attributes:
        layers: of most weights of the layers.
        head: of the output head, which may be the embeddings'.
    """

    layers: str
    head: str


FP32 = StoredForms("fp32", "fp32")


def stored_forms(checkpoint: Checkpoint) -> StoredForms:
    """How products find their weights on the CPU in fp32."""
    elements: Counter[str] = Counter()
    head = "fp32"
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if name.endswith(_TABLES):
            if head == "fp32" or name.endswith(_TABLES[-1]):
                head = checkpoint.form(name)
        elif len(shape) == 2:
            elements[checkpoint.form(name)] += math.prod(shape)
    layers = elements.most_common(1)[0][0] if elements else "fp32"
    return StoredForms(layers, head)


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that all weights take on the CPU in fp32."""
    names = checkpoint.names()
    sizes = (math.prod(checkpoint.shape(one)) * FORM_BYTES[checkpoint.form(one)] for one in names)
    return math.ceil(sum(sizes))

"""ModelFlops: the arithmetic of a model, per token, per key and per line of logits.

Matrix products only, two FLOPs a weight: norms, activations and draws are not counted. What has to
be multiplied with it is counted by `sched/work.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """FLOPs of one forward pass, by what they depend on.

    Attributes:
        token: products of all layers for one token; of a mixture, with the experts it uses.
        key: scores and weighted values for one query token and one key, one entry per KV group
            (the layers that share a window).
        logits: one line of logits.
        layer_products: (inputs, outputs) of the different products of a layer.
        logits_product: the same of the output head.
    """

    token: int
    key: tuple[int, ...]
    logits: int
    layer_products: tuple[tuple[int, int], ...]
    logits_product: tuple[int, int]

    def of(self, num_tokens: int, num_keys: Sequence[int], num_logits: int) -> tuple[int, int]:
        """(FLOPs in the layers, FLOPs in the output head) of some work."""
        keys = sum(flops * num for flops, num in zip(self.key, num_keys, strict=False))
        return self.token * num_tokens + keys, self.logits * num_logits

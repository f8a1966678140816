"""AttentionContext: the `attend` a model calls; binds a step to a backend and the KV memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from batchwright.attention.backend import AttentionBackend, KVLayer
from batchwright.attention.spec import AttentionSpec


class AttentionContext:
    """One step's attention. Later techniques (shared prefixes, codecs, depth) act in here.

    Args:
        backend: computes.
        kv_layers: KV memory per layer.
        group_of_layer: KV group of each layer.
        plan: of the step, from the backend.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        kv_layers: Sequence[KVLayer],
        group_of_layer: Sequence[int],
        plan: Any,
    ) -> None:
        self._backend = backend
        self._kv_layers = kv_layers
        self._group_of_layer = group_of_layer
        self._plan = plan

    def __call__(
        self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """See `attention.spec.Attend`."""
        kv, group = self._kv_layers[spec.layer], self._group_of_layer[spec.layer]
        out, _ = self._backend.run(spec, group, q, k, v, kv, self._plan)
        return out.flatten(1)

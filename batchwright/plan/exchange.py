"""What the ranks of a divided model send to each other, and what that takes. No torch.

A layer is followed by two sums of [tokens, hidden_size] over all ranks, embeddings by one more; a
step ends with logits gathered on rank 0 and drawn tokens sent back (docs/tensor_parallel.md). A
ring all-reduce moves 2 (N - 1) / N of a tensor's bytes over each rank's link, gathering moves
(N - 1) / N of them over that of rank 0; every collective takes its latency besides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from batchwright.plan.cost import Hardware
from batchwright.plan.shape import ModelShape


class Link(NamedTuple):
    """By what a rank reaches the others.

    Attributes:
        bytes_per_s: that large tensors reach, in one direction.
        latency_s: of one collective, however small.
    """

    bytes_per_s: float
    latency_s: float


def sum_share(num_ranks: int) -> float:
    """Of a tensor's bytes, that summing it over ranks moves over each link."""
    return 2 * (num_ranks - 1) / num_ranks


def num_sums(shape: ModelShape) -> int:
    """Sums over all ranks in a step."""
    return 2 * shape.num_layers + 1


def with_exchange(
    hardware: Hardware, shape: ModelShape, link: Link, num_ranks: int, element_bytes: float
) -> Hardware:
    """The hardware of all ranks together, charged for what they send; of one rank, unchanged.

    Nothing else is done meanwhile. The two collectives of a step that draws are charged to each
    step.

    Args:
        element_bytes: of one element of hidden states and logits.
    """
    if num_ranks == 1:
        return hardware
    sent_bytes = num_sums(shape) * sum_share(num_ranks) * shape.hidden_size * element_bytes
    gathered_bytes = (num_ranks - 1) / num_ranks * shape.vocab_size * element_bytes
    return replace(
        hardware,
        token_s=hardware.token_s + sent_bytes / link.bytes_per_s,
        logits_s=hardware.logits_s + gathered_bytes / link.bytes_per_s,
        step_s=hardware.step_s + (num_sums(shape) + 2) * link.latency_s,
    )

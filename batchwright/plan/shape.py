"""ModelShape: what a model multiplies, reads and keeps; cost follows from it (`cost.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Product:
    """Products x W^T with weights of one shape.

    Attributes:
        in_features, out_features: of x and of the result.
        num_weights: matrices of this shape in the model: its layers, times experts.
        share: of the tokens, that pass through each; below 1 for the experts of a mixture.
    """

    in_features: int
    out_features: int
    num_weights: int = 1
    share: float = 1.0

    @property
    def num_elements(self) -> int:
        """Elements of all these weights."""
        return self.in_features * self.out_features * self.num_weights

    @property
    def flops_per_token(self) -> int:
        """Two a weight that the token passes."""
        return round(2 * self.num_elements * self.share)

    def num_used(self, num_tokens: int) -> float:
        """Weights that a step of so many tokens reads; of experts, the expected number."""
        return self.num_weights * (1 - (1 - self.share) ** num_tokens)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of the layers that share a window: those of one KV group."""

    window: int | None
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def flops_per_key(self) -> int:
        """Scores and weighted values for one query token and one key, in all these layers."""
        return 4 * self.num_q_heads * self.head_dim * self.num_layers

    @property
    def kv_elements(self) -> int:
        """Elements of the keys and values of one token, in all these layers."""
        return 2 * self.num_kv_heads * self.head_dim * self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that cost follows from.

    Attributes:
        products: all products of the layers, and those that lead into and out of them.
        head: the output head.
        attention: one entry per KV group, in the order of the scheduler's groups.
        num_params: elements of all parameters; a head tied to the embeddings counts once.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    products: tuple[Product, ...]
    head: Product
    attention: tuple[AttentionShape, ...]
    num_params: int

    @property
    def layer_flops_per_token(self) -> int:
        """Matrix products of all layers for one token."""
        return sum(product.flops_per_token for product in self.products)

    @property
    def attention_flops_per_key(self) -> int:
        """Scores and weighted values of all layers for one query token and one key."""
        return sum(attention.flops_per_key for attention in self.attention)

    @property
    def head_flops_per_token(self) -> int:
        """Logits of one token."""
        return self.head.flops_per_token

    def attention_flops(self, num_keys: Sequence[int]) -> int:
        """FLOPs of (query token, key) pairs, counted per KV group."""
        pairs = zip(self.attention, num_keys, strict=True)
        return sum(attention.flops_per_key * num for attention, num in pairs)

    def kv_elements_per_token(self) -> int:
        """Elements of the keys and values of one token in all layers."""
        return sum(attention.kv_elements for attention in self.attention)

    def weight_elements_read(self, num_tokens: int) -> float:
        """Elements of the layers' weights that a step of so many tokens reads."""
        return sum(
            product.in_features * product.out_features * product.num_used(num_tokens)
            for product in self.products
        )

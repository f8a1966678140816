"""Shapes of well-known models by name, for simulation without their files. No torch.

Only sizes from their config.json stand here. What is made of them is the shape of the Llama family,
the same that `models/shape.py` counts from the modules (tests compare the two).
"""

from __future__ import annotations

from typing import NamedTuple

from batchwright.errors import ConfigError
from batchwright.plan.shape import AttentionShape, ModelShape, Product


class DecoderSizes(NamedTuple):
    """Sizes of a model of the Llama family, named as in config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False


MODELS = {
    "Llama-3-8B": DecoderSizes(4096, 14336, 32, 32, 8, 128256),
    "Llama-3-70B": DecoderSizes(8192, 28672, 80, 64, 8, 128256),
    "Qwen2.5-7B": DecoderSizes(3584, 18944, 28, 28, 4, 152064, qkv_bias=True),
    "SmolLM2-135M": DecoderSizes(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "CodeLlama-13B": DecoderSizes(5120, 13824, 40, 40, 40, 32016),
    "CodeLlama-34B": DecoderSizes(8192, 22016, 48, 64, 8, 32000),
    "LLaMA-13B": DecoderSizes(5120, 13824, 40, 40, 40, 32000),
}


def find_model_shape(name: str) -> ModelShape:
    """A shape by name, in upper or lower case.

    Raises:
        ConfigError: there is none.
    """
    for known, sizes in MODELS.items():
        if known.lower() == name.lower():
            return decoder_shape(sizes)
    raise ConfigError(f"model shape is {name!r:.60}, must be one of {', '.join(MODELS)}")


def decoder_shape(sizes: DecoderSizes) -> ModelShape:
    """The shape of a model of the Llama family; q, k and v, gate and up are one product each."""
    hidden, width, num_layers = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
    head_dim = hidden // sizes.num_attention_heads
    qkv = hidden + 2 * sizes.num_key_value_heads * head_dim
    products = (
        Product(hidden, qkv, num_layers),
        Product(hidden, hidden, num_layers),
        Product(hidden, 2 * width, num_layers),
        Product(width, hidden, num_layers),
    )
    head = Product(hidden, sizes.vocab_size)
    norms = (2 * num_layers + 1) * hidden
    biases = num_layers * qkv if sizes.qkv_bias else 0
    num_embeddings = 1 if sizes.tie_word_embeddings else 2
    return ModelShape(
        hidden_size=hidden,
        vocab_size=sizes.vocab_size,
        num_layers=num_layers,
        products=products,
        head=head,
        attention=(
            AttentionShape(
                None, num_layers, sizes.num_attention_heads, sizes.num_key_value_heads, head_dim
            ),
        ),
        num_params=sum(product.num_elements for product in products)
        + num_embeddings * head.num_elements
        + norms
        + biases,
    )

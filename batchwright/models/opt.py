"""OPT (arXiv:2205.01068): learned positions with an offset, LayerNorm, ReLU MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from batchwright.attention.spec import Attend, AttentionSpec
from batchwright.models.causal_lm import CausalLM, check_learned_positions, require
from batchwright.models.functional import ACTIVATIONS
from batchwright.models.layers import Embedding, LayerNorm, Linear, Parallel

POSITION_OFFSET = 2
"""Rows at the head of the position table that no token uses."""


class Attention(nn.Module):
    """Multi-head attention; q, k and v come from one merged product."""

    def __init__(self, hidden_size: int, spec: AttentionSpec, *, bias: bool) -> None:
        super().__init__()
        self.spec = spec
        parts = {"q_proj": hidden_size, "k_proj": hidden_size, "v_proj": hidden_size}
        self.qkv_proj = Linear(hidden_size, parts, bias=bias, parallel=Parallel.COLUMN)
        self.out_proj = Linear(hidden_size, hidden_size, bias=bias, parallel=Parallel.ROW)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        head_dim = self.spec.head_dim
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in self.qkv_proj.split(x))
        return self.out_proj(attend(self.spec, q, k, v))


class Layer(nn.Module):
    """One transformer layer, normalised before its blocks or (OPT-350M) after them."""

    def __init__(self, config: Mapping[str, Any], spec: AttentionSpec) -> None:
        super().__init__()
        hidden_size, width, bias = config["hidden_size"], config["ffn_dim"], config["enable_bias"]
        self.norms_first = config["do_layer_norm_before"]
        self.activation = ACTIVATIONS[require(config, "activation_function", ACTIVATIONS)]
        self.self_attn = Attention(hidden_size, spec, bias=bias)
        self.self_attn_layer_norm = _norm(config)
        self.fc1 = Linear(hidden_size, width, bias=bias, parallel=Parallel.COLUMN)
        self.fc2 = Linear(width, hidden_size, bias=bias, parallel=Parallel.ROW)
        self.final_layer_norm = _norm(config)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        if self.norms_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), attend)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, attend))
        return self.final_layer_norm(x + self.feed_forward(x))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same shape."""
        return self.fc2(self.activation(self.fc1(x)))


class Decoder(nn.Module):
    """Embeddings, layers, final norm: the checkpoint's `model.decoder.` part.

    Where word embeddings are narrower than the layers, two products lead in and out.
    """

    def __init__(self, config: Mapping[str, Any], specs: tuple[AttentionSpec, ...]) -> None:
        super().__init__()
        hidden_size, word_size = config["hidden_size"], config["word_embed_proj_dim"]
        num_positions = config["max_position_embeddings"] + POSITION_OFFSET
        self.embed_tokens = Embedding(config["vocab_size"], word_size, parallel=True)
        self.embed_positions = Embedding(num_positions, hidden_size)
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        self.final_layer_norm: nn.Module = nn.Identity()
        if word_size != hidden_size:
            self.project_in = Linear(word_size, hidden_size)
            self.project_out = Linear(hidden_size, word_size)
        if config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]:
            self.final_layer_norm = _norm(config)
        self.layers = nn.ModuleList(Layer(config, spec) for spec in specs)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the first layer reads."""
        x: torch.Tensor = self.project_in(self.embed_tokens(token_ids))
        return x + self.embed_positions(positions + POSITION_OFFSET)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Embedded tokens through all layers."""
        for layer in self.layers:
            x = layer(x, attend)
        return self.project_out(self.final_layer_norm(x))


class OPT(CausalLM):
    """`forward` returns rows of word_embed_proj_dim, which is hidden_size in all but OPT-350M."""

    defaults = {
        "tie_word_embeddings": True,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": None,
    }

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        config = super().read_config(config)
        config["word_embed_proj_dim"] = config["word_embed_proj_dim"] or config["hidden_size"]
        return config

    def __init__(self, config: Mapping[str, Any], max_positions: int) -> None:
        super().__init__()
        check_learned_positions(max_positions, config["max_position_embeddings"])
        self.config = config
        num_heads = config["num_attention_heads"]
        head_dim = config["hidden_size"] // num_heads
        self.attention_specs = tuple(
            AttentionSpec(
                layer=layer,
                num_q_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
            )
            for layer in range(config["num_hidden_layers"])
        )
        self.model = nn.ModuleDict({"decoder": Decoder(config, self.attention_specs)})
        self.lm_head = Linear(
            config["word_embed_proj_dim"], config["vocab_size"], parallel=Parallel.VOCABULARY
        )

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        decoder = self.model["decoder"]
        assert isinstance(decoder, Decoder)
        return decoder.embed(token_ids, positions)

    def through_layers(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        hidden: torch.Tensor = self.model["decoder"](x, attend)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)


def _norm(config: Mapping[str, Any]) -> LayerNorm:
    affine = config["layer_norm_elementwise_affine"]
    return LayerNorm(config["hidden_size"], eps=1e-5, affine=affine)


Model = OPT

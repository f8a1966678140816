"""GPT-2: learned positions, LayerNorm, full multi-head attention, GELU MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from batchwright.attention.spec import Attend, AttentionSpec
from batchwright.models.causal_lm import CausalLM, check_learned_positions, require
from batchwright.models.functional import ACTIVATIONS
from batchwright.models.layers import Embedding, LayerNorm, Linear, Parallel


class Attention(nn.Module):
    """Attention over the heads of one merged product, as the checkpoint stores it."""

    def __init__(self, hidden_size: int, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.c_attn = Linear(
            hidden_size, 3 * hidden_size, bias=True, parallel=Parallel.COLUMN, num_blocks=3
        )
        self.c_proj = Linear(hidden_size, hidden_size, bias=True, parallel=Parallel.ROW)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = self.heads(self.c_attn(x))
        return self.c_proj(attend(self.spec, q, k, v))

    def heads(self, merged: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[num_tokens, 3 * hidden_size] -> q, k, v of [num_tokens, num_heads, head_dim]."""
        return merged.unflatten(-1, (3, self.spec.num_q_heads, self.spec.head_dim)).unbind(1)


class MLP(nn.Module):
    """Two products with an activation between."""

    def __init__(self, hidden_size: int, width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = Linear(hidden_size, width, bias=True, parallel=Parallel.COLUMN)
        self.c_proj = Linear(width, hidden_size, bias=True, parallel=Parallel.ROW)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: Mapping[str, Any], attention: nn.Module) -> None:
        super().__init__()
        hidden_size, eps = config["hidden_size"], config["layer_norm_epsilon"]
        self.ln_1 = LayerNorm(hidden_size, eps)
        self.attn = attention
        self.ln_2 = LayerNorm(hidden_size, eps)
        activation = require(config, "activation_function", ACTIVATIONS)
        self.mlp = MLP(hidden_size, config["n_inner"] or 4 * hidden_size, activation)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    """Embeddings, layers, final norm: the checkpoint's `transformer.` part."""

    def __init__(self, config: Mapping[str, Any], blocks: list[Block]) -> None:
        super().__init__()
        hidden_size = config["hidden_size"]
        self.wte = Embedding(config["vocab_size"], hidden_size, parallel=True)
        self.wpe = Embedding(config["max_position_embeddings"], hidden_size)
        self.h = nn.ModuleList(blocks)
        self.ln_f = LayerNorm(hidden_size, config["layer_norm_epsilon"])

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Embedded tokens through all layers."""
        for block in self.h:
            x = block(x, attend)
        return self.ln_f(x)


class GPT2(CausalLM):
    """Linear weights are stored as [in, out] and turned round when they are loaded."""

    defaults = {
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    not_weights = r".*\.attn\.(bias|masked_bias)"

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        common = {
            "hidden_size": config["n_embd"],
            "num_hidden_layers": config["n_layer"],
            "num_attention_heads": config["n_head"],
            "max_position_embeddings": config["n_positions"],
        }
        return super().read_config(config) | common

    def __init__(self, config: Mapping[str, Any], max_positions: int) -> None:
        super().__init__()
        check_learned_positions(max_positions, config["max_position_embeddings"])
        require(config, "add_cross_attention", (None, False))
        self.config = config
        layers = range(config["num_hidden_layers"])
        self.attention_specs = tuple(self.spec(layer) for layer in layers)
        blocks = [Block(config, self.attention(spec)) for spec in self.attention_specs]
        self.transformer = Decoder(config, blocks)
        self.lm_head = Linear(
            config["hidden_size"], config["vocab_size"], parallel=Parallel.VOCABULARY
        )

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.transformer.wte(token_ids) + self.transformer.wpe(positions)
        return embedded

    def through_layers(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        hidden: torch.Tensor = self.transformer(x, attend)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    def num_kv_heads(self) -> int:
        """Heads of keys and values; as many as of queries."""
        return self.config["num_attention_heads"]

    def spec(self, layer: int) -> AttentionSpec:
        """How a layer attends."""
        config = self.config
        num_heads = config["num_attention_heads"]
        head_dim = config["hidden_size"] // num_heads
        scale = head_dim**-0.5 if config["scale_attn_weights"] else 1.0
        if config["scale_attn_by_inverse_layer_idx"]:
            scale /= layer + 1
        return AttentionSpec(
            layer=layer,
            num_q_heads=num_heads,
            num_kv_heads=self.num_kv_heads(),
            head_dim=head_dim,
            scale=scale,
        )

    def attention(self, spec: AttentionSpec) -> nn.Module:
        """The attention block of one layer."""
        return Attention(self.config["hidden_size"], spec)

    @classmethod
    def fetch(cls, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        is_linear = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        return tensors[name].T if is_linear else tensors[name]


Model = GPT2

"""Llama family: Llama 2 and 3, SmolLM2, and the base that Mistral, Qwen and others vary.

N layers of: RMSNorm, grouped-query attention with rotary positions, RMSNorm, SiLU-gated MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from batchwright.attention.spec import Attend, AttentionSpec, RotaryTable
from batchwright.models.causal_lm import CausalLM, require
from batchwright.models.functional import GATED_ACTIVATIONS
from batchwright.models.layers import Embedding, Linear, Parallel, RMSNorm
from batchwright.models.rotary import rotary_parameters, rotary_table

Summands = tuple[torch.Tensor, torch.Tensor]
"""A layer's output and the residual that it is to be added to."""


class Attention(nn.Module):
    """Grouped-query attention; q, k and v come from one merged product."""

    def __init__(
        self, hidden_size: int, spec: AttentionSpec, *, qkv_bias: bool = False, o_bias: bool = False
    ) -> None:
        super().__init__()
        self.spec = spec
        q_size = spec.num_q_heads * spec.head_dim
        kv_size = spec.num_kv_heads * spec.head_dim
        self.qkv_proj = Linear(
            hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=qkv_bias,
            parallel=Parallel.COLUMN,
        )
        self.o_proj = Linear(q_size, hidden_size, bias=o_bias, parallel=Parallel.ROW)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = self.heads(x)
        return self.o_proj(attend(self.spec, q, k, v))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, each [num_tokens, its number of heads, head_dim]."""
        head_dim = self.spec.head_dim
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in self.qkv_proj.split(x))
        return q, k, v


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU and its kin, arXiv:2002.05202).

    Args:
        width: inner width.
        down: Parallel.SUMMAND: on several ranks the result is this rank's summand.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        down: Parallel = Parallel.ROW,
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(
            hidden_size,
            {"gate_proj": width, "up_proj": width},
            bias=bias,
            parallel=Parallel.COLUMN,
        )
        self.down_proj = Linear(width, hidden_size, bias=bias, parallel=down)
        self.activation = GATED_ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class Layer(nn.Module):
    """One pre-norm transformer layer.

    It leaves its last sum, output plus residual, to the norm that comes next, which does both in
    one pass on a GPU.
    """

    def __init__(self, config: Mapping[str, Any], attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        hidden_size, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.mlp = mlp

    def forward(self, x: torch.Tensor | Summands, attend: Attend) -> Summands:
        if isinstance(x, torch.Tensor):
            normed, residual = self.input_layernorm(x), x
        else:
            normed, residual = self.input_layernorm.after_sum(*x)
        attended = self.self_attn(normed, attend)
        normed, residual = self.post_attention_layernorm.after_sum(attended, residual)
        return self.mlp(normed), residual


class Decoder(nn.Module):
    """Embedding, layers, final norm: the checkpoint's `model.` part."""

    def __init__(self, embed_tokens: nn.Module, layers: list[nn.Module], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: torch.Tensor | Summands, attend: Attend) -> torch.Tensor:
        """Embedded tokens through all layers."""
        for layer in self.layers:
            x = layer(x, attend)
        return self.norm(x) if isinstance(x, torch.Tensor) else self.norm.after_sum(*x)[0]


class Llama(CausalLM):
    """Subclasses say how they differ by overriding the methods below `logits`."""

    defaults = {
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }

    def __init__(self, config: Mapping[str, Any], max_positions: int) -> None:
        super().__init__()
        self.config = config
        tables = self.rotary(max_positions)
        self.attention_specs = tuple(self.spec(layer, table) for layer, table in enumerate(tables))
        self.model = self.decoder([self.layer(spec) for spec in self.attention_specs])
        self.lm_head = Linear(
            config["hidden_size"], config["vocab_size"], parallel=Parallel.VOCABULARY
        )

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.model.embed_tokens(token_ids)
        return embedded

    def through_layers(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        hidden: torch.Tensor = self.model(x, attend)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    def head_dim(self) -> int:
        """Width of a head; older configs leave it to be derived."""
        config = self.config
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def rotary(self, max_positions: int) -> Sequence[RotaryTable | None]:
        """The rotary table of each layer; layers share one."""
        table = rotary_table(rotary_parameters(self.config), self.head_dim(), max_positions)
        return [table] * self.config["num_hidden_layers"]

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer, None for full attention."""
        return None

    def spec(self, layer: int, rotary: RotaryTable | None) -> AttentionSpec:
        """How a layer attends."""
        config, head_dim = self.config, self.head_dim()
        num_q_heads = config["num_attention_heads"]
        return AttentionSpec(
            layer=layer,
            num_q_heads=num_q_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_q_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rotary=rotary,
            window=self.window(layer),
        )

    def attention(self, spec: AttentionSpec) -> nn.Module:
        """The attention block of one layer."""
        bias = self.config["attention_bias"]
        return Attention(self.config["hidden_size"], spec, qkv_bias=bias, o_bias=bias)

    def mlp(self, layer: int) -> nn.Module:
        """The feed-forward block of one layer."""
        config = self.config
        return MLP(
            config["hidden_size"],
            config["intermediate_size"],
            activation=require(config, "hidden_act", GATED_ACTIVATIONS),
            bias=config["mlp_bias"],
        )

    def layer(self, spec: AttentionSpec) -> nn.Module:
        """One layer of the decoder."""
        return Layer(self.config, self.attention(spec), self.mlp(spec.layer))

    def decoder(self, layers: list[nn.Module]) -> Decoder:
        """Everything but the output head."""
        config = self.config
        embedding = Embedding(config["vocab_size"], config["hidden_size"], parallel=True)
        return Decoder(embedding, layers, RMSNorm(config["hidden_size"], config["rms_norm_eps"]))


Model = Llama

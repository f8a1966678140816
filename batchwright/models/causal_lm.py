"""CausalLM: what the executor expects of every architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from batchwright.attention.spec import Attend, AttentionSpec
from batchwright.errors import ConfigError, UnsupportedModelError


class CausalLM(nn.Module):
    """A decoder-only model in plain PyTorch that knows nothing about batching.

    A file of this folder named for a config.json `model_type` defines `Model`, a subclass with the
    constructor `Model(config, max_positions)`; the file is the registration. Attribute names are
    the checkpoint's names, merged projections aside (`layers.Linear` names its parts), so weights
    load without a translation table. The constructor runs under the meta device, except for tables
    it computes itself.

    Attributes:
        attention_specs: one per layer that owns KV, in layer order.
        config: what `read_config` returned.
        dtype: of activations. Weights that are laid out for our own products may be narrower.
        defaults: entries that a config.json may leave out, as the architecture then means them.
        not_weights: regular expression for names of checkpoint tensors this model has no use for.
    """

    attention_specs: tuple[AttentionSpec, ...]
    config: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    defaults: ClassVar[Mapping[str, Any]] = {}
    not_weights: ClassVar[str] = r".*rotary_emb\.inv_freq"

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json under the names that callers of every architecture use.

        Returns:
            The config with defaults filled in and at least vocab_size, hidden_size,
            num_hidden_layers, num_attention_heads, max_position_embeddings (the trained context)
            and tie_word_embeddings.
        """
        return {**cls.defaults, **config}

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Hidden states as the output head reads them: after the final norm.

        Args:
            token_ids: [num_tokens] int64, any number of sequences one after the other.
            positions: [num_tokens] int64, position of each token in its own sequence.
            attend: called once per layer; see attention/spec.py.
        Returns:
            [num_tokens, hidden_size] in the model's dtype.
        """
        return self.through_layers(self.embed(token_ids, positions), attend)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the first layer reads, [num_tokens, hidden_size], memory of its own."""
        raise NotImplementedError

    def through_layers(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The rest of `forward`; may overwrite x. It depends on nothing else but its weights."""
        raise NotImplementedError

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size]."""
        raise NotImplementedError

    @classmethod
    def fetch(cls, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """Value of a parameter, or of one part of a merged one, from a checkpoint.

        Args:
            tensors: the checkpoint, read when indexed.
            name: this model's name for it. Changed where checkpoints name or lay it out otherwise.
        """
        return tensors[name]


def require(config: Mapping[str, Any], name: str, supported: Collection[Any]) -> Any:
    """config[name], which must be one of the supported values; an absent entry is None.

    Raises:
        UnsupportedModelError: naming the setting, its value and what is supported.
    """
    value = config.get(name)
    if value not in supported:
        raise UnsupportedModelError(
            f"unsupported: {name} {value!r} (model_type {config.get('model_type')!r}); "
            f"supported: {', '.join(str(choice) for choice in supported)}"
        )
    return value


def check_learned_positions(max_positions: int, num_learned: int) -> None:
    """Refuse contexts longer than a learned position table.

    Raises:
        ConfigError: naming both lengths.
    """
    if max_positions > num_learned:
        raise ConfigError(
            f"a context of {max_positions} tokens was asked for, the model has learned "
            f"{num_learned} positions; set max_model_len to {num_learned} or less"
        )

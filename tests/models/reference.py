"""Tiny random checkpoints made by transformers, and its logits for them: the outside reference.

Weights are large (standard deviation 0.3), norms away from one and biases away from zero, so that
attention is far from uniform and a wrong mask, position or scale shows in the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

TOLERANCE = 4e-5
"""fp32: largest logit difference over the largest logit. Sums taken in another order differ by 1e-6
to 1e-5 of it (measured, all checkpoints and three seeds)."""

CONTROL = 10 * TOLERANCE
"""What a mistake must exceed to count as seen."""

LENGTHS = (1, 2, 37, 63, 65, 130)
"""Odd prompt lengths: a lone token, around and across multiples of 32, several blocks."""

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT: dict[str, Any] = {
    "vocab_size": 131,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 48,
    "ffn_dim": 61,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "init_std": 0.3,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
_GEMMA3_TEXT = {**_COMMON, "num_hidden_layers": 4, "head_dim": 10, "sliding_window": 19}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}

TINY: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _COMMON),
    "llama_biased": (
        transformers.LlamaConfig,
        {
            **_COMMON,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 10,
            "tie_word_embeddings": True,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "llama_linear": (transformers.LlamaConfig, {**_COMMON, "rope_parameters": _LINEAR_ROPE}),
    "llama_yarn": (transformers.LlamaConfig, {**_COMMON, "rope_parameters": _YARN_ROPE}),
    "mistral": (transformers.MistralConfig, {**_COMMON, "sliding_window": 17}),
    "mistral_full": (transformers.MistralConfig, {**_COMMON, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {**_COMMON, "tie_word_embeddings": True}),
    "qwen2_window": (
        transformers.Qwen2Config,
        {**_COMMON, "use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {**_COMMON, "head_dim": 10}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            **_COMMON,
            "head_dim": 10,
            "moe_intermediate_size": 24,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe_raw": (  # probabilities as they are, every second layer sparse
        transformers.Qwen3MoeConfig,
        {
            **_COMMON,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
        },
    ),
    "mixtral": (
        transformers.MixtralConfig,
        {**_COMMON, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "smollm3": (
        transformers.SmolLM3Config,
        {**_COMMON, "num_hidden_layers": 4, "no_rope_layer_interval": 2},
    ),
    "smollm3_window": (
        transformers.SmolLM3Config,
        {
            **_COMMON,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 23,
        },
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {
            **_COMMON,
            "head_dim": 10,
            "sliding_window": 19,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 9.0,
        },
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        {
            **_GEMMA3_TEXT,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 11,
            "rope_parameters": _GEMMA3_ROPE,
        },
    ),
    "gemma3": (
        transformers.Gemma3Config,
        {
            "text_config": {
                **_GEMMA3_TEXT,
                "sliding_window_pattern": 2,
                "rope_parameters": _GEMMA3_ROPE,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 96,
            "boi_token_index": 95,
            "eoi_token_index": 94,
        },
    ),
    "opt": (transformers.OPTConfig, _OPT),
    "opt_post_norm": (
        transformers.OPTConfig,
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 26},
    ),
    "opt_plain": (  # as Galactica
        transformers.OPTConfig,
        {
            **_OPT,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
        },
    ),
    "gpt2": (transformers.GPT2Config, _GPT),
    "gpt2_scaled": (
        transformers.GPT2Config,
        {**_GPT, "scale_attn_by_inverse_layer_idx": True, "n_inner": 55},
    ),
    "gpt_bigcode": (transformers.GPTBigCodeConfig, _GPT),
    "gpt_bigcode_multi_head": (transformers.GPTBigCodeConfig, {**_GPT, "multi_query": False}),
}
"""Checkpoint name: (transformers' config class, its arguments)."""


def make_checkpoint(name: str, path: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write a tiny random checkpoint and return transformers' model of it.

    Args:
        name: key of TINY.
        path: directory for config.json, generation_config.json and model.safetensors; no
            tokenizer, so requests give token ids (all models have more than 90).
        seed: of the weights.
        changes: of the config's arguments.
    Returns:
        The model in fp32 and evaluation mode, with the weights that were saved.
    """
    config_class, settings = TINY[name]
    torch.manual_seed(seed)
    config = config_class(**{**settings, **changes})
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    if name == "gemma3":
        model = transformers.Gemma3ForConditionalGeneration._from_config(config, **eager)
    else:
        model = AutoModelForCausalLM.from_config(config, **eager)
    model.eval()
    centre = 0.0 if name.startswith("gemma") else 1.0
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in parameter_name or ".ln_" in parameter_name:
                parameter.uniform_(centre - 0.4, centre + 0.6)
    model.save_pretrained(path)
    return model


def reference_logits(
    model: PreTrainedModel, sequences: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """transformers' logits of each sequence alone: [num_tokens, vocab_size] fp32 each."""
    with torch.inference_mode():
        return [model(ids[None], use_cache=False).logits[0].float() for ids in sequences]


def random_sequences(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    """Token ids below 90, [length] int64 each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 90, (length,), generator=generator) for length in lengths]


def relative_error(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Largest difference of any logit over the largest logit; infinite if anything is NaN."""
    differences = torch.cat(list(ours)) - torch.cat(list(theirs))
    scale = torch.cat(list(theirs)).abs().max()
    return torch.nan_to_num(differences.abs().max() / scale, nan=torch.inf).item()


def rms_error(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Root mean square of the differences over that of the logits."""
    mine, yours = torch.cat(list(ours)), torch.cat(list(theirs))
    return ((mine - yours).square().mean() / yours.square().mean()).sqrt().item()

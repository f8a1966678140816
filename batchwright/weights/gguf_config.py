"""GGUF metadata as a Hugging Face `config.json` and `generation_config.json`.

What GGUF leaves out because llama.cpp knows it by architecture (activation functions, which layers
have a window, Gemma's query scale) is filled in from the published model definitions.
"""

from __future__ import annotations

import logging
from typing import Any

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.weights.gguf import GgufFile
from batchwright.weights.gguf_keys import ArchitectureKeys
from batchwright.weights.gguf_names import ARCHITECTURES, count_blocks
from batchwright.weights.gguf_rope import rope_scaling_from_gguf

logger = logging.getLogger(__name__)

_GEMMA_27B_BLOCKS = {"gemma2": 46, "gemma3": 62}
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def config_from_gguf(gguf: GgufFile) -> dict[str, Any]:
    """Return what the model's `config.json` would hold.

    Rotary settings are in the classic form: `rope_theta`, `rope_scaling` (None or a dict with
    "rope_type") and, for Gemma 3, `rope_local_base_freq`. `torch_dtype` is there only if all
    matrices are stored in one of F32, F16 and BF16.

    Raises:
        UnsupportedModelError: an architecture or feature that cannot be run.
        ModelFormatError: a key is missing or contradicts the tensors.
    """
    architecture = gguf.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{gguf.path}: unsupported: GGUF architecture {str(architecture)[:60]!r}; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    keys = ArchitectureKeys(gguf.path, architecture, gguf.metadata)
    if architecture in ("gpt2", "starcoder"):
        config = _gpt_config(keys, gguf)
    else:
        config = _decoder_config(keys, gguf) | _FAMILIES[architecture](keys, gguf)
    _check_sizes(keys, gguf)
    config["vocab_size"] = gguf.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    config |= _token_ids(gguf, config["vocab_size"])
    dtypes = {info.ggml_type.name for info in gguf.tensors.values() if len(info.shape) > 1}
    if len(dtypes) == 1 and (dtype := _DTYPE_NAMES.get(dtypes.pop())):
        config["torch_dtype"] = dtype
    return config


def generation_config_from_gguf(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Return what `generation_config.json` would hold: token ids; eos_token_id is a list of all.

    Args:
        config: what `config_from_gguf` returned for this file.
    """
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
    ends = [_token_id(gguf, name, config["vocab_size"]) for name in ("eot", "eom")]
    ends = [end for end in dict.fromkeys([config.get("eos_token_id"), *ends]) if end is not None]
    return ids | ({"eos_token_id": ends} if ends else {})


def _decoder_config(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    """Return the keys that all rotary decoders share."""
    hidden_size = keys.count("embedding_length")
    num_heads = keys.count("attention.head_count")
    head_dim = keys.optional_count("attention.key_length") or hidden_size // num_heads
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{keys.path}: unsupported: keys and values of different sizes; supported: equal sizes"
        )
    rope_theta = keys.number("rope.freq_base", 10000.0)
    config = {
        "hidden_size": hidden_size,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling_from_gguf(keys, gguf, rope_theta, head_dim),
        "sliding_window": keys.optional_count("attention.sliding_window"),
        "hidden_act": "silu",
    }
    rotary_dim = keys.count("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    return config


def _llama(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    """Llama, Mistral (when it has a window) and Mixtral (when it has experts) share a name."""
    num_experts = keys.optional_count("expert_count")
    if num_experts:
        return {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": num_experts,
            "num_experts_per_tok": keys.count("expert_used_count"),
        }
    if keys.optional_count("attention.sliding_window"):
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": _has_attention_bias(gguf),
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
    }


def _has_attention_bias(gguf: GgufFile) -> bool:
    """Tell what the config says in families that may or may not have projection biases."""
    return "blk.0.attn_q.bias" in gguf.tensors


def _smollm3(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    """Every fourth layer has no rotary embedding; 1 in `no_rope_layers` means that it has."""
    num_layers = keys.count("block_count")
    _check_blocks(keys, gguf, num_layers)  # before a list of that length is made
    return {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": _has_attention_bias(gguf),
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(num_layers)],
    }


def _qwen2(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def _qwen3(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": _has_attention_bias(gguf),
    }


def _qwen3moe(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    """All published models renormalise the chosen experts' weights and are sparse everywhere."""
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": _has_attention_bias(gguf),
        "num_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    """Return what Gemma 2 and 3 share; the 27B models scale queries by the mean head size."""
    hidden_size, num_heads = keys.count("embedding_length"), keys.count("attention.head_count")
    scalar = keys.optional_count("attention.key_length") or hidden_size // num_heads
    if keys.count("block_count") == _GEMMA_27B_BLOCKS[keys.architecture]:
        scalar = hidden_size // num_heads
    return {
        "attention_bias": _has_attention_bias(gguf),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": keys.optional_number("final_logit_softcapping"),
        "attn_logit_softcapping": keys.optional_number("attn_logit_softcapping"),
    }


def _gemma2(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    """Windows and full attention alternate, beginning with a window."""
    return _gemma(keys, gguf) | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "layer_types": _layer_types(keys, gguf, period=2),
    }


def _gemma3(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    """Five windows, then one full layer; windows rotate with their own base, unscaled."""
    return _gemma(keys, gguf) | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "rope_theta": keys.number("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
        "layer_types": _layer_types(
            keys, gguf, period=keys.count("attention.sliding_window_pattern", 6)
        ),
    }


def _layer_types(keys: ArchitectureKeys, gguf: GgufFile, period: int) -> list[str]:
    """Return the kind of each layer: every period-th is full, or all are if there is no window."""
    num_layers = keys.count("block_count")
    _check_blocks(keys, gguf, num_layers)  # before a list of that length is made
    if keys.optional_count("attention.sliding_window") is None:
        period = 1
    kinds = ("sliding_attention", "full_attention")
    return [kinds[(layer + 1) % period == 0] for layer in range(num_layers)]


_FAMILIES = {
    "llama": _llama,
    "smollm3": _smollm3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}


def _gpt_config(keys: ArchitectureKeys, gguf: GgufFile) -> dict[str, Any]:
    """GPT-2, and GPT-BigCode (named starcoder), whose heads share one key and value."""
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": keys.count("embedding_length"),
        "n_layer": keys.count("block_count"),
        "n_head": keys.count("attention.head_count"),
        "n_positions": keys.count("context_length"),
        "n_inner": keys.count("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
    }
    if keys.architecture == "starcoder":
        if keys.count("attention.head_count_kv", 1) != 1:
            raise UnsupportedModelError(
                f"{keys.path}: unsupported: starcoder with several key-value heads; supported: one"
            )
        config |= {
            "model_type": "gpt_bigcode",
            "architectures": ["GPTBigCodeForCausalLM"],
            "activation_function": "gelu_pytorch_tanh",
            "multi_query": True,
        }
    return config


def _check_blocks(keys: ArchitectureKeys, gguf: GgufFile, num_layers: int) -> None:
    num_blocks = count_blocks(gguf.tensors)
    if num_blocks != num_layers:
        raise ModelFormatError(
            f"{keys.path}: metadata says {num_layers} blocks, the tensors are of {num_blocks}; "
            "the file is damaged, fetch it again"
        )


def _check_sizes(keys: ArchitectureKeys, gguf: GgufFile) -> None:
    """Check the sizes that later code divides or allocates by against the tensors."""
    _check_blocks(keys, gguf, keys.count("block_count"))
    hidden_size, num_heads = keys.count("embedding_length"), keys.count("attention.head_count")
    num_kv_heads = keys.count("attention.head_count_kv", num_heads)
    if num_heads > hidden_size or num_heads % num_kv_heads:
        raise ModelFormatError(
            f"{keys.path}: {num_heads} query heads and {num_kv_heads} key-value heads do not fit "
            f"hidden size {hidden_size}; the file is damaged, fetch it again"
        )
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden_size:
        shape = "missing" if embedding is None else list(embedding.shape)
        raise ModelFormatError(
            f"{keys.path}: tensor 'token_embd.weight' is {shape}, expected [vocabulary, "
            f"{hidden_size}]; the file is damaged, fetch it again"
        )


def _token_ids(gguf: GgufFile, vocab_size: int) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: _token_id(gguf, name, vocab_size) for key, name in names.items()}
    return {key: token_id for key, token_id in ids.items() if token_id is not None}


def _token_id(gguf: GgufFile, name: str, vocab_size: int) -> int | None:
    """Return a special token's id, or None if there is none or no such token can occur."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = gguf.metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        logger.warning("%s: ignoring %s = %.60s: no such token", gguf.path, key, value)
        return None
    return value

"""Rotary scaling of a GGUF file as Hugging Face's `rope_scaling`."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.weights.dequantize import dequantize
from batchwright.weights.gguf import GgufFile
from batchwright.weights.gguf_keys import ArchitectureKeys
from batchwright.weights.gguf_names import ROPE_FACTORS

_FLOAT_TYPES = ("F32", "F16", "BF16")


def rope_scaling_from_gguf(
    keys: ArchitectureKeys, gguf: GgufFile, rope_theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Return `rope_scaling` as config.json has it (with "rope_type"), or None for plain rotation.

    Raises:
        UnsupportedModelError: another kind than linear, yarn and llama3.
        ModelFormatError: the settings are damaged.
    """
    if ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(keys, gguf, rope_theta, head_dim)
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{keys.path}: unsupported: rotary scaling {kind[:60]!r}; supported: none, linear, "
            "yarn, and llama3 (as rope_freqs.weight)"
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    optional: dict[str, float | None] = {
        "original_max_position_embeddings": keys.optional_count(
            "rope.scaling.original_context_length"
        )
    }
    if kind == "yarn":
        optional |= {
            "attention_factor": keys.optional_number("rope.scaling.yarn_attn_factor"),
            "beta_fast": keys.optional_number("rope.scaling.yarn_beta_fast"),
            "beta_slow": keys.optional_number("rope.scaling.yarn_beta_slow"),
        }
    return scaling | {name: value for name, value in optional.items() if value is not None}


def _llama3_scaling(
    keys: ArchitectureKeys, gguf: GgufFile, rope_theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Recover the llama3 rotary settings from the frequency divisors that GGUF stores.

    Divisors fix the factor and the ratios of the rest only, so the remaining settings are taken
    from what every published model uses (1, 4, 8192) and the divisors recomputed to see that they
    agree.
    """
    info = gguf.tensors[ROPE_FACTORS]
    if info.shape != (head_dim // 2,) or info.ggml_type.name not in _FLOAT_TYPES:
        raise ModelFormatError(
            f"{gguf.path}: tensor {ROPE_FACTORS!r} is {info.ggml_type.name} {list(info.shape)}, "
            f"expected F32 [{head_dim // 2}]; the file is damaged, fetch it again"
        )
    stored = dequantize(gguf.raw(ROPE_FACTORS), info.ggml_type, info.shape).astype(np.float64)
    if (stored == 1).all():
        return None
    original = keys.count("rope.scaling.original_context_length", 8192)
    low, high, factor = 1.0, 4.0, float(stored.max())
    turns = original / (2 * np.pi) * rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    with np.errstate(all="ignore"):  # factors from a damaged file: compared, never used
        expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(stored, expected, rtol=1e-3, atol=0):
        raise UnsupportedModelError(
            f"{gguf.path}: unsupported: rotary factors in {ROPE_FACTORS!r} that are not llama3's "
            f"(largest {factor:g}, original context {original}); supported: llama3 with frequency "
            "factors 1 and 4"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }

"""Rotary tables from a checkpoint's config: plain, linear, Llama 3 and YaRN scaling.

The order of operations is the reference's: one unit in the last place of a frequency is an angle
of 0.006 at position 100,000.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from batchwright.attention.spec import RotaryTable
from batchwright.errors import UnsupportedModelError


def rotary_parameters(config: Mapping[str, Any], layer_type: str | None = None) -> dict[str, Any]:
    """The rope settings of a config.json in one form: rope_type, rope_theta and the factors.

    Old files have `rope_theta` and `rope_scaling`; new ones `rope_parameters`, possibly one entry
    per layer type ("full_attention", "sliding_attention").

    Raises:
        UnsupportedModelError: only part of each head is rotated.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if layer_type is not None and isinstance(parameters.get(layer_type), Mapping):
        parameters = dict(parameters[layer_type])
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = config.get("rope_theta") or 10000.0
    trained = config.get("original_max_position_embeddings")
    if trained is not None or parameters.get("original_max_position_embeddings") is None:
        trained = trained or config.get("max_position_embeddings")
        parameters["original_max_position_embeddings"] = trained
    for settings in (parameters, config):
        if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"unsupported: partial_rotary_factor {settings['partial_rotary_factor']} "
                f"(model_type {config.get('model_type')!r}); supported: 1"
            )
    return parameters


def rotary_table(parameters: Mapping[str, Any], rotary_dim: int, max_positions: int) -> RotaryTable:
    """cos and sin for positions [0, max_positions), computed in fp32.

    Args:
        parameters: see `rotary_parameters`.
        rotary_dim: head dimensions that are rotated, even.
        max_positions: rows of the table.
    Raises:
        UnsupportedModelError: unknown rope_type.
    """
    # the device is named because models are built under the meta device
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    periods = float(parameters["rope_theta"]) ** exponents  # [rotary_dim / 2] positions per radian
    attention_factor = 1.0
    match parameters["rope_type"]:
        case "default":
            inv_freq = 1.0 / periods
        case "linear":
            inv_freq = 1.0 / periods / float(parameters["factor"])
        case "llama3":
            inv_freq = _llama3(1.0 / periods, parameters)
        case "yarn":
            inv_freq, attention_factor = _yarn(periods, parameters)
        case other:
            raise UnsupportedModelError(
                f"unsupported: rope_type {other!r}; supported: default, linear, llama3, yarn"
            )
    positions = torch.arange(max_positions, dtype=torch.float32, device="cpu")
    angles = positions[:, None] * inv_freq[None, :]
    return RotaryTable(angles.cos() * attention_factor, angles.sin() * attention_factor)


def _llama3(inv_freq: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: stretch long wavelengths by `factor`, keep short ones, blend between."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    trained = float(parameters["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inv_freq
    blend = (trained / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > trained / low, inv_freq / factor, inv_freq)
    is_medium = (wavelength <= trained / low) & (wavelength >= trained / high)
    return torch.where(is_medium, blended, scaled)


def _yarn(periods: torch.Tensor, parameters: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv:2309.00071): interpolate slow dimensions, keep fast ones, scale attention."""
    half_dim = len(periods)
    trained = float(parameters["original_max_position_embeddings"])
    factor, theta = float(parameters["factor"]), float(parameters["rope_theta"])

    def dimension(num_rotations: float) -> float:
        """The (fractional) pair that turns so many times within the trained context."""
        return half_dim * math.log(trained / (num_rotations * 2 * math.pi)) / math.log(theta)

    low = dimension(float(parameters.get("beta_fast") or 32))
    high = dimension(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half_dim - 1)
    pairs = torch.arange(half_dim, dtype=torch.float32, device="cpu")
    keep = 1 - ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
    inv_freq = 1.0 / (factor * periods) * (1 - keep) + 1.0 / periods * keep
    return inv_freq, _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """What cos and sin are multiplied by, so that scores grow with its square."""

    def magnitude(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if numerator and denominator:
        return magnitude(numerator) / magnitude(denominator)
    return magnitude(1.0)

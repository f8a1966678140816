"""Which GGUF tensor holds which Hugging Face tensor, and what the conversion to GGUF changed.

llama.cpp's converter renames every tensor and alters some values; this file says, per architecture,
how to name them back and how to undo the changes:
- `llama` and `smollm3`: rows of the query and key projections are interleaved for another form of
  the rotary embedding;
- `gemma2` and `gemma3`: 1 is added to every norm weight;
- `gpt2`: the projections, which Hugging Face stores as [in, out], are transposed;
- mixture of experts: one tensor per expert is stacked into one per layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.errors import ModelFormatError, UnsupportedModelError

Float32Array = npt.NDArray[np.float32]
AnyArray = npt.NDArray[Any]


class TensorSource(NamedTuple):
    """Where a Hugging Face tensor comes from: a GGUF tensor, or one expert of a stacked one.

    Attributes:
        reorder: puts the stored rows in Hugging Face's order, whatever an element is.
        undo: turns the stored values into Hugging Face's.
    """

    gguf_name: str
    expert: int | None = None
    reorder: Callable[[AnyArray], AnyArray] | None = None
    undo: Callable[[Float32Array], Float32Array] | None = None

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the Hugging Face tensor's shape, given that of the GGUF tensor."""
        if self.expert is not None:
            return stored[1:]
        return stored[::-1] if self.undo is _transpose else stored


@dataclass(frozen=True)
class _Layout:
    """Names of one architecture: GGUF stem to Hugging Face stem, per model and per block."""

    model: dict[str, str]
    block_prefix: str
    block: dict[str, str]
    experts: dict[str, str] = field(
        default_factory=dict
    )  # stacked stem: one expert's, "{}" its index
    interleaved: bool = False
    norms_plus_one: bool = False
    transposed: tuple[str, ...] = ()  # stems whose weight is transposed


_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_BLOCK = _LLAMA_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT_MODEL = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_MIXTRAL_EXPERTS = {  # as on the hub: w1 is the gate, w2 the down and w3 the up projection
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_QWEN_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
}

_LAYOUTS: dict[str, _Layout] = {
    "llama": _Layout(
        _DECODER,
        "model.layers",
        _LLAMA_BLOCK | {"ffn_gate_inp": "block_sparse_moe.gate"},
        experts=_MIXTRAL_EXPERTS,
        interleaved=True,
    ),
    "smollm3": _Layout(_DECODER, "model.layers", _LLAMA_BLOCK, interleaved=True),
    "qwen2": _Layout(_DECODER, "model.layers", _LLAMA_BLOCK),
    "qwen3": _Layout(_DECODER, "model.layers", _LLAMA_BLOCK | _QK_NORMS),
    "qwen3moe": _Layout(
        _DECODER,
        "model.layers",
        _LLAMA_BLOCK | _QK_NORMS | {"ffn_gate_inp": "mlp.gate"},
        experts=_QWEN_EXPERTS,
    ),
    "gemma2": _Layout(_DECODER, "model.layers", _GEMMA_BLOCK, norms_plus_one=True),
    "gemma3": _Layout(_DECODER, "model.layers", _GEMMA_BLOCK | _QK_NORMS, norms_plus_one=True),
    "gpt2": _Layout(
        _GPT_MODEL,
        "transformer.h",
        _GPT_BLOCK,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "starcoder": _Layout(_GPT_MODEL, "transformer.h", _GPT_BLOCK),
}

ARCHITECTURES = tuple(_LAYOUTS)
"""Values of `general.architecture` that can be read."""

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor that is no weight: rotary frequency divisors, read by `gguf_config.py`."""

_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(\w+)\.(weight|bias)", re.ASCII)
_MODEL_NAME = re.compile(r"(\w+)\.(weight|bias)", re.ASCII)


def count_blocks(gguf_names: Iterable[str]) -> int:
    """Return the number of blocks: one more than the largest block index, 0 if there are none."""
    matches = (_BLOCK_NAME.fullmatch(name) for name in gguf_names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def map_names(
    path: Path,
    architecture: str,
    shapes: dict[str, tuple[int, ...]],
    num_q_heads: int,
    num_kv_heads: int,
) -> dict[str, TensorSource]:
    """Map Hugging Face names to their sources in a GGUF file.

    Args:
        path: the file, for messages only.
        architecture: one of ARCHITECTURES.
        shapes: row-major shape of every GGUF tensor by its name.
    Raises:
        UnsupportedModelError: a tensor that the architecture does not have; leaving it out would
            quietly run another model.
        ModelFormatError: a projection whose rows do not divide into heads.
    """
    layout = _LAYOUTS[architecture]
    heads = {"attn_q": num_q_heads, "attn_k": num_kv_heads} if layout.interleaved else {}
    sources: dict[str, TensorSource] = {}
    for name, shape in shapes.items():
        if name == ROPE_FACTORS or name.endswith(".attn_rot_embd.weight"):
            continue
        stem, prefix, kind, table = _split(layout, name)
        if stem in layout.experts and kind == "weight" and len(shape) == 3:
            for expert in range(shape[0]):
                hf_name = f"{prefix}{layout.experts[stem].format(expert)}.{kind}"
                sources[hf_name] = TensorSource(name, expert)
            continue
        if stem not in table:
            raise UnsupportedModelError(
                f"{path}: unsupported: tensor {name!r} for architecture {architecture!r}; "
                f"supported: {', '.join(sorted(table | layout.experts))}"
            )
        if stem in heads and shape[0] % (2 * heads[stem]):
            raise ModelFormatError(
                f"{path}: tensor {name!r} has {shape[0]} rows, they must divide into {heads[stem]} "
                "heads of an even size; the file is damaged, fetch it again"
            )
        sources[f"{prefix}{table[stem]}.{kind}"] = TensorSource(
            name,
            reorder=partial(_deinterleave, num_heads=heads[stem]) if stem in heads else None,
            undo=_undo(layout, stem, kind),
        )
    return sources


def _split(layout: _Layout, name: str) -> tuple[str, str, str, dict[str, str]]:
    """Return (stem, Hugging Face prefix, weight or bias, table of stems) of a GGUF name."""
    match = _BLOCK_NAME.fullmatch(name)
    if match:
        return match[2], f"{layout.block_prefix}.{match[1]}.", match[3], layout.block
    match = _MODEL_NAME.fullmatch(name)
    if match:
        return match[1], "", match[2], layout.model
    return name, "", "", layout.model


def _undo(layout: _Layout, stem: str, kind: str) -> Callable[[Float32Array], Float32Array] | None:
    """Return what turns a tensor's stored values into Hugging Face's, None if they are those."""
    if layout.norms_plus_one and stem.endswith("norm") and kind == "weight":
        return _subtract_one
    if stem in layout.transposed and kind == "weight":
        return _transpose
    return None


def _deinterleave(values: AnyArray, num_heads: int) -> AnyArray:
    """Order each head's rows 0, 2, 4, ... 1, 3, 5, ...; values is [num_heads * head_dim, ...]."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _subtract_one(values: Float32Array) -> Float32Array:
    return values - np.float32(1)


def _transpose(values: Float32Array) -> Float32Array:
    return np.ascontiguousarray(values.T)

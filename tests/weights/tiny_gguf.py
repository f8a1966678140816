"""A whole llama GGUF of one block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np


def write_tiny_gguf(
    path: Path,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    kinds: Sequence[str] = ("Q4_1",),
) -> Path:
    """Write the tiny model; `change` may add keys and tensors before it is closed.

    Weights of two dimensions take the types `kinds` in turns.
    """
    next_kind = itertools.cycle(kinds)
    hidden, ff, vocab = 32, 64, 16
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"tök{index}" for index in range(vocab)])
    writer.add_token_types([1] * vocab)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_array("test.floats", [0.5, 1.5])
    writer.add_array("test.flags", [True, False, True])

    def add(name: str, *shape: int) -> None:
        values = rng.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType[next(next_kind) if len(shape) > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", vocab, hidden)
    add("output_norm.weight", hidden)
    for stem, rows in (("attn_q", hidden), ("attn_k", 16), ("attn_v", 16), ("attn_output", hidden)):
        add(f"blk.0.{stem}.weight", rows, hidden)
    add("blk.0.attn_norm.weight", hidden)
    add("blk.0.ffn_norm.weight", hidden)
    add("blk.0.ffn_gate.weight", ff, hidden)
    add("blk.0.ffn_up.weight", ff, hidden)
    add("blk.0.ffn_down.weight", hidden, ff)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

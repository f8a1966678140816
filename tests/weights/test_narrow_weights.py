"""Weights that stay as narrow as their file has them: the bits of the same weights in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from batchwright.kernels.linear.packing import unpack
from batchwright.models.layers import Linear
from batchwright.models.loader import load_model
from batchwright.models.narrow_weights import join_rows, pack_stored
from batchwright.weights.block_tensor import BlockTensor
from batchwright.weights.checkpoint import Checkpoint, open_checkpoint
from batchwright.weights.dequantize import dequantize, read_blocks
from batchwright.weights.forms import StoredForms, stored_bytes, stored_forms
from batchwright.weights.ggml_types import GGML_TYPES
from tests.models.ragged import ragged_logits
from tests.weights.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.cpu

BY_NAME = {ggml_type.name: ggml_type for ggml_type in GGML_TYPES.values()}


class Dense:
    """A checkpoint that has nothing but fp32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config, self.names = checkpoint.config, checkpoint.names
        self.tensor = self.stored = lambda name: checkpoint.tensor(name).float()


def assert_same_logits(checkpoint: Checkpoint) -> set[torch.dtype]:
    """The model computes the bits of its dense twin. Returns the types of its weights."""
    models = [
        load_model(source, dtype=torch.float32, max_positions=64)
        for source in (checkpoint, Dense(checkpoint))
    ]
    sequences = [torch.tensor(ids) for ids in ([1, 5, 9, 2], [3], list(range(14)) * 3)]
    for one, other in zip(*(ragged_logits(model, sequences) for model in models), strict=True):
        assert torch.equal(one, other)
    return {m.weight.dtype for m in models[0].modules() if isinstance(m, Linear)}


@pytest.mark.parametrize(
    ("kinds", "dtypes"),
    [
        (("Q4_0",), {torch.uint8}),
        (("Q4_1", "Q4_0"), {torch.uint8}),
        (("Q5_0", "Q5_1"), {torch.int8}),
        (("Q8_0",), {torch.int8}),
        (("F16",), {torch.float16}),
        (("BF16",), {torch.uint16}),
        (("F32",), {torch.float32}),
        (("Q8_0", "Q4_1", "Q5_1"), {torch.int8, torch.uint8}),
        (("F16", "Q4_1", "F32", "BF16"), {torch.uint8, torch.float16, torch.uint16}),
    ],
)
def test_models_of_gguf_files(tmp_path: Path, kinds, dtypes) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", kinds=kinds)
    assert assert_same_logits(open_checkpoint(path)) <= dtypes | {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_tied", [False, True])
def test_models_of_16_bits(tmp_path: Path, dtype, is_tied) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=70, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=is_tied,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    found = assert_same_logits(checkpoint)
    assert found == {torch.uint16 if dtype == torch.bfloat16 else dtype}
    model = load_model(checkpoint, dtype=torch.float32, max_positions=64)
    parameters = {id(value): value for value in model.parameters()}.values()
    table_and_layers = sum(value.nbytes for value in parameters)
    padding = 2 * 32 * (96 - 70)  # of the head's last panel
    norms = 2 * 32 * 5  # twice as wide as in the file
    assert table_and_layers == stored_bytes(checkpoint) + padding + norms


def random_blocks(name: str, rows: int, columns: int) -> tuple[BlockTensor, np.ndarray]:
    """(blocks, their values) of random bytes whose scales are finite."""
    kind = BY_NAME[name]
    rng = np.random.default_rng(len(name))
    num_blocks = rows * columns // kind.block_size
    raw = rng.integers(0, 256, (num_blocks, kind.block_bytes), np.uint8)
    for start in range(0, kind.block_bytes - 1, 2):  # no exponent of all ones, wherever they are
        raw[:, start + 1] &= 0xBB
    raw = raw.reshape(-1)
    return read_blocks(raw, kind, (rows, columns)), dequantize(raw, kind, (rows, columns))


@pytest.mark.parametrize(
    "names",
    [
        ("Q4_K",),
        ("Q6_K",),
        ("Q4_K", "Q4_K", "Q6_K"),  # query, key and value as many files have them
        ("Q4_0", "Q4_K"),
        ("Q5_K", "Q8_0"),
        ("Q8_0", "Q6_K", "Q4_1"),
    ],
)
def test_joined_blocks_keep_their_values(names) -> None:
    parts = [random_blocks(name, rows, 512) for rows, name in zip((40, 24, 8), names, strict=False)]
    joined = join_rows([blocks for blocks, _ in parts])
    want = np.concatenate([values for _, values in parts])
    packed = pack_stored(joined)
    np.testing.assert_array_equal(unpack(packed, len(want)).numpy(), want)
    is_narrow = all(name.startswith("Q4") for name in names)
    assert packed.values.dtype == (torch.uint8 if is_narrow else torch.int8)


def test_blocks_beside_floats_become_dense() -> None:
    blocks, values = random_blocks("Q4_1", 40, 64)
    halves = torch.randn(24, 64).half()
    joined = join_rows([blocks, halves])
    assert torch.equal(joined, torch.cat([torch.from_numpy(values), halves.float()]))
    assert join_rows([halves, halves]).dtype == torch.float16
    assert join_rows([halves, halves.bfloat16()]).dtype == torch.float32


def test_forms_from_headers(tmp_path: Path) -> None:
    smollm2 = open_checkpoint(write_tiny_gguf(tmp_path / "a.gguf", kinds=("Q8_0", *["Q4_1"] * 7)))
    assert stored_forms(smollm2) == StoredForms("int4", "int8")
    halves = open_checkpoint(write_tiny_gguf(tmp_path / "b.gguf", kinds=("F16",)))
    assert stored_forms(halves) == StoredForms("fp16", "fp16")

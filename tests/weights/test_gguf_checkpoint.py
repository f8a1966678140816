"""GGUF checkpoints against transformers: tensors, config, and what the model then computes.

Tiny random models are converted here as llama.cpp's converter does it (its name table comes from
the `gguf` package), read back, and run by transformers from our names, values and config.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from batchwright.errors import ModelFormatError, UnsupportedModelError
from batchwright.weights.block_tensor import BlockTensor
from batchwright.weights.checkpoint import open_checkpoint
from batchwright.weights.gguf_checkpoint import GgufCheckpoint, open_gguf_checkpoint

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own
]

Tensors = dict[str, torch.Tensor]
VOCAB, HIDDEN, HEADS, KV_HEADS, LAYERS = 96, 64, 4, 2, 6


# --- SmolLM2 ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits, longest on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_smollm2_equals_the_gguf_package(smollm2: Path, smollm2_reference: gguf.GGUFReader) -> None:
    ours = open_checkpoint(smollm2)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    stored = {tensor.name: tensor for tensor in smollm2_reference.tensors}
    assert len(ours.names()) == len(stored)
    for name in ours.names():
        tensor = stored[f"{table.get_name(name.removesuffix('.weight'))}.weight"]
        want = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        got = ours.tensor(name)
        if num_heads := 9 * (".q_proj." in name) + 3 * (".k_proj." in name):
            got = interleave(got, num_heads)
        assert torch.equal(got, want), name
        assert tuple(got.shape) == ours.shape(name)
        assert_stored_alike(ours, name)
    assert ours.config["rope_theta"] == 100_000.0
    assert ours.generation_config == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}


def assert_stored_alike(checkpoint: GgufCheckpoint, name: str) -> None:
    """What is stored narrowly has the same values and shape, and the form that was announced."""
    stored, want = checkpoint.stored(name), checkpoint.tensor(name)
    if isinstance(stored, BlockTensor):
        assert checkpoint.form(name) == f"int{stored.bits}"
        assert torch.equal(torch.from_numpy(stored.dense()), want), name
    else:
        bits = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        assert stored.dtype == bits[checkpoint.form(name)]
        assert torch.equal(stored.float(), want), name


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2: Path) -> None:
    ours = open_checkpoint(smollm2)
    folder, name = os.path.split(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    )
    theirs = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert ours.names() == sorted(theirs)
    for key, value in theirs.items():
        tensor = ours.tensor(key)
        assert tensor.shape == ours.shape(key)
        assert torch.equal(tensor, value), key
    assert_same_config(ours.config, model.config)


# Keys of ours that transformers drops when it reads a GGUF, though its own config files have them.
NOT_READ = {"architectures", "torch_dtype", "rope_theta", "rope_scaling", "query_pre_attn_scalar",
            "final_logit_softcapping", "attn_logit_softcapping", "pad_token_id"}  # fmt: skip


def assert_same_config(ours: dict[str, Any], theirs: transformers.PreTrainedConfig) -> None:
    """Every key of ours, as transformers understands it, has transformers' value."""
    understood = type(theirs)(**ours)
    compared = {key for key in ours if hasattr(theirs, key)} - NOT_READ
    assert len(compared) > 10
    for key in compared | {"rope_parameters"}:
        assert getattr(understood, key) == getattr(theirs, key), key


def test_fingerprint_follows_content_not_place(tiny_gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy.gguf"
    copy.parent.mkdir()
    copy.write_bytes(tiny_gguf.read_bytes())
    first, second = open_gguf_checkpoint(tiny_gguf), open_gguf_checkpoint(copy)
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 32
    raw = bytearray(copy.read_bytes())
    info = second.gguf.tensors["blk.0.ffn_up.weight"]
    raw[info.offset + info.nbytes - 1] ^= 1
    copy.write_bytes(raw)
    assert open_gguf_checkpoint(copy).fingerprint != first.fingerprint


# --- tiny models of every architecture ----------------------------------------------------------


def interleave(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows as llama.cpp does for its form of the rotary embedding."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def stack_experts(tensors: Tensors) -> Tensors:
    """Replace `...experts.N.w.weight` by one stacked `...experts.w.weight`."""
    groups: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in tensors.items():
        head, dot, tail = name.partition(".experts.")
        if dot:
            index, _, rest = tail.partition(".")
            groups.setdefault(f"{head}.experts.{rest}", {})[int(index)] = value
    stacked = {name: torch.stack([group[i] for i in range(len(group))])
               for name, group in groups.items()}  # fmt: skip
    return {k: v for k, v in tensors.items() if ".experts." not in k} | stacked


def convert_values(architecture: str, name: str, value: torch.Tensor) -> torch.Tensor:
    if architecture in ("llama", "smollm3"):
        if ".q_proj." in name:
            return interleave(value, HEADS)
        if ".k_proj." in name:
            return interleave(value, KV_HEADS)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return value + 1
    if architecture == "gpt2" and value.dim() == 2 and ".h." in name:
        return value.T.contiguous()
    return value


def to_gguf(path: Path, architecture: str, tensors: Tensors, keys: dict[str, Any]) -> Path:
    """Write HF tensors as a GGUF, under the names of the `gguf` package's table."""
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    table = gguf.get_tensor_name_map(kind, LAYERS)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"block_count": LAYERS, "context_length": 128, **keys}.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    writer.add_token_list([f"t{index}" for index in range(VOCAB)])
    writer.add_uint32(f"{architecture}.vocab_size", VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for name, value in stack_experts(tensors).items():
        # The converter feeds Mixtral's experts under this older name.
        lookup = name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        lookup = lookup if "block_sparse_moe.experts" in name else name
        stem, _, suffix = lookup.rpartition(".")
        gguf_stem = table.get_name(stem)
        assert gguf_stem, name
        values = convert_values(architecture, name, value.float())
        writer.add_tensor(f"{gguf_stem}.{suffix}", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


DECODER_KEYS = {
    "embedding_length": HIDDEN,
    "feed_forward_length": 80,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5000.0,
}
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT_KEYS = {
    "embedding_length": HIDDEN,
    "feed_forward_length": 4 * HIDDEN,
    "attention.head_count": HEADS,
    "attention.layer_norm_epsilon": 1e-5,
}
GPT = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = {"attention.key_length": 32, "attention.value_length": 32}

# name: (architecture in GGUF, HF model type, HF config beyond the base, GGUF keys beyond the base)
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {}, {"rope.dimension_count": 16}),
    "llama_tied_bias": (
        "llama",
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
        HEAD_DIM,
    ),
    "llama_linear": (
        "llama",
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope.scaling.factor": 4.0},
    ),
    "mistral": (
        "llama", "mistral", {"sliding_window": 5}, {"attention.sliding_window": 5},
    ),
    "mixtral": (
        "llama",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "smollm3": ("smollm3", "smollm3", {"tie_word_embeddings": True}, {}),
    "qwen2": ("qwen2", "qwen2", {}, {}),
    "qwen3": (  # transformers takes Qwen3's default head size when it reads a GGUF
        "qwen3", "qwen3", {"head_dim": 128}, {"attention.key_length": 128},
    ),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "norm_topk_prob": True},
        {**HEAD_DIM, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 5,
         "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        {**HEAD_DIM, "attention.sliding_window": 5, "final_logit_softcapping": 30.0,
         "attn_logit_softcapping": 50.0},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 5},
        {**HEAD_DIM, "attention.sliding_window": 5},
    ),
    "gpt2": ("gpt2", "gpt2", {}, {}),
    "starcoder": (
        "starcoder", "gpt_bigcode", {"multi_query": True}, {"attention.head_count_kv": 1},
    ),
}  # fmt: skip
READ_BY_TRANSFORMERS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]


def make_model(case: str) -> transformers.PreTrainedModel:
    _, model_type, extra, _ = CASES[case]
    base = GPT if model_type.startswith("gpt") else DECODER
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**base, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # norms and biases start at one and zero, which would hide mistakes
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.add_(0.2 * torch.randn_like(value))
            assert value.std() > 0, name
    return model


def saved_tensors(model: transformers.PreTrainedModel, folder: Path) -> Tensors:
    """Return the tensors under the names that Hugging Face files have."""
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


@pytest.fixture(params=CASES)
def converted(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[str, transformers.PreTrainedModel, Tensors, GgufCheckpoint]:
    case = request.param
    architecture, model_type, _, extra_keys = CASES[case]
    model = make_model(case)
    tensors = saved_tensors(model, tmp_path / "saved")
    keys = (GPT_KEYS if model_type.startswith("gpt") else DECODER_KEYS) | extra_keys
    path = to_gguf(tmp_path / f"{case}.gguf", architecture, tensors, keys)
    if case == "llama_linear":
        path = add_text_key(path, "llama.rope.scaling.type", "linear")
    return case, model, tensors, open_gguf_checkpoint(path)


def add_text_key(path: Path, key: str, value: str) -> Path:
    """Copy a GGUF with one more metadata key."""
    reader = gguf.GGUFReader(path)
    copy = path.with_name("with_key.gguf")
    writer = gguf.GGUFWriter(copy, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), *field.types[:2])
    writer.add_string(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def test_round_trip(
    converted: tuple[str, transformers.PreTrainedModel, Tensors, GgufCheckpoint], tmp_path: Path
) -> None:
    """Names and values come back, and transformers computes the same from our config and them."""
    case, model, tensors, ours = converted
    assert ours.names() == sorted(tensors)
    for name, want in tensors.items():
        got = ours.tensor(name)
        assert got.dtype == torch.float32
        assert tuple(got.shape) == ours.shape(name)
        assert got.is_contiguous()
        if case.startswith("gemma") and name.endswith("norm.weight"):  # (w + 1) - 1 rounds
            torch.testing.assert_close(got, want, rtol=0, atol=2**-23)
        else:
            assert torch.equal(got, want), name
    again = run_from(ours, tmp_path / "again")
    tolerance = 2e-3 if case.startswith("gemma") else 0.0
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=tolerance)
    assert ours.generation_config["eos_token_id"] == [2, 5]


def run_from(ours: GgufCheckpoint, folder: Path, **changes: Any) -> transformers.PreTrainedModel:
    """Let transformers load a directory made of our config and tensors."""
    folder.mkdir()
    save_file({name: ours.tensor(name) for name in ours.names()}, folder / "model.safetensors")
    config = transformers.AutoConfig.for_model(**({"pad_token_id": None} | ours.config | changes))
    config.save_pretrained(folder)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded.eval()


@pytest.mark.parametrize(
    "converted", ["llama_linear", "mistral", "smollm3", "gemma3"], indirect=True
)
def test_a_wrong_config_would_be_seen(
    converted: tuple[str, transformers.PreTrainedModel, Tensors, GgufCheckpoint], tmp_path: Path
) -> None:
    case, model, _, ours = converted
    wrong = {
        "llama_linear": {"rope_scaling": None},
        "mistral": {"sliding_window": 6},
        "smollm3": {"no_rope_layers": [1] * LAYERS},
        "gemma3": {"rope_local_base_freq": 20_000.0},
    }[case]
    again = run_from(ours, tmp_path / "again", **wrong)
    assert (logits(again) - logits(model)).abs().max() > 0.05


@pytest.mark.parametrize("converted", READ_BY_TRANSFORMERS, indirect=True)
def test_equals_transformers_own_gguf_reader(
    converted: tuple[str, transformers.PreTrainedModel, Tensors, GgufCheckpoint],
) -> None:
    ours = converted[-1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        ours.path.parent, gguf_file=ours.path.name, dtype=torch.float32
    )
    state = theirs.state_dict()
    for name in ours.names():
        assert torch.equal(ours.tensor(name), state[name]), name
    assert_same_config(ours.config, theirs.config)


# --- what must be refused -----------------------------------------------------------------------


def test_llama3_scaling_is_recovered(make_tiny_gguf: Callable[..., Path]) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        head_dim=64, rope_theta=500_000.0, rope_scaling=scaling, max_position_embeddings=131_072
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = (plain / scaled.double()).float().numpy()
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(32)

    def add(writer: gguf.GGUFWriter, factors: np.ndarray = factors) -> None:
        writer.add_key_length(64)
        writer.add_uint32("llama.rope.dimension_count", 64)
        writer.kv_data[0]["llama.rope.freq_base"].value = 500_000.0
        writer.add_tensor("rope_freqs.weight", factors)

    got = open_gguf_checkpoint(make_tiny_gguf(add)).config["rope_scaling"]
    scaling.pop("rope_theta", None)  # transformers puts it there
    assert got == scaling | {"factor": pytest.approx(32, rel=1e-5)}
    with pytest.raises(UnsupportedModelError, match="rotary factors"):
        open_gguf_checkpoint(make_tiny_gguf(lambda w: add(w, np.roll(factors, 1))))
    with pytest.raises(ModelFormatError, match=r"F32 \[31\], expected F32 \[32\]"):
        open_gguf_checkpoint(make_tiny_gguf(lambda w: add(w, factors[:31])))
    ones = open_gguf_checkpoint(make_tiny_gguf(lambda w: add(w, np.ones_like(factors))))
    assert ones.config["rope_scaling"] is None


def set_key(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        if key in writer.kv_data[0]:
            writer.kv_data[0][key].value = value
        else:
            writer.add_uint32(key, value)

    return change


REFUSED: dict[str, tuple[Callable[[gguf.GGUFWriter], None], type[Exception], str]] = {
    "architecture": (
        set_key("general.architecture", "rwkv7"), UnsupportedModelError,
        r"architecture 'rwkv7'; supported: llama, ",
    ),
    "tensor": (
        lambda w: w.add_tensor("blk.0.ssm_a.weight", np.zeros(4, np.float32)),
        UnsupportedModelError, r"'blk\.0\.ssm_a\.weight' for architecture 'llama'",
    ),
    "stray tensor": (
        lambda w: w.add_tensor("mm.0.weight", np.zeros(4, np.float32)),
        UnsupportedModelError, r"'mm\.0\.weight'",
    ),
    "type": (
        lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(32, np.float64)),
        UnsupportedModelError, r"type F64; supported: F32",
    ),
    "zero heads": (
        set_key("llama.attention.head_count", 0), ModelFormatError,
        "head_count' is missing or 0",
    ),
    "odd heads": (
        set_key("llama.attention.head_count", 3), ModelFormatError, "3 query heads and 2 key-value",
    ),
    "many heads": (
        set_key("llama.attention.head_count", 64), ModelFormatError, "64 query heads and 2",
    ),
    "heads that do not divide": (
        set_key("llama.attention.head_count_kv", 2**20), ModelFormatError, "1048576 key-value",
    ),
    "blocks": (
        set_key("llama.block_count", 2**30), ModelFormatError,
        "metadata says 1073741824 blocks, the tensors are of 1",
    ),
    "hidden size": (
        set_key("llama.embedding_length", 64), ModelFormatError, r"expected \[vocabulary, 64\]",
    ),
    "epsilon": (
        set_key("llama.attention.layer_norm_rms_epsilon", float("nan")), ModelFormatError,
        "is nan, expected a positive number",
    ),
    "window": (
        set_key("llama.attention.sliding_window", 2**31), ModelFormatError, "is 2147483648, expect",
    ),
    "value size": (
        set_key("llama.attention.value_length", 16), UnsupportedModelError, "different sizes",
    ),
    "per layer": (
        lambda w: w.add_array("llama.attention.sliding_window", [1, 2]), UnsupportedModelError,
        "one value per layer",
    ),
    "scaling": (
        lambda w: w.add_string("llama.rope.scaling.type", "longrope"), UnsupportedModelError,
        "rotary scaling 'longrope'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    make_tiny_gguf: Callable[..., Path],
    change: Callable[[gguf.GGUFWriter], None],
    error: type[Exception],
    message: str,
) -> None:
    path = make_tiny_gguf(change)
    with pytest.raises(error, match=message) as caught:
        open_gguf_checkpoint(path)
    assert str(path) in str(caught.value)


def test_token_ids_outside_the_vocabulary_are_ignored(
    make_tiny_gguf: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = make_tiny_gguf(set_key("tokenizer.ggml.padding_token_id", 2**32 - 1))
    assert "pad_token_id" not in open_gguf_checkpoint(path).config
    assert caplog.text.count("padding_token_id = 4294967295: no such token") == 1


def test_missing_tensor(tiny_gguf: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"no tensor for 'lm_head\.weight'"):
        open_gguf_checkpoint(tiny_gguf).tensor("lm_head.weight")

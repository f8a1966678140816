"""Loading: names, tied heads, bare decoders, unsupported settings and damaged checkpoints."""

import json

import pytest
import torch

from batchwright.errors import ConfigError, ModelFormatError, UnsupportedModelError
from batchwright.models.layers import Linear
from batchwright.models.loader import (
    load_model,
    model_class,
    read_config,
    supported_model_types,
)
from tests.models.ragged import ragged_logits
from tests.models.reference import (
    TINY,
    TOLERANCE,
    random_sequences,
    reference_logits,
    relative_error,
)

pytestmark = pytest.mark.cpu


class Source:
    """A checkpoint in memory."""

    def __init__(self, config, tensors):
        self.config = config
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def tensor(self, name):
        return self.tensors[name]

    stored = tensor


@pytest.fixture
def source(checkpoint):
    """A copy of a tiny checkpoint, as its files hold it, that a test may spoil."""
    from batchwright.weights.checkpoint import open_checkpoint

    def get(name="llama"):
        stored = open_checkpoint(checkpoint(name)[0])
        tensors = {tensor_name: stored.tensor(tensor_name) for tensor_name in stored.names()}
        return Source(dict(stored.config), tensors)

    return get


def load(source, **options):
    return load_model(source, **{"dtype": torch.float32, "max_positions": 64, **options})


def test_supported_types_are_the_files():
    assert supported_model_types() == sorted(
        {config_class.model_type for config_class, _ in TINY.values()}
    )


def test_unknown_type_lists_the_supported():
    with pytest.raises(UnsupportedModelError, match=r"'mamba'; supported: .*llama.*qwen3_moe"):
        model_class({"model_type": "mamba"})
    for hostile in ("os.path", "../llama", "loader", "", None, "layers"):
        with pytest.raises(UnsupportedModelError):
            model_class({"model_type": hostile})


@pytest.mark.parametrize("name", TINY)
def test_common_config_entries(name, source):
    config = read_config(source(name).config)
    settings = {**TINY[name][1], **TINY[name][1].get("text_config", {})}
    assert config["vocab_size"] == settings["vocab_size"]
    assert config["hidden_size"] == settings.get("hidden_size", settings.get("n_embd"))
    assert config["max_position_embeddings"] == 256
    assert config["num_hidden_layers"] in (3, 4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text"])
def test_files_of_the_bare_decoder(name, source, checkpoint):
    bare = source(name)
    bare.tensors = {
        key.split(".", 1)[1] if not key.startswith("lm_head") else key: value
        for key, value in bare.tensors.items()
    }
    sequences = random_sequences((40,))
    expected = reference_logits(checkpoint(name)[1], sequences)
    assert relative_error(ragged_logits(load(bare), sequences), expected) < TOLERANCE


def test_older_multimodal_names(source, checkpoint):
    older = source("gemma3")
    older.tensors = {
        key.replace("model.language_model.", "language_model.model."): value
        for key, value in older.tensors.items()
    }
    assert any(key.startswith("language_model.model.layers") for key in older.tensors)
    sequences = random_sequences((40,))
    expected = reference_logits(checkpoint("gemma3")[1], sequences)
    assert relative_error(ragged_logits(load(older), sequences), expected) < TOLERANCE


def test_multimodal_defaults():
    """Files on the hub say little more than this of the text model."""
    inner = {"hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    config = read_config({"model_type": "gemma3", "text_config": {**inner, "sliding_window": 1024}})
    assert (config["num_attention_heads"], config["head_dim"]) == (8, 256)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (262208, 131072)


def test_tied_head_shares_memory(source):
    model = load(source("qwen2"))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_tied_head_that_is_also_stored(source, caplog):
    both = source("qwen2")
    both.tensors["lm_head.weight"] = both.tensors["model.embed_tokens.weight"].clone()
    model = load(both)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not caplog.records
    both.tensors["lm_head.weight"] = both.tensors["lm_head.weight"] + 1
    own = both.tensors["lm_head.weight"]
    assert torch.equal(load(both).lm_head.rows(torch.arange(len(own))), own)
    assert "output head of its own" in caplog.text


def test_gpt2_ties_by_default(source):
    untold = source("gpt2")
    del untold.config["tie_word_embeddings"]
    model = load(untold)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_missing_tensor_is_named(source):
    broken = source()
    del broken.tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ModelFormatError, match=r"no tensor 'model\.layers\.1\.self_attn\.k_proj"):
        load(broken)


def test_missing_expert_is_named(source):
    broken = source("mixtral")
    del broken.tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    with pytest.raises(
        ModelFormatError, match=r"no tensor 'model\.layers\.1\.mlp\.experts\.3\.down"
    ):
        load(broken)


def test_wrong_shape_is_named(source):
    broken = source()
    broken.config["intermediate_size"] = 38
    with pytest.raises(ModelFormatError, match=r"gate_proj.*\[37, 48\].*\[38, 48\]"):
        load(broken)


def test_merged_parts_are_checked_apart(source):
    """Widths that only add up must not load."""
    broken = source()
    gate = broken.tensors["model.layers.0.mlp.gate_proj.weight"]
    up = broken.tensors["model.layers.0.mlp.up_proj.weight"]
    broken.tensors["model.layers.0.mlp.gate_proj.weight"] = torch.cat((gate, up[:1]))
    broken.tensors["model.layers.0.mlp.up_proj.weight"] = up[1:]
    with pytest.raises(ModelFormatError, match="gate_proj"):
        load(broken)


def test_unused_tensors_are_reported(source, caplog):
    extra = source()
    extra.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    load(extra)
    assert not caplog.records
    extra.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)
    load(extra)
    assert "model.layers.0.self_attn.q_proj.bias" in caplog.text


@pytest.mark.parametrize("name", TINY)
def test_nothing_is_unused(name, source, caplog):
    load(source(name))
    assert not caplog.records


@pytest.mark.parametrize(
    "entry", ["hidden_size", "vocab_size", "intermediate_size", "rms_norm_eps"]
)
def test_missing_config_entry_is_named(entry, source):
    broken = source()
    del broken.config[entry]
    with pytest.raises(ModelFormatError, match=f"config.json lacks '{entry}'"):
        load(broken)


@pytest.mark.parametrize(
    "entry, value",
    [
        ("hidden_size", "48"),
        ("num_hidden_layers", 0),
        ("vocab_size", None),
        ("num_attention_heads", -6),
    ],
)
def test_senseless_sizes_are_named(entry, value, source):
    broken = source()
    broken.config[entry] = value
    with pytest.raises(ModelFormatError, match=f"{entry} is {value!r}"):
        load(broken)


def test_heads_that_do_not_divide(source):
    broken = source()
    broken.config["num_key_value_heads"] = 4
    with pytest.raises(ModelFormatError, match=r"6 query heads.*4 key-value heads"):
        load(broken)


@pytest.mark.parametrize(
    "name, entry, value",
    [
        ("llama", "hidden_act", "relu"),
        ("mixtral", "hidden_act", "gelu"),
        ("qwen3_moe", "hidden_act", "gelu"),
        ("gemma2", "hidden_activation", "relu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("opt", "activation_function", "tanh"),
        ("gpt2", "activation_function", "swish"),
        ("gpt2", "add_cross_attention", True),
    ],
)
def test_unsupported_settings_are_named(name, entry, value, source):
    changed = source(name)
    changed.config[entry] = value
    with pytest.raises(UnsupportedModelError, match=f"{entry} {value!r}.*supported: "):
        load(changed)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_context_beyond_learned_positions(name, source):
    with pytest.raises(ConfigError, match=r"257 tokens.*256 positions"):
        load(source(name), max_positions=257)


def test_every_linear_is_packed_in_fp32_and_in_no_other_type(source):
    for dtype, ndim in ((torch.float32, 3), (torch.bfloat16, 2)):
        model = load_model(source(), dtype=dtype, max_positions=64)
        assert {m.weight.ndim for m in model.modules() if isinstance(m, Linear)} == {ndim}


def test_config_of_the_file_is_left_alone(source):
    original = source("gpt2")
    before = json.dumps(original.config, sort_keys=True)
    load(original)
    assert json.dumps(original.config, sort_keys=True) == before

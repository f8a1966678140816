"""What the command line says of other engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from batchwright.bench.engines import find_peers, peer_environment
from batchwright.errors import ConfigError

GGUF = "model.gguf"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    path = tmp_path / GGUF
    path.touch()
    return path


def test_peers(model: Path) -> None:
    peers = find_peers(
        ["openvino", "openvino:bfloat16", "vllm"],
        [f"vllm={sys.executable}"],
        ["vllm=hf"],
        model,
    )
    assert [peer.label for peer in peers] == ["openvino", "openvino:bfloat16", "vllm"]
    assert [peer.dtype for peer in peers] == ["float32", "bfloat16", "float32"]
    assert [peer.model for peer in peers] == 2 * [str(model)] + [str(model.parent / "hf")]
    python, runner = peers[2].command
    assert python == sys.executable and Path(runner).is_file()
    assert {Path(peer.command[1]).name for peer in peers} == {"run_openvino.py", "run_vllm.py"}


@pytest.mark.parametrize(
    ("against", "pythons", "models", "message"),
    [
        (["sglang"], [], [], "unknown engine 'sglang'; known: vllm, openvino, llama.cpp"),
        (["openvino:int4"], [], [], "openvino computes float32 or bfloat16"),
        (["llama.cpp:float32"], [], [], "llama.cpp computes as its file is"),
        (["openvino"], ["openvino"], [], "write ENGINE=PATH"),
        (["openvino"], ["openvino="], [], "write ENGINE=PATH"),
        (["openvino"], ["ov=/bin/sh"], [], "--python: unknown engine 'ov'"),
        (["openvino"], ["vllm=/bin/sh"], [], "--python names vllm, which no --against asks for"),
        (["openvino"], [], ["vllm=hf"], "--peer-model names vllm, which no --against asks for"),
        (["openvino"], ["openvino=/none"], [], "/none: there is no interpreter"),
        (["openvino"], ["openvino=hf"], [], "hf: there is no interpreter"),
        (["openvino"], [], ["openvino=none"], "none: there is no such file or directory"),
        (["vllm"], [], [], "vllm reads a Hugging Face directory, not .*--peer-model vllm=PATH"),
        (["llama.cpp"], [], ["llama.cpp=hf"], "llama.cpp reads a GGUF file, not hf"),
        (["openvino", "openvino"], [], [], "--against openvino is given twice"),
    ],
)
def test_errors(
    model: Path, against: list[str], pythons: list[str], models: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_peers(against, pythons, models, model)


def test_others_do_not_get_our_environment() -> None:
    theirs = {"HOME": "/h", "OMP_PROC_BIND": "true"}
    ours = {"PYTHONPATH": "/p", "VIRTUAL_ENV": "/v", "GOMP_SPINCOUNT": "3000"}
    assert peer_environment({**theirs, **ours}) == theirs
    assert peer_environment({"GOMP_SPINCOUNT": "5"}) == {"GOMP_SPINCOUNT": "5"}

"""What `batchwright serve` refuses before a model is loaded."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batchwright.cli import main as cli
from batchwright.cli import run as run_command
from batchwright.server.parts import lock_data

KEY_VARIABLE = "BATCHWRIGHT_API_KEY"
Serve = Callable[..., tuple[int, str]]


@pytest.fixture
def serve(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Serve:
    """Runs the command with a model that cannot be loaded; returns (exit status, last line)."""

    def load(*_: object) -> None:
        raise AssertionError("it began to load")

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr(run_command, "load", load)
    monkeypatch.setattr("batchwright.weights.locate.locate_model", Path)

    def command(*arguments: object) -> tuple[int, str]:
        words = ["batchwright", "serve", "--model", "m", "--data", tmp_path / "data", *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capfd.readouterr().err

    return command


def test_elsewhere_without_a_key(serve: Serve, tmp_path: Path) -> None:
    status, err = serve("--host", "0.0.0.0")
    assert status == 2 and KEY_VARIABLE in err and "--api-key-file" in err
    assert not (tmp_path / "data").exists()


def test_a_key_is_no_argument(serve: Serve) -> None:
    status, err = serve("--api-key", "x" * 24)
    assert status == 2 and "No such option" in err


def test_a_key_that_others_can_read(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("x" * 24)
    (tmp_path / "key").chmod(0o640)
    status, err = serve("--host", "0.0.0.0", "--api-key-file", tmp_path / "key")
    assert status == 2 and "chmod 600" in err


def test_a_name_that_means_nothing(serve: Serve) -> None:
    status, err = serve("--host", "no.such.host.invalid")
    assert status == 2 and "--host no.such.host.invalid" in err


def test_a_port_in_use(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, err = serve("--port", port)
    assert status == 2 and f"cannot listen on 127.0.0.1 port {port}" in err


def test_impossible_engine_settings(serve: Serve) -> None:
    status, err = serve("--max-num-batched-tokens", "9")
    assert status == 2 and "below max_num_seqs" in err


def test_a_missing_package_is_named(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, err = serve()
    assert status == 2 and "pip install 'batchwright[serve]'" in err


def test_a_directory_that_another_server_uses(serve: Serve, tmp_path: Path) -> None:
    lock = lock_data(tmp_path / "data")
    status, err = serve("--port", 0)
    os.close(lock)
    assert status == 2 and "another server uses" in err


def test_a_directory_that_cannot_be_made(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    status, err = serve("--port", 0)
    assert status == 2 and "is no directory; name another with --data" in err

"""Who is let in, what is bounded, and what is never told."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from batchwright.errors import ConfigError
from batchwright.server import settings
from batchwright.server.guard import Guard
from batchwright.server.run import listen
from batchwright.server.settings import ServerSettings, read_api_key
from tests.job.fakes import chat_row
from tests.server.running import MODEL, PacedEngine, RunningServer, begin, ended, until

Start = Callable[..., RunningServer]
KEY = "k" * 24
CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_elsewhere_needs_a_key(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        ServerSettings(host=host, data=tmp_path, model_name="m").check()
    ServerSettings(host=host, data=tmp_path, model_name="m", api_key=KEY).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_here_does_not(tmp_path: Path, host: str) -> None:
    ServerSettings(host=host, data=tmp_path, model_name="m").check()


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        ServerSettings(data=tmp_path, model_name="m", api_key="secret").check()


def test_where_the_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_api_key(None) is None
    monkeypatch.setenv(settings.KEY_VARIABLE, KEY)
    assert read_api_key(None) == KEY
    file = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        read_api_key(file)
    file.write_text("x" * 20 + "\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_api_key(file)
    file.chmod(0o600)
    assert read_api_key(file) == "x" * 20


def test_without_the_key_nothing_is_told(start: Start) -> None:
    server = start(api_key=KEY)
    client = server.client()
    batch = ended(client, begin(client, [chat_row("a")]))
    for wrong in ("no", KEY + "x", KEY[:-1], "", "\u00e9"):
        header = {"Authorization": f"Bearer {wrong}".encode().decode("latin-1")}
        assert server.error("GET", "/v1/models", headers=header) == (401, "invalid_api_key")
    for method, path in [
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", f"/v1/files/{batch.output_file_id}/content"),
        ("GET", "/v1/batches"),
        ("POST", f"/v1/batches/{batch.id}/cancel"),
        ("POST", CHAT),
        ("GET", "/dashboard.json"),
        ("GET", "/metrics"),
        ("GET", f"/batches/{batch.id}/report"),
        ("POST", "/dashboard/login"),
        ("GET", "/nothing"),
    ]:
        assert server.error(method, path) == (401, "invalid_api_key"), path
    assert json.loads(server.ask("GET", "/health")[2]) == {"status": "ok"}
    assert batch.id.encode() not in server.ask("GET", "/")[2]


def test_the_pages_cookie_reads_and_does_nothing_else(start: Start) -> None:
    server = start(api_key=KEY)
    bearer = {"Authorization": f"Bearer {KEY}"}
    status, headers, _ = server.ask("POST", "/dashboard/login", headers=bearer)
    assert status == 204
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and KEY not in cookie
    with_cookie = {"Cookie": cookie.partition(";")[0]}
    assert server.ask("GET", "/dashboard.json", headers=with_cookie)[0] == 200
    for method, path in [("GET", "/v1/files"), ("POST", CHAT), ("POST", "/v1/batches/x/report")]:
        assert server.error(method, path, headers=with_cookie)[0] == 401
    wrong = {"Cookie": "batchwright=x"}
    assert server.error("GET", "/dashboard.json", headers=wrong)[0] == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""]
)
def test_a_name_made_to_mean_this_machine_is_refused(common: RunningServer, host: str) -> None:
    assert common.error("GET", "/v1/models", host=host) == (403, "forbidden_host")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"])
def test_our_names_are_let_in(common: RunningServer, host: str) -> None:
    assert common.ask("GET", "/v1/models", host=host)[0] == 200


def test_other_pages_cannot_use_it(common: RunningServer) -> None:
    for origin in ("http://evil.example", "null", "http://localhost:1", "file://"):
        for method, path in (("POST", CHAT), ("GET", "/dashboard.json")):
            found = common.error(method, path, HELLO, headers={"Origin": origin})
            assert found == (403, "foreign_origin")
    cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert common.error("GET", "/v1/models", headers=cross) == (403, "foreign_origin")
    own = {"Origin": f"http://127.0.0.1:{common.port}"}
    assert common.ask("POST", CHAT, HELLO, headers=own)[0] == 200
    _, headers, _ = common.ask("OPTIONS", CHAT, headers={"Origin": "http://evil.example"})
    assert not [name for name in headers if name.startswith("access-control")]


def test_every_response_is_told_to_stay_where_it_is(common: RunningServer) -> None:
    for path in ("/", "/v1/models", "/nothing", "/health"):
        _, headers, _ = common.ask("GET", path)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "server" not in headers


@pytest.mark.parametrize(
    "id",
    [
        "../lock",
        "..%2f..%2flock",
        "%2e%2e",
        "file-..%2flock",
        "file-0",
        "file-" + "0" * 28 + "%0a",
        "file-" + "g" * 28,
        "x" * 3000,
    ],
)
def test_ids_are_not_paths(common: RunningServer, id: str) -> None:
    for path in (f"/v1/files/{id}", f"/v1/files/{id}/content", f"/v1/batches/{id}"):
        assert common.error("GET", path)[0] == 404
    assert common.error("DELETE", f"/v1/files/{id}")[0] == 404
    assert common.error("POST", f"/v1/batches/{id}/cancel")[0] == 404
    assert common.error("GET", f"/batches/{id}/report")[0] == 404
    assert (common.settings.data / "lock").exists()


def form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, dict[str, str]]:
    """A multipart form of (name, filename, content)."""
    body = b""
    for name, filename, content in parts:
        suffix = "" if filename is None else f'; filename="{filename}"'
        body += f'--B\r\nContent-Disposition: form-data; name="{name}"{suffix}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + b"--B--\r\n", {"Content-Type": "multipart/form-data; boundary=B"}


PURPOSE = ("purpose", None, b"batch")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\in.jsonl", "in.jsonl"),
        ("a\x1b[31m.jsonl", "a[31m.jsonl"),
        ("", "file.jsonl"),
        ("..", ".."),
        ("日本.jsonl", "日本.jsonl"),
        ("x" * 500, "x" * 200),
        ("日本\u202e.jsonl", "日本.jsonl"),
    ],
)
def test_a_files_name_is_only_shown(common: RunningServer, given: str, shown: str) -> None:
    status, _, body = common.ask("POST", "/v1/files", *form(PURPOSE, ("file", given, b"{}")))
    assert status == 200
    file = json.loads(body)
    assert file["filename"] == shown and file["bytes"] == 2
    stored = list(common.settings.data.glob("files/*.jsonl"))
    assert {path.stem.partition("-")[0] for path in stored} == {"file"}
    _, headers, content = common.ask("GET", f"/v1/files/{file['id']}/content")
    assert content == b"{}" and headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([PURPOSE], 400),
        ([("file", "x", b"{}")], 400),
        ([PURPOSE, ("file", None, b"{}")], 400),
        ([PURPOSE, ("file", "x", b"{}"), ("file", "y", b"{}")], 400),
        ([("purpose", None, b"p" * 5000), ("file", "x", b"{}")], 413),
        ([PURPOSE, *[(f"f{i}", None, b"") for i in range(20)]], 400),
        ([PURPOSE, ("file", "x", b"y" * 3000)], 413),
    ],
)
def test_forms_that_are_refused_leave_nothing(start: Start, parts: Any, status: int) -> None:
    server = start(max_upload_bytes=2000)
    assert server.error("POST", "/v1/files", *form(*parts))[0] == status
    assert not list((server.settings.data / "files").iterdir())


def test_what_is_no_form(server: RunningServer) -> None:
    body, headers = form(PURPOSE, ("file", "x", b"{}"))
    for wrong in (body[:-9], b"", b"nonsense"):
        assert server.error("POST", "/v1/files", wrong, headers)[0] == 400
    assert server.error("POST", "/v1/files", b"{}", {"Content-Type": "application/json"})[0] == 400
    long = {"Content-Type": headers["Content-Type"] + 300 * "B"}
    assert server.error("POST", "/v1/files", body, long)[0] == 400
    for more in (b"X: " + 5000 * b"y" + b"\r\n", 20 * b"X: y\r\n"):
        wrong = body.replace(b"--B\r\n", b"--B\r\n" + more)
        assert server.error("POST", "/v1/files", wrong, headers)[0] == 400
    for kind in ("multipart/form-data", f"multipart/form-data; boundary={'B' * 1000}"):
        assert server.error("POST", "/v1/files", b"{}", {"Content-Type": kind})[0] == 400
    assert not list((server.settings.data / "files").iterdir())


def test_a_large_upload_is_not_held_in_memory_and_chunks_are_counted(start: Start) -> None:
    server = start(max_upload_bytes=3_000_000)
    client = server.client()
    assert client.files.create(file=("x", b"y" * 3_000_000), purpose="batch").bytes == 3_000_000
    with pytest.raises(openai.APIStatusError, match="at most"):
        client.files.create(file=("x", b"y" * 3_000_001), purpose="batch")
    declared = {"Content-Length": "9" * 19, "Content-Type": "multipart/form-data; boundary=B"}
    assert server.error("POST", "/v1/files", None, declared) == (413, "request_too_large")
    answer = chunked(server.port, "/v1/files", b"y" * 65536, 100, form()[1]["Content-Type"])
    assert answer.startswith(b"HTTP/1.1 4")


def chunked(port: int, path: str, piece: bytes, most: int, content_type: str) -> bytes:
    """The beginning of the answer to a body of undeclared length, of at most so many pieces."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        f"Content-Type: {content_type}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode())
        try:
            for _ in range(most):
                connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        except OSError:
            pass  # it does not listen any more
        return connection.recv(100)


def test_bodies_are_bounded(common: RunningServer) -> None:
    much = settings.MAX_CALL_BYTES + 1
    assert common.error("POST", "/v1/batches", b" " * 70_000) == (413, "request_too_large")
    declared = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {much}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", common.port)) as connection:
        connection.sendall(declared.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    answer = chunked(common.port, CHAT, b" " * 2**20, 20, "application/json")
    assert answer.startswith(b"HTTP/1.1 413")
    assert common.parts.bodies.num_bytes == 0


def test_all_bodies_together_are_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchwright.server.parts.MAX_BODIES_BYTES", 1000)
    server = start()
    long = {**HELLO, "messages": [{"role": "user", "content": "x" * 2000}]}
    assert server.error("POST", CHAT, long) == (429, "rate_limit_exceeded")
    assert server.ask("POST", CHAT, HELLO)[0] == 200
    assert server.parts.bodies.num_bytes == 0


def test_a_body_has_to_arrive_in_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchwright.server.parts.BODY_TIMEOUT_S", 0.2)
    monkeypatch.setattr("batchwright.server.stored_files.UPLOAD_TIMEOUT_S", 0.2)
    server = start()
    content_type = form()[1]["Content-Type"]
    for path in (CHAT, "/v1/files"):
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n"
            f"Content-Type: {content_type}\r\n\r\n--B"
        )
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408"), path
    assert not list((server.settings.data / "files").iterdir())


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'"x"', b'{"messages": NaN}']
)
def test_what_is_no_json_object(common: RunningServer, body: bytes) -> None:
    assert common.error("POST", CHAT, body) == (400, "invalid_json")


def test_a_disk_that_is_nearly_full_takes_no_files(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchwright.server.stored_files.MIN_FREE_BYTES", 2**60)
    assert start().error("POST", "/v1/files", *form(PURPOSE, ("file", "x", b"{}"))) == (
        507,
        "insufficient_storage",
    )


def test_everything_on_the_disk_is_private(server: RunningServer) -> None:
    client = server.client()
    ended(client, begin(client, [chat_row("a"), b"bad"]))
    paths = [server.settings.data, *server.settings.data.rglob("*")]
    assert len(paths) > 10
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_prompts_are_in_no_log(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    engine = PacedEngine()
    server = start(engine)
    client = server.client()
    rows = [chat_row("a", "a secret"), chat_row("b", "a secret", temperature="a secret")]
    ended(client, begin(client, rows))
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a secret"}])
    server.error("POST", CHAT, {"messages": "a secret"})
    server.error("POST", CHAT, b'{"a secret')
    numbers = server.ask("GET", "/dashboard.json")[2]
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("batchwright", "uvicorn"))]
    assert "secret" not in "".join(ours) + numbers.decode()


def test_a_failure_of_ours_is_logged_without_its_words(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("batchwright.server.routes_batches._new_batch", broken)
    server = start()
    status, _, body = server.ask("POST", "/v1/batches", {})
    assert status == 500 and b"secret" not in body
    until(lambda: "RuntimeError" in caplog.text)
    assert "secret" not in caplog.text


def test_two_servers_do_not_share_a_port(tmp_path: Path) -> None:
    with listen(ServerSettings(port=0, data=tmp_path, model_name=MODEL)) as first:
        taken = first.getsockname()[1]  # though nobody serves there yet
        with pytest.raises(ConfigError, match=f"port {taken}: Address already in use"):
            listen(ServerSettings(port=taken, data=tmp_path, model_name=MODEL))


def test_two_servers_do_not_share_a_directory(start: Start) -> None:
    start()
    with pytest.raises(ConfigError, match="another server"):
        start()


def test_the_guard_takes_http_alone() -> None:
    import asyncio

    async def app(*_: object) -> None:
        raise AssertionError("reached")

    async def nothing(*_: object) -> Any:
        raise AssertionError("used")

    guard = Guard(app, api_key=None, hosts=None)
    asyncio.run(guard({"type": "websocket"}, nothing, nothing))

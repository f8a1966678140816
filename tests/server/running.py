"""A server that really listens, in this process, over a model that is faked."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai

from batchwright.prompt_cache.schema import Schema
from batchwright.server.parts import Parts, lock_data
from batchwright.server.run import listen, make_server
from batchwright.server.settings import ServerSettings
from tests.job.fakes import FakeEngine, FakeModel

MODEL = "fake"
ENDED = ("completed", "failed", "expired", "cancelled")


class PacedEngine(FakeEngine):
    """A FakeEngine whose steps take time, and which starts urgent requests first."""

    pace_s = 0.0

    def step(self) -> Any:
        time.sleep(self.pace_s)
        self.waiting.sort(key=lambda request: not request.urgent)
        return super().step()


class RunningServer:
    """Listens from the start until `close`.

    Args:
        data: the data directory.
        engine, model: what answers.
        schemas: see Parts.
    """

    def __init__(
        self,
        data: Path,
        engine: FakeEngine | None = None,
        *,
        model: Any = None,
        schemas: Sequence[Schema] = (),
        **settings: Any,
    ) -> None:
        self.is_open = True
        self._clients: list[openai.OpenAI] = []
        self.engine = engine or PacedEngine()
        self.settings = ServerSettings(port=0, data=data, **{"model_name": MODEL, **settings})
        lock = lock_data(data)
        model = model or FakeModel(self.engine)
        self.parts = Parts(model, self.settings, lock, schemas=schemas)
        listener = listen(self.settings)
        self.port = listener.getsockname()[1]
        self._server = make_server(self.parts)
        self.parts.start()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[listener]))
        )
        self._thread.start()
        self._listener = listener
        until(lambda: self._server.started)

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client, closed with the server."""
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            **{"api_key": self.settings.api_key or "none", "max_retries": 0, **options},
        )
        self._clients.append(client)
        return client

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        host: str | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request made by hand; bytes are sent as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.putrequest(method, path, skip_host=host is not None)
        if host is not None:
            connection.putheader("Host", host)
        if data is not None:
            connection.putheader("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders(data)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, content

    def error(self, *arguments: Any, **options: Any) -> tuple[int, str]:
        """(status, code) of a request that is refused."""
        status, _, content = self.ask(*arguments, **options)
        error = json.loads(content)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return status, error["code"]

    def stop_work(self) -> None:
        """What the first signal does, and its end."""
        self.parts.stop()
        self.parts.engine_thread.join(20)
        assert not self.parts.engine_thread.is_alive

    def close(self) -> None:
        """Stop everything at once."""
        self.is_open = False
        for client in self._clients:
            client.close()
        for _ in range(2):
            self.parts.stop()
        self.parts.engine_thread.join(20)
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._listener.close()
        self.parts.close()


def until(condition: Callable[[], Any], timeout_s: float = 20) -> Any:
    """Wait until something is the case; returns it."""
    give_up_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < give_up_s, "it did not happen in time"
        time.sleep(0.01)
    return value


def upload(client: openai.OpenAI, rows: list[Any]) -> Any:
    """A file of rows."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return client.files.create(file=("rows.jsonl", b"\n".join(lines)), purpose="batch")


def begin(client: openai.OpenAI, rows: list[Any], **options: Any) -> Any:
    """A batch of chat rows."""
    return client.batches.create(
        **{
            "input_file_id": upload(client, rows).id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            **options,
        }
    )


def ended(client: openai.OpenAI, batch: Any, timeout_s: float = 20) -> Any:
    """The batch when it has ended."""

    def look() -> Any:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ENDED else None

    return until(look, timeout_s)


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a result file."""
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]

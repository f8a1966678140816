"""A server for each test that asks for one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import RunningServer


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers on `tmp_path/data`; all are closed at the end."""
    servers: list[RunningServer] = []

    def begin(*arguments: Any, **options: Any) -> RunningServer:
        options.setdefault("data", tmp_path / "data")
        servers.append(RunningServer(options.pop("data"), *arguments, **options))
        return servers[-1]

    yield begin
    for server in servers:
        if server.is_open:
            server.close()


@pytest.fixture
def server(start: Callable[..., RunningServer]) -> RunningServer:
    return start()


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for the tests of a file that leave it as it was; starting one takes a while."""
    server = RunningServer(tmp_path_factory.mktemp("common") / "data")
    yield server
    server.close()

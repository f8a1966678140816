"""Listening: uvicorn in the main thread, and what signals do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from batchwright.errors import ConfigError
from batchwright.server.app import make_app
from batchwright.server.parts import Parts
from batchwright.server.settings import MAX_CONNECTIONS, ServerSettings

logger = logging.getLogger(__name__)

FAILED = 1
INTERRUPTED = 75  # the same command goes on where it was left
LAST_ANSWERS_S = 3
AT_ONCE_S = 10.0  # what a step and a commit may take when the server is to end at once


class _Server(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that listens where the settings say; done before a model is loaded.

    Clients that come meanwhile wait until `serve`.

    Raises:
        ConfigError: the address is in use or not ours.
    """
    listener = None
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # or a second server could bind it too, and fail with its model loaded
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}"
        ) from error
    return listener


def serve(
    parts: Parts, listener: socket.socket, *, say: Callable[[str], None] = lambda text: None
) -> int:
    """Serve until a signal asks to stop, or what computes is gone; returns the exit status.

    The first SIGINT or SIGTERM lets running rows and calls finish, for a minute at most; the
    second ends after the step that runs; the third ends the process where it is. What is on the
    disk is whole in any case.
    """
    return asyncio.run(_serve(make_server(parts), parts, listener, say))


def make_server(parts: Parts) -> uvicorn.Server:
    """A server that knows nothing of signals; `serve(sockets=[...])` runs it."""
    config = uvicorn.Config(
        make_app(parts),
        http="h11",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
    return _Server(config)


async def _serve(
    server: uvicorn.Server, parts: Parts, listener: socket.socket, say: Callable[[str], None]
) -> int:
    loop = asyncio.get_running_loop()
    num_signals = 0

    def on_signal() -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 2:
            os._exit(INTERRUPTED)
        parts.stop()
        say(
            "Stopping: what runs is finished first, in at most a minute; again to stop at once."
            if num_signals == 1
            else "Stopping at once."
        )

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    parts.start()
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await _until_ended(parts, serving, lambda: num_signals > 1)
    finally:
        server.should_exit = True
        await serving
        parts.close()
    if (gone := parts.engine_thread.gone) is not None:
        say(f"batchwright: {gone}")
        return INTERRUPTED
    if not parts.is_stopping:
        say("The engine has ended by itself, which is a bug; start the server again to go on.")
        return FAILED
    if parts.engine_thread.is_alive:  # in a step that does not end; the process takes it along
        os._exit(INTERRUPTED)
    return INTERRUPTED if parts.has_unfinished else 0


async def _until_ended(
    parts: Parts, serving: asyncio.Future[None], is_urgent: Callable[[], bool]
) -> None:
    """Wait for the engine's thread, after a stop; or for the server, should it fail."""
    loop = asyncio.get_running_loop()
    give_up_s = float("inf")
    while parts.engine_thread.is_alive and not serving.done():
        await asyncio.sleep(0.05)
        if is_urgent():
            give_up_s = min(give_up_s, loop.time() + AT_ONCE_S)
        if loop.time() > give_up_s:
            return

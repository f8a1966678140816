"""Forms that bring a file to the server, in pieces."""

from __future__ import annotations

import asyncio
import atexit
import logging
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request

from batchwright.server.api_error import ApiError
from batchwright.server.upload import MAX_FIELD_BYTES, MAX_PARTS, Upload
from tests.fuzz.allocation import allocates_in_proportion, file_of

MAX_FILE_BYTES = 512
MAX_PIECES = 32


def run(data: bytes) -> None:
    """First byte: the least size of pieces; up to the first line break: the content type."""
    kind, _, body = data[1:].partition(b"\n")
    size = max(data[0] if data else 1, len(body) // MAX_PIECES, 1)
    path = file_of(b"", "upload")
    path.unlink()
    with allocates_in_proportion(len(data)):
        runner().run(receive(path, kind, body, size))


async def receive(path: Path, kind: bytes, body: bytes, size: int) -> None:
    """What the server does with a request."""
    pieces = iter([body[at : at + size] for at in range(0, len(body), size)])

    async def next_message() -> dict[str, Any]:
        piece = next(pieces, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    scope = {"type": "http", "headers": [(b"content-type", kind)]}
    upload = Upload(path, MAX_FILE_BYTES)
    try:
        await upload.receive(Request(scope, next_message), timeout_s=20)
        assert upload.filename is not None
        assert path.stat().st_size == upload.num_bytes <= MAX_FILE_BYTES
    except ApiError:
        pass
    finally:
        upload.close()
    assert len(upload.fields) <= MAX_PARTS
    assert all(len(value) <= MAX_FIELD_BYTES for value in upload.fields.values())


@cache
def runner() -> asyncio.Runner:
    """One event loop for all inputs, closed when the process ends."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # warns of each bad form
    made = asyncio.Runner()
    atexit.register(made.close)
    return made


def seeds() -> list[bytes]:
    """The form that clients send, some that are wrong, and names in other scripts."""
    kind = b"multipart/form-data; boundary=B\n"
    purpose = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    name = 'Content-Disposition: form-data; name="file"; filename="日本.jsonl"\r\n'.encode()
    file = b"--B\r\n" + name + b"Content-Type: application/octet-stream\r\n\r\n{}\n{}\r\n"
    return [
        bytes([size]) + head + body
        for size in (255, 6)
        for head, body in (
            (kind, purpose + file + b"--B--\r\n"),
            (kind, file + file + b"--B--"),
            (kind, purpose * 20),
            (kind, file.replace(b"{}", b"x" * 600) + b"--B--"),
            (b'multipart/form-data; boundary="' + b"B" * 300 + b'"\n', b"--B"),
            (b"application/json\n", b"{}"),
        )
    ]


WORDS = ("--B", "--B--", "\r\n", "form-data", "name=", "filename*=", "boundary=", "content-")

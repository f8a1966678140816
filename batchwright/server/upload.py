"""Receiving a file: a multipart form, written to the disk as it arrives, never held in memory."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from batchwright.job.durable import write_all
from batchwright.server.api_error import ApiError, missing
from batchwright.server.bodies import too_large

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 4096
MAX_PARTS = 16
MAX_HEADERS = 16  # of one part
MAX_BOUNDARY_BYTES = 70  # RFC 2046
FORM_BYTES = 2**16  # what a form takes besides its file


class Upload:
    """One form with a file.

    Args:
        path: where the file's bytes go; it must not exist.
        max_bytes: the largest file.

    Attributes:
        fields: the form's other fields.
        filename: the name that the client gives the file, if there was a file.
        num_bytes: the file's size.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._headers: dict[str, bytes] = {}
        self._header_name, self._header_value = b"", b""
        self._field: str | None = None  # the one being read; None: the file
        self._value = b""
        self._num_parts = 0
        self._is_whole = False

    async def receive(self, request: Request, *, timeout_s: float) -> None:
        """Read the whole form.

        Raises:
            ApiError: it is no such form, too large, or nothing arrived for `timeout_s`.
            OSError: the disk fails.
        """
        parser = self._parser(request)
        stream = request.stream()
        try:
            while True:
                chunk = await asyncio.wait_for(anext(stream, None), timeout_s)
                if chunk is None:
                    break
                parser.write(chunk)
            parser.finalize()
        except TimeoutError:
            raise ApiError(408, "the upload stopped arriving", code="timeout") from None
        except FormParserError:
            raise _torn() from None
        if not self._is_whole:
            raise _torn()
        if self.filename is None:
            raise missing("file")
        await asyncio.to_thread(os.fsync, self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _parser(self, request: Request) -> MultipartParser:
        kind, options = parse_options_header(request.headers.get("content-type"))
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(
                400,
                "a file is uploaded as multipart/form-data with the fields purpose and file",
                code="invalid_form",
            )
        if len(boundary) > MAX_BOUNDARY_BYTES:
            raise ApiError(
                400,
                f"the form's boundary has {len(boundary)} bytes; at most {MAX_BOUNDARY_BYTES} "
                "are allowed",
                code="invalid_form",
            )
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_name,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        return MultipartParser(boundary, callbacks)

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise ApiError(400, f"the form has more than {MAX_PARTS} parts", code="invalid_form")
        self._headers, self._value = {}, b""

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._check_header()

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        num_bytes = len(self._header_name) + len(self._header_value)
        if num_bytes > MAX_FIELD_BYTES or len(self._headers) == MAX_HEADERS:
            raise ApiError(
                400,
                f"a part of the form has more than {MAX_HEADERS} headers, or one of more than "
                f"{MAX_FIELD_BYTES} bytes",
                code="invalid_form",
            )

    def _end_header(self) -> None:
        name = self._header_name.decode("latin-1").lower()
        self._headers[name] = self._header_value
        self._header_name, self._header_value = b"", b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" not in options or name != "file":
            self._field = name
            return
        if self.filename is not None:
            raise ApiError(400, "the form has two files", code="invalid_form", param="file")
        self._field = None
        self.filename = options[b"filename"].decode("utf-8", "replace")

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is not None:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise too_large(len(self._value), MAX_FIELD_BYTES)
            return
        self.num_bytes += end - start
        if self.num_bytes > self._max_bytes:
            raise too_large(self.num_bytes, self._max_bytes)
        write_all(self._fd, data[start:end])

    def _end_part(self) -> None:
        if self._field is not None:
            self.fields[self._field] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._is_whole = True


def _torn() -> ApiError:
    return ApiError(400, "the body is not a whole multipart form", code="invalid_form")

"""What a server is told, and what it will not do: settings and limits."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from batchwright.errors import ConfigError

KEY_VARIABLE = "BATCHWRIGHT_API_KEY"
MIN_KEY_CHARS = 16

MAX_CALLS = 4096  # single calls that wait or run; a list counts as its entries
MAX_CALL_BYTES = 16 * 2**20  # the body of one
MAX_BODIES_BYTES = 128 * 2**20  # of all that are being read or wait
MAX_SMALL_BYTES = 2**16  # a body that only names things
BODY_TIMEOUT_S = 60.0
MAX_UPLOADS = 4  # at the same time
UPLOAD_TIMEOUT_S = 30.0  # without a byte
MIN_FREE_BYTES = 256 * 2**20  # of the disk, which uploads leave
MAX_UNFINISHED_BATCHES = 1000
MAX_CONNECTIONS = 1200
DEFAULT_MAX_UPLOAD = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a server is reached and what it keeps.

    Attributes:
        host, port: where it listens; port 0 is any free one.
        data: the directory of its files and batches.
        model_name: the name it gives its model.
        api_key: what clients have to show; None: nothing.
        max_upload_bytes: size of the largest file it takes.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    data: Path
    model_name: str
    api_key: str | None = None
    max_upload_bytes: int = DEFAULT_MAX_UPLOAD

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Refuse what would let everybody in.

        Raises:
            ConfigError: with the remedy.
        """
        if self.api_key is not None and len(self.api_key) < MIN_KEY_CHARS:
            raise ConfigError(
                f"the API key has {len(self.api_key)} characters; it needs at least "
                f"{MIN_KEY_CHARS}: openssl rand -hex 24"
            )
        if self.api_key is None and not self.is_local:
            raise ConfigError(
                f"{self.host} can be reached from other machines; set an API key in "
                f"{KEY_VARIABLE} or with --api-key-file, or leave --host out"
            )


def is_loopback(host: str) -> bool:
    """Whether a host name means this machine alone.

    Raises:
        ConfigError: it means nothing.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}") from None
    return all(ipaddress.ip_address(str(info[4][0])).is_loopback for info in found)


def read_api_key(file: Path | None) -> str | None:
    """The key in a file, or in the environment; never an argument, which everybody can see.

    Raises:
        ConfigError: the file cannot be read, or others can read it.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        if file.stat().st_mode & 0o077 and file.is_file():
            raise ConfigError(f"{file} can be read by others; chmod 600 {file}")
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {file}: {reason}") from None

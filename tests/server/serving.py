"""The real command `batchwright serve`, as a process with the real model."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "batchwright.cli.main")


@contextmanager
def serving(data: Path, *options: str) -> Iterator[tuple[openai.OpenAI, str]]:
    """(client, root URL) of a server that is ended by a signal."""
    command = [*COMMAND, "serve", "--model", "smollm2", "--port", "0", "--data", str(data)]
    command += options
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            line = next(line for line in running.stderr if line.startswith("Serving"))
            url = line.partition("(API: ")[2].rstrip(")\n")
            with openai.OpenAI(base_url=url, api_key="none") as client:
                yield client, url.removesuffix("/v1")
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0
        finally:
            running.kill()

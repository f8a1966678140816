"""`batchwright serve`: Files, Batches and single calls over HTTP, and a page."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchwright.cli import options
from batchwright.cli.numbers import parse_count

if TYPE_CHECKING:
    from batchwright.server.settings import ServerSettings

NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}


def serve(
    model: Annotated[str, typer.Option(help="smollm2, a Hugging Face directory, or a GGUF file.")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Where files and batches are kept.")
    ] = Path("batchwright-data"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the key that clients need; mode 0600."),
    ] = None,
    max_upload: Annotated[
        int | None,
        typer.Option(
            parser=parse_count, metavar="BYTES", help="Largest file taken; by default 512M."
        ),
    ] = None,
    prompt_schema: options.PromptSchema = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    kv_cache_memory: options.KVCacheMemory = None,
    kv_tokens: options.KVTokens = None,
    swap_space: options.SwapSpace = None,
    block_size: options.BlockSize = None,
    order: options.Order = None,
    lengths: options.Lengths = None,
    device: options.Device = options.DeviceName.auto,
    dtype: options.Dtype = options.DtypeName.auto,
    quantize: options.Quantize = None,
    kv_cache_dtype: options.KVCacheDtype = options.KVCacheDtypeName.auto,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    tensor_parallel_size: options.TensorParallelSize = None,
    data_parallel_size: options.DataParallelSize = None,
    no_prefix_sharing: options.NoPrefixSharing = False,
) -> None:
    """Serve OpenAI's Files and Batches API, single calls, and a page of what runs; docs/serve.md.

    Batches are jobs: they are kept in DIR, run one after the other, and go on after a crash or a
    stop when the server starts again. Single calls join the batch that runs.

    The API key is read from the environment variable BATCHWRIGHT_API_KEY or from --api-key-file.
    Ctrl-C (or SIGTERM) finishes what runs, for a minute at most; a second one ends at once.

    Exit status: 0 nothing is left to do, 2 it could not start, 75 batches go on at the next start
    (stopped before their end, or a process that computed is gone).
    """
    _check_packages()
    from batchwright.config import EngineConfig
    from batchwright.server.settings import DEFAULT_MAX_UPLOAD, ServerSettings, read_api_key

    engine = {
        "device": device.value,
        "dtype": dtype.value,
        "quantize": quantize and quantize.value,
        "kv_cache_dtype": kv_cache_dtype.value,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_bytes": kv_cache_memory,
        "kv_tokens": kv_tokens,
        "swap_space_bytes": swap_space,
        "block_size": block_size,
        "order": order or "fcfs",  # single calls wait for nothing
        "length_predictor": lengths,
        "num_threads": threads,
        "tensor_parallel_size": tensor_parallel_size,
        "data_parallel_size": data_parallel_size,
        "seed": seed,
        "prefix_sharing": not no_prefix_sharing,
    }
    engine = {name: value for name, value in engine.items() if value is not None}
    EngineConfig(**engine).check()  # type: ignore[arg-type]
    settings = ServerSettings(
        host=host,
        port=port,
        data=data,
        model_name=model,
        api_key=read_api_key(api_key_file),
        max_upload_bytes=max_upload or DEFAULT_MAX_UPLOAD,
    )
    settings.check()
    raise typer.Exit(_serve(settings, engine, prompt_schema or []))


def _serve(settings: ServerSettings, engine: dict[str, Any], prompt_schema: list[str]) -> int:
    """Check, listen, load, serve; returns the exit status."""
    from rich.console import Console

    from batchwright.cli.run import load, set_up_logging
    from batchwright.prompt_cache.schema import read_schemas
    from batchwright.server.parts import Parts, lock_data
    from batchwright.server.run import listen
    from batchwright.server.run import serve as run_server
    from batchwright.weights.locate import locate_model

    log = Console(stderr=True)
    set_up_logging(log)

    def say(text: str) -> None:
        log.print(text, markup=False, highlight=False, soft_wrap=True)

    locate_model(settings.model_name)
    schemas = read_schemas(prompt_schema)
    with listen(settings) as listener:
        lock = lock_data(settings.data)
        say(f"Loading {settings.model_name}")
        parts = Parts(load(settings.model_name, engine), settings, lock, schemas=schemas)
        port = listener.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"Serving {settings.model_name} on http://{host}:{port} (API: http://{host}:{port}/v1)")
        return run_server(parts, listener, say=say)


def _check_packages() -> None:
    from batchwright.errors import ConfigError

    for module, package in NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            raise ConfigError(
                f"batchwright serve needs {package}: pip install 'batchwright[serve]'"
            ) from None

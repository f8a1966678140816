"""`batchwright bench`: how fast this machine runs known workloads, beside other engines."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchwright.cli import options

if TYPE_CHECKING:
    from batchwright.bench.compare import Comparison
    from batchwright.bench.engines import Peer
    from batchwright.bench.workloads import WorkRequest
    from batchwright.opened_model import OpenedModel

SOME_FAILED = 1
WORKLOADS = ("W1", "W2", "W3", "W4")
FILE = "file"
BUSY_LOAD = 1.0
"""Load average of the last minute from which on it is worth saying that others use the machine."""


def bench(
    model: options.Model,
    input_path: options.InputPath = None,
    input_option: options.InputOption = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write all that was measured as JSON."),
    ] = None,
    workloads: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Of W1,W2,W3,W4; by default all, or none beside IN."),
    ] = None,
    scale: Annotated[float, typer.Option(help="Share of the workloads' requests, 1 is all.")] = 0.5,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 1,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE[:DTYPE]",
            help="Also run vllm, openvino, llama.cpp or transformers; may be repeated.",
        ),
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE=PATH", help="Interpreter of the environment that has the engine."
        ),
    ] = None,
    peer_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE=PATH", help="The model as that engine reads it; by default ours."
        ),
    ] = None,
    column: options.Column = None,
    template: options.Template = None,
    endpoint: options.Endpoint = None,
    limit: options.Limit = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    kv_cache_memory: options.KVCacheMemory = None,
    order: options.Order = None,
    dtype: options.Dtype = options.DtypeName.auto,
    quantize: options.Quantize = None,
    kv_cache_dtype: options.KVCacheDtype = options.KVCacheDtypeName.auto,
    threads: options.Threads = None,
) -> None:
    """Measure the four workloads, or a file, and say how near that is to what the machine allows.

    Rows generate exactly as many tokens as they may, greedily. Every run has a process of its own;
    other engines take turns with ours, on the CPU. docs/bench.md explains each number. Use an idle
    machine.

    With -o, what is measured is written after every run, so a bench that is stopped keeps it.

    Exit status: 0 all ran, 1 another engine is missing or failed, 2 nothing could be measured.
    """
    from batchwright.job.preflight import STDIO, JobArguments

    source = None
    if input_path is not None or input_option is not None:
        source = options.one_source(input_path, input_option)
    settings = options.given(
        device="cpu",  # whose products the bounds are of
        dtype=dtype.value,
        quantize=quantize and quantize.value,
        kv_cache_dtype=kv_cache_dtype.value,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_bytes=kv_cache_memory,
        order=order,
        num_threads=threads,
    )
    arguments = None
    if source is not None:
        arguments = JobArguments(
            source=source,
            output=STDIO,
            column=column,
            template=template,
            endpoint=endpoint,
            limit=limit,
        )
    names = _names(workloads, is_file_given=source is not None)
    if not (scale > 0 and math.isfinite(scale)):
        raise typer.BadParameter(f"{scale} is not above 0", param_hint="'--scale'")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # engines are ended on the way out
    raise typer.Exit(
        _bench(
            model,
            arguments,
            names,
            settings,
            scale=scale,
            repeat=repeat,
            peers=(against or [], python or [], peer_model or []),
            output=output,
        )
    )


def _names(workloads: str | None, *, is_file_given: bool) -> list[str]:
    if workloads is None:
        return [] if is_file_given else list(WORKLOADS)
    names = [name.strip().upper() for name in workloads.split(",")]
    for name in names:
        if name not in WORKLOADS:
            raise typer.BadParameter(
                f"{name!r:.40} is none of {', '.join(WORKLOADS)}", param_hint="'--workloads'"
            )
    return list(dict.fromkeys(names))


def _bench(
    model: str,
    arguments: Any,
    names: list[str],
    settings: dict[str, Any],
    *,
    scale: float,
    repeat: int,
    peers: tuple[list[str], list[str], list[str]],
    output: str | None,
) -> int:
    """Check what can be checked, measure, print; returns the exit status."""
    from rich.console import Console

    from batchwright.bench.engines import find_peers
    from batchwright.cli.bench_text import comparison_as_json, comparison_as_text
    from batchwright.cli.plan import open_model
    from batchwright.cli.report import write_page
    from batchwright.cli.run import set_up_logging
    from batchwright.config import EngineConfig
    from batchwright.weights.locate import locate_model

    log = Console(stderr=True)
    set_up_logging(log)
    EngineConfig(**settings).check()
    path = locate_model(model)  # before torch is imported
    engines = find_peers(*peers, path)
    if output is not None:
        _check_writable(output)  # now rather than when all is done
    opened = open_model(model, settings)
    loads, num_left_out = _loads(opened, arguments, names, scale)
    if num_left_out:
        log.print(f"{num_left_out:,} rows of the file generate nothing and are left out")
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        log.print(
            f"Others use this machine (load {load:.1f}): everything will take longer than it need",
            highlight=False,
        )
    about = {"model": model, "scale": scale, "rounds": repeat, "load_average_at_start": load}

    def keep(found: Comparison) -> None:
        if output is not None:
            write_page(output, comparison_as_json(found, about, opened.config))

    found = _compare(opened, loads, engines, settings, repeat, log, keep)
    print(comparison_as_text(found, model, opened.config.num_threads))
    keep(found)
    if output is not None:
        print(f"\nJSON: {output}")
    failed = any(one.failure for load in found.workloads for one in load.engines.values())
    return SOME_FAILED if failed else 0


def _check_writable(path: str) -> None:
    from batchwright.errors import OutputError

    try:
        with open(path, "a", encoding="utf-8"):  # what is in it stays until there is something new
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _loads(
    opened: OpenedModel, arguments: Any, names: list[str], scale: float
) -> tuple[dict[str, list[WorkRequest]], int]:
    """Requests by name, and the rows of the file that cannot be measured."""
    from batchwright.bench.user_rows import read_user_rows
    from batchwright.bench.workloads import build_workloads, plain_encoder
    from batchwright.errors import ConfigError
    from batchwright.job.preflight import open_rows
    from batchwright.limits import ModelLimits

    max_model_len, num_left_out = opened.config.max_model_len, 0
    loads = {}
    if names:
        built = build_workloads(plain_encoder(opened.tokenizer.encode), scale=scale)
        loads = {name: built[name] for name in names}
    for name, requests in loads.items():
        longest = max(len(one.prompt_token_ids) + one.num_output_tokens for one in requests)
        if longest > max_model_len:
            raise ConfigError(
                f"rows of {name} have {longest} tokens, the model's context is {max_model_len}; "
                "choose others with --workloads"
            )
    if arguments is not None:
        arguments.check()
        rows, _ = open_rows(arguments)
        limits = ModelLimits(max_model_len, opened.shape.vocab_size)
        loads[FILE], num_left_out = read_user_rows(rows, opened.tokenizer, limits)
    return loads, num_left_out


def _compare(
    opened: OpenedModel,
    loads: dict[str, list[WorkRequest]],
    engines: list[Peer],
    settings: dict[str, Any],
    repeat: int,
    log: Any,
    keep: Callable[[Comparison], None],
) -> Comparison:
    from batchwright.bench.bounds import Rates
    from batchwright.bench.compare import compare
    from batchwright.bench.rates import measure_rates
    from batchwright.cli.advise import use_threads
    from batchwright.weights.forms import stored_forms

    num_threads = opened.config.num_threads

    def rates() -> Rates:
        log.print("Measuring the machine's products", highlight=False)
        use_threads(num_threads)
        return measure_rates(
            opened.shape,
            opened.dtype,
            forms=stored_forms(opened.checkpoint),
            quantize=opened.config.quantize,
        )

    def tell(line: str) -> None:
        log.print(line, markup=False, highlight=False, soft_wrap=True)
        sys.stderr.flush()

    return compare(
        loads,
        opened.shape,
        model=Path(opened.path),
        settings=settings,
        num_threads=num_threads,
        peers=engines,
        num_rounds=repeat,
        measure_rates=rates,
        tell=tell,
        keep=keep,
    )

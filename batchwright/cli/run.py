"""`batchwright run`: a file of requests in, a file of results out."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchwright.cli import options
from batchwright.cli.numbers import parse_duration, parse_shard

if TYPE_CHECKING:
    from rich.console import Console

    from batchwright.job.events import JobEvent
    from batchwright.job.file_job import FileJob
    from batchwright.job.preflight import JobArguments
    from batchwright.job.stop import StopControl
    from batchwright.job.summary import JobSummary
    from batchwright.llm import LLM

SOME_ROWS_FAILED = 1
INTERRUPTED = 75  # the same command goes on where it was left


def run(
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="OUT", help="Result file; - is stdout.")
    ],
    model: options.Model,
    input_path: options.InputPath = None,
    input_option: options.InputOption = None,
    error_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Failed rows. By default OUT with .errors before its suffix."
        ),
    ] = None,
    column: options.Column = None,
    template: options.Template = None,
    endpoint: options.Endpoint = None,
    prompt_schema: options.PromptSchema = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start over: forget the job and replace its files.")
    ] = False,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Write OUT in input order, when the job ends.")
    ] = False,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Do not run rows again that failed before.")
    ] = False,
    limit: options.Limit = None,
    sample: options.Sample = None,
    shard: options.Shard = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration, metavar="TIME", help="Rows not done after TIME expire: 90s, 2h."
        ),
    ] = None,
    row_timeout: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration, metavar="TIME", help="A row that has run for TIME expires."
        ),
    ] = None,
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, as batchwright plan.")
    ] = False,
    prices: options.Prices = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: one JSON object.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, metavar="PORT", help="Serve metrics for Prometheus; 0: any port."
        ),
    ] = None,
) -> None:
    """Run a file of requests through a model: JSONL, CSV, Parquet, a dataset; docs/formats.md.

    Results are written as rows finish. A row that fails goes to the error file with its line and
    the reason; the others go on. N may be written 4k (4,000), 4K (4,096) or 1.5G.

    The state of the job is kept in OUT.job. After an interruption, a crash or a full disk the same
    command goes on where it was left; rows that failed are tried again.

    Exit status: 0 all rows succeeded, 1 some failed, 2 the job could not run, 75 interrupted.
    """
    from batchwright.job.preflight import JobArguments

    settings = options.given(
        device=device.value,
        dtype=dtype.value,
        quantize=quantize and quantize.value,
        kv_cache_dtype=kv_cache_dtype.value,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_bytes=kv_cache_memory,
        kv_tokens=kv_tokens,
        swap_space_bytes=swap_space,
        block_size=block_size,
        order=order,
        length_predictor=lengths,
        num_threads=threads,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        seed=seed,
        prefix_sharing=not no_prefix_sharing,
    )
    arguments = JobArguments(
        source=options.one_source(input_path, input_option),
        output=output,
        errors=error_file,
        column=column,
        template=template,
        endpoint=endpoint,
        prompt_schema=prompt_schema,
        force=force,
        in_input_order=ordered,
        keep_failed=keep_failed,
        limit=limit,
        sample=sample,
        shard=None if shard is None else parse_shard(shard),
        deadline_s=math.inf if deadline is None else deadline,
        row_timeout_s=math.inf if row_timeout is None else row_timeout,
    )
    if dry_run:
        from batchwright.cli.plan import show_plan

        raise typer.Exit(show_plan(arguments, model, settings, prices=prices, as_json=as_json))
    if prices is not None or as_json:
        raise typer.BadParameter("--prices and --json go with --dry-run")
    try:
        if metrics_port is None:
            status = _run(arguments, model, settings)
        else:
            from batchwright.job.directory import printable_name
            from batchwright.report.prometheus import MetricsPort

            with MetricsPort(printable_name(output), metrics_port) as port:
                print(f"Metrics: {port.url}", file=sys.stderr)
                status = _run(arguments, model, settings, watch=port.on_event)
    except KeyboardInterrupt:  # before the job or after it; in between it is a request to stop
        goes_on = "" if output == "-" else "; the same command goes on"
        print(f"batchwright: interrupted{goes_on}", file=sys.stderr)
        status = INTERRUPTED
    raise typer.Exit(status)


def _run(
    arguments: JobArguments,
    model: str,
    settings: dict[str, Any],
    watch: Callable[[JobEvent], None] = lambda event: None,
) -> int:
    """Check, load, run, report; returns the exit status."""
    from rich.console import Console

    from batchwright.config import EngineConfig
    from batchwright.job.file_job import FileJob
    from batchwright.weights.locate import locate_model

    EngineConfig(**settings).check()
    log = Console(stderr=True)
    set_up_logging(log)
    with FileJob(arguments, _known(settings)) as job:
        start_s = time.perf_counter()
        try:
            locate_model(model)  # before torch is imported; a hub id is downloaded here
            log.print(f"Loading {model}", markup=False, highlight=False)
            llm = load(model, settings)
        except KeyboardInterrupt:
            log.print("Interrupted while loading; no row was run and nothing was written.")
            return INTERRUPTED
        return _run_job(job, llm, log, watch, load_s=time.perf_counter() - start_s)


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that mean the same before a model is loaded as after it."""
    names = [name for name in ("seed", "max_model_len", "quantize") if name in settings]
    if settings.get("dtype") != options.DtypeName.auto:
        names.append("dtype")
    if settings.get("kv_cache_dtype") != options.KVCacheDtypeName.auto:
        names.append("kv_cache_dtype")
    return {name: settings[name] for name in names}


def _run_job(
    job: FileJob, llm: LLM, log: Console, watch: Callable[[JobEvent], None], *, load_s: float
) -> int:
    from rich.console import Console

    from batchwright.cli.progress import ProgressReport
    from batchwright.cli.summary_text import print_summary
    from batchwright.errors import OutputError, ResourceError
    from batchwright.job.preflight import STDIO

    try:
        with stop_on_signals() as stop, ProgressReport(log) as progress:
            on_event = _tell(progress.on_event, watch)
            summary = job.run(llm, stop=stop, on_event=on_event, load_s=load_s)
    except (OutputError, ResourceError) as error:
        log.print(f"batchwright: {error}", markup=False, highlight=False, soft_wrap=True)
        return INTERRUPTED
    output = job.arguments.output
    report = log if STDIO in (output, job.errors) else Console()
    print_summary(report, summary, load_s=load_s, output=output, errors=job.errors)
    return exit_status(summary)


def _tell(*listeners: Callable[[JobEvent], None]) -> Callable[[JobEvent], None]:
    def tell(event: JobEvent) -> None:
        for listener in listeners:
            listener(event)

    return tell


def load(model: str, settings: dict[str, Any]) -> LLM:
    """Load a model. torch is imported here, after everything that can fail sooner."""
    from batchwright.llm import LLM

    return LLM(model, **settings)


def exit_status(summary: JobSummary) -> int:
    """0 if all rows succeeded, 1 if some failed or expired, 75 if the job was stopped."""
    if summary.stopped:
        return INTERRUPTED
    failed = summary.num_failed or summary.num_failed_before or summary.num_expired
    return SOME_ROWS_FAILED if failed else 0


@contextmanager
def stop_on_signals() -> Iterator[StopControl]:
    """Ctrl-C and SIGTERM ask the job to stop, instead of breaking it off anywhere."""
    from batchwright.job.stop import StopControl

    stop = StopControl()
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.request()) for number in wanted}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_up_logging(console: Console) -> None:
    """Show what the library has to say, above the bar on a terminal."""
    from rich.logging import RichHandler

    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    else:
        handler = logging.StreamHandler(console.file)
    logger = logging.getLogger("batchwright")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)

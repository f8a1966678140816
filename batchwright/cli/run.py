"""`batchwright run`: a file of requests in, a file of results out."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchwright.cli.numbers import parse_count

if TYPE_CHECKING:
    from rich.console import Console

    from batchwright.job.stop import StopControl
    from batchwright.job.summary import JobSummary
    from batchwright.llm import LLM

SOME_ROWS_FAILED = 1
INTERRUPTED = 130


class Dtype(StrEnum):
    """Number format of weights and activations."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def run(
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="OUT", help="Result file; - is stdout.")
    ],
    model: Annotated[str, typer.Option(help="smollm2, a Hugging Face directory, or a GGUF file.")],
    input_path: Annotated[
        str | None,
        typer.Argument(
            metavar="IN", help="JSONL file of requests; - is stdin.", show_default=False
        ),
    ] = None,
    input_option: Annotated[
        str | None, typer.Option("-i", "--input", metavar="IN", help="The same as IN.")
    ] = None,
    error_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Failed rows. By default OUT with .errors before its suffix."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing result files.")] = False,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            parser=parse_count, metavar="N", help="Most tokens of a row, prompt and output."
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(parser=parse_count, metavar="N", help="Most sequences running at once."),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(parser=parse_count, metavar="N", help="Most tokens computed in one step."),
    ] = None,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(parser=parse_count, metavar="BYTES", help="Memory for keys and values: 4G."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format to compute in.")] = Dtype.auto,
    seed: Annotated[
        int, typer.Option(min=0, help="Randomness of rows that give no seed of their own.")
    ] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default one per core.")
    ] = None,
    no_prefix_sharing: Annotated[
        bool, typer.Option("--no-prefix-sharing", help="Compute shared prefixes for each row.")
    ] = False,
) -> None:
    """Run a JSONL file of OpenAI batch lines or bare rows through a model.

    Results are written as rows finish. A row that fails goes to the error file with its line and
    the reason; the others go on. N may be written 4k (4,000), 4K (4,096) or 1.5G.

    Exit status: 0 all rows succeeded, 1 some failed, 2 the job could not run, 130 interrupted.
    """
    if (input_path is None) == (input_option is None):
        raise typer.BadParameter("give the input file once, as IN or with -i")
    source = input_path if input_path is not None else input_option
    assert source is not None
    settings = {
        "dtype": dtype.value,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_bytes": kv_cache_memory,
        "num_threads": threads,
        "seed": seed,
        "prefix_sharing": not no_prefix_sharing,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    raise typer.Exit(_run(source, output, error_file, model, given, force=force))


def _run(
    source: str,
    output: str,
    error_file: str | None,
    model: str,
    settings: dict[str, Any],
    *,
    force: bool,
) -> int:
    """Check, load, run, report; returns the exit status."""
    from rich.console import Console

    from batchwright.cli.preflight import STDIO, check_outputs, error_path_for, open_input
    from batchwright.cli.progress import ProgressReport
    from batchwright.cli.report import print_summary
    from batchwright.config import EngineConfig
    from batchwright.job.runner import JobOptions, run_job
    from batchwright.text.token_bytes import token_bytes
    from batchwright.weights.locate import locate_model

    EngineConfig(**settings).check()
    errors = error_file or error_path_for(output)
    check_outputs(source, output, errors, force=force)
    rows, input_bytes = open_input(source)
    log = Console(stderr=True)
    _set_up_logging(log)
    start_s = time.perf_counter()
    try:
        locate_model(model)  # before torch is imported; a hub id is downloaded here
        log.print(f"Loading {model}", markup=False, highlight=False)
        llm = load(model, settings)
    except KeyboardInterrupt:
        log.print("Interrupted while loading; no row was run and nothing was written.")
        return INTERRUPTED
    load_s = time.perf_counter() - start_s
    options = JobOptions(model_name=model, created=int(time.time()), input_bytes=input_bytes)
    with stop_on_signals() as stop, ProgressReport(log) as progress:
        summary = run_job(
            rows,
            output,
            errors,
            llm.engine,
            llm.tokenizer,
            token_bytes(llm.tokenizer.backend),
            options,
            stop=stop,
            on_event=progress.on_event,
        )
    report = log if output == STDIO else Console()
    print_summary(report, summary, load_s=load_s, output=output, errors=errors)
    return exit_status(summary)


def load(model: str, settings: dict[str, Any]) -> LLM:
    """Load a model. torch is imported here, after everything that can fail sooner."""
    from batchwright.llm import LLM

    return LLM(model, **settings)


def exit_status(summary: JobSummary) -> int:
    """0 if all rows succeeded, 1 if some failed, 130 if the job was stopped."""
    if summary.stopped:
        return INTERRUPTED
    return SOME_ROWS_FAILED if summary.num_failed else 0


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


def _set_up_logging(console: Console) -> None:
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

"""`batchwright advise`: which settings, how much memory and how many devices a job should have."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchwright.cli import options
from batchwright.cli.numbers import parse_count, parse_duration, parse_shard

if TYPE_CHECKING:
    from batchwright.job.advice import Advice, Question
    from batchwright.job.advise_job import Advisor
    from batchwright.job.confirm import Confirmation
    from batchwright.job.preflight import JobArguments
    from batchwright.job.run_job import JobModel
    from batchwright.plan.advise.knobs import Knobs
    from batchwright.prompt_cache.compose import PromptSchemas

SOME_ROWS_BAD = 1
CONFIRM_S = 60.0
RESERVE_BYTES = 1_000_000_000
"""Memory that models run for confirmation leave free besides their weights."""


def advise(
    model: options.Model,
    input_path: options.InputPath = None,
    input_option: options.InputOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The page; by default IN with .advice.html for its suffix, in this directory.",
        ),
    ] = None,
    column: options.Column = None,
    template: options.Template = None,
    endpoint: options.Endpoint = None,
    prompt_schema: options.PromptSchema = None,
    limit: options.Limit = None,
    sample: options.Sample = None,
    shard: options.Shard = None,
    latency_slo: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration,
            metavar="TIME",
            help="Most time between two tokens of a row, on average: 0.05s.",
        ),
    ] = None,
    arrivals: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Rows come one by one, so many a second, as in serve."),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration, metavar="TIME", help="How many devices finish within TIME?"
        ),
    ] = None,
    tokens_per_s: Annotated[
        int | None,
        typer.Option(
            parser=parse_count,
            metavar="N",
            help="How many devices reach N tokens a second, in and out?",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="For such a device, not this machine: H100, ..."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --device: sizes of a known model: Llama-3-8B."),
    ] = None,
    confirm_seconds: Annotated[
        float,
        typer.Option(min=0, metavar="N", help="About how long real runs may take; 0: none."),
    ] = CONFIRM_S,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    kv_cache_memory: options.KVCacheMemory = None,
    kv_tokens: options.KVTokens = None,
    block_size: options.BlockSize = None,
    order: options.Order = None,
    lengths: options.Lengths = None,
    dtype: options.Dtype = options.DtypeName.auto,
    quantize: options.Quantize = None,
    kv_cache_dtype: options.KVCacheDtype = options.KVCacheDtypeName.auto,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --device: one engine on N devices."),
    ] = None,
    no_prefix_sharing: options.NoPrefixSharing = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object; a page only with -o.")
    ] = False,
) -> None:
    """Find settings for a job by simulation, confirm them in short real runs, and say why.

    The order of rows, --max-num-seqs, --max-num-batched-tokens, --threads and --block-size are
    searched; those that are given are kept. It also says where throughput flattens, how much memory
    that needs, and what would fit in the rest; for a load of requests, how long they wait; for a
    target, how many devices meet it. docs/advise.md explains each line.

    Exit status: 0 all rows are sound, 1 some will fail, 2 no advice can be given.
    """
    from batchwright.job.preflight import STDIO, JobArguments

    arguments = JobArguments(
        source=options.one_source(input_path, input_option),
        output=STDIO,
        column=column,
        template=template,
        endpoint=endpoint,
        prompt_schema=prompt_schema,
        limit=limit,
        sample=sample,
        shard=None if shard is None else parse_shard(shard),
    )
    given = options.given(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_bytes=kv_cache_memory,
        kv_tokens=kv_tokens,
        block_size=block_size,
        order=order,
        length_predictor=lengths,
        num_threads=threads,
        quantize=quantize and quantize.value,
    )
    choices = {"dtype": dtype.value, "kv_cache_dtype": kv_cache_dtype.value}
    fixed = {*given, *(name for name, value in choices.items() if value != "auto")}
    settings = {
        **given,
        **choices,
        "seed": seed,
        "prefix_sharing": not no_prefix_sharing,
    }
    question = _question(
        fixed, latency_slo, arrivals, deadline, tokens_per_s, device, shape, tensor_parallel_size
    )
    page = output or (None if as_json else _page_path(str(arguments.source)))
    raise typer.Exit(
        _advise(arguments, model, settings, question, confirm_seconds, page, as_json=as_json)
    )


def _question(
    fixed: set[str],
    latency_slo: float | None,
    arrivals: float | None,
    deadline: float | None,
    tokens_per_s: int | None,
    device: str | None,
    shape: str | None,
    replica_size: int | None,
) -> Question:
    from batchwright.errors import ConfigError
    from batchwright.job.advice import Question
    from batchwright.plan.advise.devices import REPLICA_SIZES
    from batchwright.plan.hardware import find_device
    from batchwright.plan.model_shapes import find_model_shape

    if arrivals is not None and not (arrivals > 0 and math.isfinite(arrivals)):
        raise ConfigError(f"--arrivals is {arrivals}, must be above 0 requests per second")
    for name in ("quantize", "kv_cache_dtype", "num_threads"):
        if device is not None and name in fixed:
            flag = "--threads" if name == "num_threads" else f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} is not simulated for another device; leave it out with --device"
            )
    if replica_size is not None and device is None:
        raise ConfigError(
            "--tensor-parallel-size is for --device; advice on this machine is for one process "
            "(batchwright plan --tensor-parallel-size predicts others)"
        )
    if replica_size not in (None, *REPLICA_SIZES):
        sizes = ", ".join(map(str, REPLICA_SIZES))
        raise ConfigError(f"--tensor-parallel-size is {replica_size}, must be one of {sizes}")
    if shape is not None and device is None:
        raise ConfigError("--shape is for --device; here the model has its own sizes")
    return Question(
        slo_s=math.inf if latency_slo is None else latency_slo,
        arrivals_per_s=arrivals,
        target_s=deadline,
        target_tokens_per_s=tokens_per_s,
        device=None if device is None else find_device(device),
        model_shape=None if shape is None else find_model_shape(shape),
        replica_size=replica_size,
        fixed=frozenset(fixed),
    )


def _advise(
    arguments: JobArguments,
    model: str,
    settings: dict[str, Any],
    question: Question,
    confirm_s: float,
    page: str | None,
    *,
    as_json: bool,
) -> int:
    """Check what can be checked, find the advice, confirm it, print; returns the exit status."""
    from rich.console import Console

    from batchwright.cli.advise_text import advice_as_json, advice_as_text
    from batchwright.cli.plan import open_model
    from batchwright.cli.report import write_page
    from batchwright.cli.run import set_up_logging
    from batchwright.config import EngineConfig
    from batchwright.job.model_names import ModelNames
    from batchwright.job.preflight import check_outputs, open_rows
    from batchwright.prompt_cache.compose import PromptSchemas
    from batchwright.prompt_cache.schema import read_schemas
    from batchwright.report.figures import need_matplotlib
    from batchwright.weights.locate import locate_model

    log = Console(stderr=True)
    set_up_logging(log)
    EngineConfig(**settings).check()
    arguments.check()
    if page is not None:  # now rather than when all is done
        need_matplotlib()
        check_outputs(arguments.source, page, page)
    texts = read_schemas(arguments.prompt_schema or [])
    rows, _ = open_rows(arguments)
    locate_model(model)  # before torch is imported
    opened = open_model(model, settings)
    schemas = PromptSchemas(texts, opened.tokenizer) if texts else None
    from batchwright.job.advise_job import Advisor

    names = ModelNames(model)
    log.print("Reading rows and simulating settings", highlight=False)
    with Advisor(
        names.watch(rows), opened, question, check=names.check, schemas=schemas
    ) as advisor:
        advice = advisor.advise()
        found = _confirm(advisor, advice, arguments, model, settings, confirm_s, schemas)
    confirmation, not_run = (None, found) if isinstance(found, str) else (found, "")
    source = str(arguments.source)
    show = advice_as_json if as_json else advice_as_text
    print(show(advice, confirmation, not_run, source, model))
    if page is not None:
        from batchwright.report.advice_page import render_advice

        write_page(page, render_advice(advice, confirmation, not_run, source, model))
        if not as_json:
            print(f"\nPage: {page}")
    return SOME_ROWS_BAD if advice.counts.num_bad else 0


def _confirm(
    advisor: Advisor,
    advice: Advice,
    arguments: JobArguments,
    model: str,
    settings: dict[str, Any],
    budget_s: float,
    schemas: PromptSchemas | None,
) -> Confirmation | str:
    """Real runs of those that look better; or why there are none."""
    from batchwright.cli.run import load
    from batchwright.errors import ConfigError, InputError
    from batchwright.job.confirm import confirm
    from batchwright.job.preflight import open_rows

    contenders = [trial.knobs for trial in advice.contenders]
    if advisor.question.device is not None:
        return "it is for other hardware than this machine"
    if not contenders:
        return "there is nothing to compare"
    if advice.own.token_s > advisor.question.slo_s:
        return "the settings you have are predicted to break the latency limit"
    if not budget_s:
        return "--confirm-seconds is 0"
    opened = advisor.model
    affordable = int((opened.free_memory_bytes - RESERVE_BYTES) // max(opened.weight_bytes, 1)) - 1
    if affordable < 1:
        return "memory does not hold the model twice"
    try:
        rows, _ = open_rows(arguments)
    except (ConfigError, InputError):  # standard input, or a pipe
        return "the input can be read only once"

    def load_with(knobs: Knobs) -> JobModel:
        return load(model, {**settings, **dataclasses.asdict(knobs)})

    return confirm(
        advisor.simulation,
        contenders[:affordable],
        rows,
        advice.counts.num_read,
        load_with,
        use_threads,
        budget_s,
        schemas,
    )


def use_threads(num_threads: int) -> None:
    """Threads of matrix products and kernels, from now on."""
    import torch

    from batchwright import kernels

    kernels.set_num_threads(num_threads)
    torch.set_num_threads(num_threads)  # after the kernels': starting theirs resets it


def _page_path(source: str) -> str:
    """in.jsonl has in.advice.html, in the current directory."""
    from pathlib import Path

    from batchwright.job.preflight import STDIO

    name = "stdin" if source == STDIO else Path(source.rstrip("/")).name
    stem = Path(name.removesuffix(".gz").removesuffix(".zst")).stem
    return f"{stem or 'job'}.advice.html"

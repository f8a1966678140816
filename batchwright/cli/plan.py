"""`batchwright plan`: what a job will compute, take and cost, before the model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchwright.cli import options
from batchwright.cli.numbers import parse_shard

if TYPE_CHECKING:
    from batchwright.job.journal import FinishedRows
    from batchwright.job.plan_job import JobPlan
    from batchwright.job.preflight import JobArguments
    from batchwright.opened_model import OpenedModel

MANIFEST = "manifest.json"
SOME_ROWS_BAD = 1


def plan(
    model: options.Model,
    input_path: options.InputPath = None,
    input_option: options.InputOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="Plan what is left of the job that writes OUT."
        ),
    ] = None,
    column: options.Column = None,
    template: options.Template = None,
    endpoint: options.Endpoint = None,
    prompt_schema: options.PromptSchema = None,
    limit: options.Limit = None,
    sample: options.Sample = None,
    shard: options.Shard = None,
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
    prices: options.Prices = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a job will compute and how long it takes, without running the model.

    The input is read, checked and tokenised; identical rows and shared prefixes are found; the time
    is that of a simulated run on this machine. Nothing is written. docs/plan.md explains each line.

    Exit status: 0 all rows are sound, 1 some will fail, 2 the job cannot run.
    """
    from batchwright.job.preflight import STDIO, JobArguments

    arguments = JobArguments(
        source=options.one_source(input_path, input_option),
        output=output or STDIO,
        column=column,
        template=template,
        endpoint=endpoint,
        prompt_schema=prompt_schema,
        limit=limit,
        sample=sample,
        shard=None if shard is None else parse_shard(shard),
    )
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
    raise typer.Exit(show_plan(arguments, model, settings, prices=prices, as_json=as_json))


def show_plan(
    arguments: JobArguments,
    model: str,
    settings: dict[str, Any],
    *,
    prices: str | None = None,
    as_json: bool = False,
) -> int:
    """Plan and print; returns the exit status. `run --dry-run` is this too."""
    from rich.console import Console

    from batchwright.cli.plan_text import plan_as_json, plan_as_text
    from batchwright.cli.run import set_up_logging
    from batchwright.config import EngineConfig
    from batchwright.job.disk_space import free_bytes
    from batchwright.plan.prices import read_prices

    set_up_logging(Console(stderr=True))
    EngineConfig(**settings).check()
    price_list = None if prices is None else read_prices(prices)
    found = _plan(arguments, model, settings)
    show = plan_as_json if as_json else plan_as_text
    free_disk = free_bytes(arguments.output)
    print(show(found, str(arguments.source), model, prices=price_list, free_disk=free_disk))
    return SOME_ROWS_BAD if found.counts.num_bad else 0


def _plan(arguments: JobArguments, model: str, settings: dict[str, Any]) -> JobPlan:
    """Check what can be checked, open the model, whose weights stay where they are, and plan."""
    from batchwright.job.directory import job_directory_for
    from batchwright.job.formats.arranged_lines import Arrangement
    from batchwright.job.history import finished_lengths
    from batchwright.job.model_names import ModelNames
    from batchwright.job.plan_job import plan_job
    from batchwright.job.preflight import (
        check_not_foreign,
        check_outputs,
        error_path_for,
        open_rows,
    )
    from batchwright.prompt_cache.compose import PromptSchemas
    from batchwright.prompt_cache.schema import read_schemas, schema_settings
    from batchwright.weights.locate import locate_model

    arguments.check()
    schemas = read_schemas(arguments.prompt_schema or [])
    errors = arguments.errors or error_path_for(arguments.output)
    check_outputs(arguments.source, arguments.output, errors)
    directory = job_directory_for(arguments.output)
    if not arguments.force:
        check_not_foreign(directory / MANIFEST, arguments.output, errors)
    arrangement = Arrangement()
    rows, _ = open_rows(arguments, arrangement)
    locate_model(model)  # before torch is imported
    opened = open_model(model, settings)
    finished = share = None
    lengths: dict[str, int] = {}
    row_settings = {**arguments.row_settings(), **schema_settings(schemas)}
    if not arguments.force and _is_begun(directory, row_settings, opened):
        finished, share = _what_is_done(directory, keep_failed=arguments.keep_failed)
        lengths = finished_lengths(directory / "results.jsonl")
    names = ModelNames(model)
    rows = names.watch(rows)
    return plan_job(
        rows,
        opened,
        arrangement=arrangement,
        schemas=PromptSchemas(schemas, opened.tokenizer) if schemas else None,
        check=names.check,
        finished=finished,
        used_share=share,
        lengths=lengths,
    )


def open_model(model: str, settings: dict[str, Any]) -> OpenedModel:
    """Open a model. torch is imported here, after everything that can fail sooner."""
    from batchwright import opened_model

    return opened_model.open_model(model, settings)


def _is_begun(directory: Path, row_settings: dict[str, Any], model: OpenedModel) -> bool:
    """Whether the job was begun, which must have been in the same way."""
    from batchwright.job.manifest import compare_manifest, job_manifest

    if not (directory / MANIFEST).exists():
        return False
    manifest = job_manifest(model.identity(), row_settings)
    return compare_manifest(directory / MANIFEST, manifest)


def _what_is_done(directory: Path, *, keep_failed: bool) -> tuple[FinishedRows, float | None]:
    """The rows that are done, and the share of their allowed output tokens that they used."""
    from batchwright.job.history import finished_share
    from batchwright.job.journal import FinishedRows, RowState

    states = tuple(RowState) if keep_failed else (RowState.SUCCEEDED,)
    finished = FinishedRows(directory, states, looks_only=True)
    return finished, finished_share(directory / "metrics.jsonl")

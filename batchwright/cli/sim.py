"""`batchwright sim`: a job in several orders on any machine, without running it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchwright.cli import options
from batchwright.cli.numbers import parse_count

if TYPE_CHECKING:
    from batchwright.job.sim_job import Machine
    from batchwright.opened_model import OpenedModel
    from batchwright.plan.shape import ModelShape
    from batchwright.synthetic import Workload

THIS_MACHINE = "this"
DEFAULT_ROWS = 2000
FORMAT_VERSION = 1


def sim(
    input_path: options.InputPath = None,
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face directory, or a GGUF file; reads IN."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="Sizes of a well-known model: Llama-3-8B.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A100-80G, H100, H200, L40S, or this: the machine at hand, measured.",
        ),
    ] = "H100",
    devices: Annotated[int, typer.Option(min=1, help="Devices that share the model.")] = 1,
    cores: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of --device this, if it had N; docs/scaling.md."),
    ] = None,
    memory_bandwidth: Annotated[
        int | None,
        typer.Option(parser=parse_count, metavar="N", help="With --cores: bytes a second (200G)."),
    ] = None,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Share of compute and reading keys that overlaps.")
    ] = 0.0,
    workload: Annotated[
        str | None, typer.Option(metavar="NAME", help="chat, documents, reasoning or mixed.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(parser=parse_count, metavar="N", help="Rows of a synthetic workload."),
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(metavar="LENGTHS", help="512, 100-900 or 400~0.7; without the prefix."),
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(metavar="LENGTHS", help="The same, of true outputs.")
    ] = None,
    shared_prefix: Annotated[
        str | None,
        typer.Option(
            metavar="TREE", help="8x1000,16x200: 8 of 1,000 tokens, 16 of 200 below each."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            parser=parse_count,
            metavar="N",
            help="Output that rows allow; by default, what they use.",
        ),
    ] = None,
    order: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Repeat for several; by default all.")
    ] = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    kv_tokens: options.KVTokens = None,
    swap_space: options.SwapSpace = None,
    no_prefix_sharing: options.NoPrefixSharing = False,
    seed: Annotated[int, typer.Option(min=0, help="Of a synthetic workload.")] = 0,
    column: options.Column = None,
    template: options.Template = None,
    endpoint: options.Endpoint = None,
    limit: options.Limit = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="PAGE.html", help="Write a page too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a job takes in each order, on any machine, by simulation.

    The job is a file, tokenised with --model, or a synthetic workload. docs/sim.md explains the
    numbers.

    Exit status: 0, or 2: it cannot be simulated.
    """
    from batchwright.job.sim_job import EngineLimits, facts_of, simulate_orders

    synthetic = _synthetic(
        workload, prompt_tokens, output_tokens, shared_prefix, rows, max_tokens, seed
    )
    if (input_path is None) == (synthetic is None):
        raise typer.BadParameter("give a file, or a synthetic workload (--workload or lengths)")
    limits = EngineLimits(
        kv_tokens=kv_tokens,
        swap_space_bytes=swap_space or 0,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_sharing=not no_prefix_sharing,
    )
    opened = _open(model, limits) if model else None
    job, name = synthetic if synthetic else (None, str(input_path))
    if job is None:
        job = _read(str(input_path), opened, column, template, endpoint, limit)
    model_shape, shape_name = _shape(shape, model, opened, device)
    if memory_bandwidth is not None and cores is None:
        raise typer.BadParameter("--memory-bandwidth goes with --cores")
    pretended = (cores, memory_bandwidth) if cores else None
    machine = _machine(device, model_shape, opened, job, limits, devices, overlap, pretended)
    runs = simulate_orders(job, machine, order or [])
    facts = facts_of(job, machine, job=name, shape_name=shape_name)
    if as_json:
        values = {"format": FORMAT_VERSION, **facts, "orders": [run.numbers() for run in runs]}
        sys.stdout.write(json.dumps(values, indent=2) + "\n")
    else:
        from batchwright.cli.sim_text import runs_as_text

        print(runs_as_text(facts, runs))
    if output is not None:
        from batchwright.cli.report import write_page
        from batchwright.cli.sim_text import facts_in_words
        from batchwright.report.order_page import render_orders

        write_page(output, render_orders(name, facts_in_words(facts), runs))
        print(f"Page: {output}", file=sys.stderr)


def _synthetic(
    name: str | None,
    prompt: str | None,
    output: str | None,
    tree: str | None,
    num_rows: int | None,
    max_tokens: int | None,
    seed: int,
) -> tuple[Workload, str] | None:
    """The synthetic workload that was asked for, and what to call it."""
    from batchwright.synthetic import Part, make_workload, named_workload, parse_lengths, parse_tree

    asked = [text for text in (prompt, output, tree) if text is not None]
    if name is None and not asked and num_rows is None and max_tokens is None:
        return None
    if name is not None and asked:
        raise typer.BadParameter("give --workload, or lengths and prefixes of your own, not both")
    if name is not None:
        named = named_workload(name)
        parts, title, usual_rows = named.parts, name, named.num_rows
    elif prompt is None or output is None:
        raise typer.BadParameter("a synthetic workload needs --prompt-tokens and --output-tokens")
    else:
        prefixes = parse_tree(tree) if tree else ()
        parts = (Part(parse_lengths(prompt), parse_lengths(output), prefixes),)
        usual_rows = DEFAULT_ROWS
        title = f"prompts {prompt}, outputs {output}" + (f", prefixes {tree}" if tree else "")
    return make_workload(parts, num_rows or usual_rows, seed=seed, max_tokens=max_tokens), title


def _open(model: str, limits: Any) -> OpenedModel:
    from batchwright.cli.plan import open_model
    from batchwright.weights.locate import locate_model

    locate_model(model)  # before torch is imported
    settings = options.given(
        kv_tokens=limits.kv_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        prefix_sharing=limits.prefix_sharing,
    )
    return open_model(model, settings)


def _read(
    source: str,
    opened: OpenedModel | None,
    column: list[str] | None,
    template: str | None,
    endpoint: str | None,
    limit: int | None,
) -> Workload:
    from batchwright.job.preflight import STDIO, JobArguments, open_rows
    from batchwright.job.sim_job import read_workload

    if opened is None:
        raise typer.BadParameter("a file needs --model, whose tokenizer reads it")
    arguments = JobArguments(
        source=source,
        output=STDIO,
        column=column,
        template=template,
        endpoint=endpoint,
        limit=limit,
    )
    arguments.check()
    rows, _ = open_rows(arguments)
    return read_workload(rows, opened)


def _shape(
    name: str | None, model: str | None, opened: OpenedModel | None, device: str
) -> tuple[ModelShape, str]:
    """The sizes to simulate, and what to call them."""
    from batchwright.plan.model_shapes import find_model_shape

    if name is not None:
        if device == THIS_MACHINE:
            raise typer.BadParameter("this machine is measured with --model, not with --shape")
        return find_model_shape(name), name
    if opened is None or model is None:
        raise typer.BadParameter("give the model: --shape Llama-3-8B, or --model")
    return opened.shape, model


def _machine(
    device: str,
    shape: ModelShape,
    opened: OpenedModel | None,
    job: Workload,
    limits: Any,
    num_devices: int,
    overlap: float,
    cores: tuple[int, int | None] | None,
) -> Machine:
    from batchwright.job.sim_job import cost_with_cores, device_machine, this_machine

    if device != THIS_MACHINE:
        if cores is not None:
            raise typer.BadParameter("--cores is for --device this")
        return device_machine(device, shape, job, limits, num_devices=num_devices, overlap=overlap)
    if num_devices > 1 or overlap or limits.swap_space_bytes:
        raise typer.BadParameter(
            "--devices, --overlap and --swap-space are for devices by data sheet"
        )
    assert opened is not None
    longest = int((job.columns.num_prompt + job.columns.most_output).max(initial=1))
    cost = None if cores is None else cost_with_cores(opened, *cores)
    return this_machine(opened, longest, cost)

"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from batchwright.cli.numbers import parse_count

# How rows become prompts

Column = Annotated[
    list[str] | None,
    typer.Option(metavar="PARAMETER=NAME", help="Which column is which parameter."),
]
Template = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Prompt with columns in it: 'Sum up: {text}'")
]
Endpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="Where rows go: /v1/chat/completions, ...")
]

# Settings of the engine


class Dtype(StrEnum):
    """Number format of weights and activations."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


MaxModelLen = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="N", help="Most tokens of a row, prompt and output."),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="N", help="Most sequences running at once."),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="N", help="Most tokens computed in one step."),
]
KVCacheMemory = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="BYTES", help="Memory for keys and values: 4G."),
]
KVTokens = Annotated[
    int | None,
    typer.Option(parser=parse_count, metavar="N", help="Most tokens of keys and values kept."),
]
Order = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="In which order rows start (fcfs); docs/orders.md."),
]
NumberFormat = Annotated[Dtype, typer.Option(help="Number format to compute in.")]
Seed = Annotated[
    int, typer.Option(min=0, help="Randomness of rows that give no seed of their own.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one per core.")]
NoPrefixSharing = Annotated[
    bool, typer.Option("--no-prefix-sharing", help="Compute shared prefixes for each row.")
]

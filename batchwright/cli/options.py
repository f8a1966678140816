"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

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

"""The `batchwright` command. Each subcommand is one file beside this one."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from typing import Annotated

import typer

from batchwright.cli.advise import advise
from batchwright.cli.bench import bench
from batchwright.cli.plan import plan
from batchwright.cli.report import report
from batchwright.cli.run import run
from batchwright.cli.serve import serve
from batchwright.cli.sim import sim
from batchwright.cli.status import status
from batchwright.cli.validate import validate
from batchwright.errors import BatchwrightError

USAGE_ERROR = 2

app = typer.Typer(
    help="Run a file of LLM requests through a model, as fast as the hardware allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long option names off
)
app.command()(run)
app.command()(plan)
app.command()(advise)
app.command()(sim)
app.command()(bench)
app.command()(serve)
app.command()(validate)
app.command()(status)
app.command()(report)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"batchwright {version('batchwright')}")
        except PackageNotFoundError:
            print("batchwright, run from source without being installed")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    # A callback keeps `run` a subcommand even while it is the only one.
    pass


def main() -> None:
    """Entry point: an error meant for the user is one line on standard error, and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files may be any bytes
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except BatchwrightError as error:
        print(f"batchwright: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


if __name__ == "__main__":
    main()

"""`batchwright validate`: check a whole input without a model, in one pass."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchwright.cli import options
from batchwright.cli.printable import printable

if TYPE_CHECKING:
    from batchwright.errors import RequestError
    from batchwright.job.rows import InputRow, RowError

SOME_ROWS_BAD = 1


def validate(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="File of requests; - is stdin.", show_default=False)
    ],
    column: options.Column = None,
    template: options.Template = None,
    endpoint: options.Endpoint = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per bad row, then one of counts.")
    ] = False,
) -> None:
    """Check every row of a file without a model, and report each one that would fail.

    What depends on the model (the length of a prompt in tokens, token ids, what its chat template
    accepts) is checked when the job runs, and so are templates that rows bring.

    Exit status: 0 all rows are sound, 1 some are not, 2 the file cannot be read.
    """
    from batchwright.job.formats.read_input import read_input

    rows = read_input(source, column=column, template=template, endpoint=endpoint)
    report = Findings()
    try:
        for found in report.check(rows):
            print(found.as_json() if as_json else found.as_text())
        print(report.as_json() if as_json else report.as_text())
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(SOME_ROWS_BAD if report.num_bad else 0)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that would fail."""

    line: int
    custom_id: str | None
    error: RequestError

    def as_text(self) -> str:
        """One line for people; nothing in it can steer a terminal."""
        name = "" if self.custom_id is None else f" ({printable(self.custom_id)})"
        return f"line {self.line}{name}: {self.error.code}: {printable(self.error.message)}"

    def as_json(self) -> str:
        """One line for programs."""
        error = self.error
        return _json(
            line=self.line,
            custom_id=self.custom_id,
            code=error.code,
            message=error.message,
            param=error.param,
        )


@dataclass(slots=True)
class Findings:
    """Counts of a whole file."""

    num_rows: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    endpoints: Counter[str] = field(default_factory=Counter)
    model: str | None = None

    @property
    def num_bad(self) -> int:
        """Rows that would fail."""
        return self.codes.total()

    def check(self, rows: Iterator[InputRow | RowError]) -> Iterator[BadRow]:
        """Check rows, count them, and yield those that would fail."""
        from batchwright.errors import RequestError
        from batchwright.job.model_names import ModelNames
        from batchwright.job.rows import RowError
        from batchwright.job.validate import parse_row
        from batchwright.structured.check import GrammarCheck

        names, grammars = ModelNames(None), GrammarCheck()
        with closing(grammars):
            for row in names.watch(rows):
                self.num_rows += 1
                try:
                    if isinstance(row, RowError):
                        raise row.error
                    self.endpoints[row.endpoint] += 1
                    parsed = parse_row(row)
                    names.check(parsed)
                    if parsed.params.grammar is not None:
                        grammars.check(parsed.params.grammar)
                except RequestError as error:
                    self.codes[error.code] += 1
                    yield BadRow(row.line, row.custom_id, error)
        self.model = names.foreign

    def as_text(self) -> str:
        """The last lines for people."""
        lines = [f"{self.num_rows:,} rows, {self.num_bad:,} bad"]
        lines += [f"  {code}: {count:,}" for code, count in self.codes.most_common()]
        if self.model is not None:
            lines.append(
                f"Warning: rows name the model {printable(self.model):.100}; "
                "the model of --model answers them."
            )
        return "\n".join(lines)

    def as_json(self) -> str:
        """The last line for programs."""
        return _json(
            rows=self.num_rows,
            bad=self.num_bad,
            codes=dict(self.codes),
            endpoints=dict(self.endpoints),
            model=self.model,
        )


def _json(**values: Any) -> str:
    import json

    return json.dumps(values)  # in ASCII, whatever the terminal's encoding

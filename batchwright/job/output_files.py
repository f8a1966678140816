"""The output and the error file of a job: projections of its journal.

A plain JSONL file grows while the job runs, by rows that are committed. Every other form
(compressed, CSV, Parquet, in input order) is written when the job ends or is stopped. Both can be
made again from the journal at any time, so a file that was cut off by a crash is replaced when the
job goes on, and a row that failed before and succeeds now leaves the error file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from batchwright.errors import OutputError
from batchwright.job.durable import write_all
from batchwright.job.formats.output import output_kind, remove_projection, write_projection
from batchwright.job.journal import Entry, Journal, RowState

STDOUT = "-"
_FAILURES = (RowState.FAILED, RowState.EXPIRED)


class OutputFiles:
    """Both files.

    Args:
        output, errors: paths; `-` is standard output. The two may be the same.
        journal: the job's.
        in_input_order: write rows in the order of the input, at the end.
    """

    def __init__(
        self, output: str, errors: str, journal: Journal, *, in_input_order: bool = False
    ) -> None:
        self._journal = journal
        self._in_input_order = in_input_order
        if output == errors:
            self._files = [_File(output, tuple(RowState))]
        else:
            self._files = [
                _File(output, (RowState.SUCCEEDED,)),
                _File(errors, _FAILURES, only_if_needed=True),
            ]

    def begin(self, *, resumed: bool) -> None:
        """Bring the files to the state of the journal, or create them.

        Raises:
            OutputError: a file cannot be written.
        """
        for file in self._files:
            if self._grows(file):
                if file.path == STDOUT or resumed or not file.only_if_needed:
                    self._project(file)
                else:
                    file.remove()

    def write(self, committed: Sequence[tuple[Entry, bytes]]) -> None:
        """Add rows to the files that grow.

        Raises:
            OutputError: a file cannot be written; the journal has the rows all the same.
        """
        for file in self._files:
            if self._grows(file):
                file.append(
                    b"".join(data for entry, data in committed if entry.state in file.states)
                )

    def finish(self, *, resumed: bool) -> None:
        """Write the forms that are written at the end; a resumed job drops answers replaced."""
        for file in self._files:
            grows = self._grows(file)
            file.close()
            if not grows or (resumed and file.path != STDOUT):
                self._project(file)

    def close(self) -> None:
        """Close what is open."""
        for file in self._files:
            file.close()

    def _grows(self, file: _File) -> bool:
        return not self._in_input_order and output_kind(file.path) == "jsonl"

    def _project(self, file: _File) -> None:
        counts = self._journal.counts()
        if file.only_if_needed and not any(counts[state] for state in file.states):
            file.remove()
            return
        write_projection(file.path, _Lines(self._journal, file.states, self._in_input_order))


class _Lines:
    """Lines of the journal, which can be iterated more than once."""

    def __init__(
        self, journal: Journal, states: tuple[RowState, ...], in_input_order: bool
    ) -> None:
        self._journal, self._states, self._in_input_order = journal, states, in_input_order

    def __iter__(self) -> Iterator[bytes]:
        lines = self._journal.lines(self._states, in_input_order=self._in_input_order)
        return (data for _, data in lines)


class _File:
    """One file, the states of the rows in it, and how it is open."""

    def __init__(
        self, path: str, states: tuple[RowState, ...], *, only_if_needed: bool = False
    ) -> None:
        self.path = path
        self.states = states
        self.only_if_needed = only_if_needed  # without rows there is no file
        self._fd: int | None = None

    def append(self, data: bytes) -> None:
        if not data:
            return
        try:
            if self._fd is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._fd = os.dup(1) if self.path == STDOUT else os.open(self.path, flags, 0o600)
            write_all(self._fd, data)
        except OSError as error:
            name, safe = self.path, "finished rows are safe in the job directory, and the same "
            safe += "command goes on from there"
            if self.path == STDOUT:
                name, safe = "standard output", "a job that writes there cannot be gone on with"
            raise OutputError(f"cannot write {name}: {error.strerror or error}; {safe}") from error

    def remove(self) -> None:
        if self.path != STDOUT:
            remove_projection(self.path)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

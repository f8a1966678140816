"""Numbers as people write them: 1k is 1,000, 1K is 1,024, 1.5G is 1,610,612,736."""

from __future__ import annotations

import re

import typer

_FORM = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)")
_FACTORS = {
    "": 1,
    **{letter: 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{letter: 1024**power for power, letter in enumerate("KMGT", start=1)},
}


def parse_count(text: str) -> int:
    """A whole number of at least 1, with an optional suffix: k m g t (powers of 1,000) or K M G T.

    Raises:
        typer.BadParameter: anything else.
    """
    match = _FORM.fullmatch(text.strip())
    value = float(match[1]) * _FACTORS[match[2]] if match else 0.0
    if value < 1 or value != int(value):
        raise typer.BadParameter(
            f"{text!r} is not a whole number of at least 1; write it like 4096, 4k (4,000), "
            "4K (4,096) or 1.5G"
        )
    return int(value)

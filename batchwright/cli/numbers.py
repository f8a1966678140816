"""Numbers as people write them: 1k is 1,000, 1K is 1,024, 1.5G is 1,610,612,736; 90s, 5m, 2h."""

from __future__ import annotations

import re
import sys
from fractions import Fraction

import typer

_FORM = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)([kKmMgGtT]?)")
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
    value = Fraction(match[1]) * _FACTORS[match[2]] if match else Fraction(0)
    if not 1 <= value <= sys.maxsize or value.denominator != 1:
        raise typer.BadParameter(
            f"{text!r:.80} is not a whole number of at least 1; write it like 4096, 4k (4,000), "
            "4K (4,096) or 1.5G"
        )
    return int(value)


_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds, more than 0, of a number with an optional unit: s, m, h or d.

    Raises:
        typer.BadParameter: anything else.
    """
    match = _DURATION.fullmatch(text.strip())
    value = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if value <= 0:
        raise typer.BadParameter(f"{text!r} is not a duration; write it like 90, 90s, 5m, 2h or 1d")
    return value


def parse_shard(text: str) -> tuple[int, int]:
    """(index counted from 0, number of shards) of a text like 2/8, which counts from 1.

    Raises:
        typer.BadParameter: anything else.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    index, num_shards = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= num_shards:
        raise typer.BadParameter(
            f"{text!r:.80} is not a shard; write it like 1/8, up to 8/8", param_hint="'--shard'"
        )
    return index - 1, num_shards

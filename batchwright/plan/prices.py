"""A price list: what tokens or hours cost, so that an estimate becomes money.

currency = "USD"

[own-machine]
hour = 0.35            # of the machine that runs the job

[some-service]
input = 0.15           # a million prompt tokens
cached = 0.075         # a million prompt tokens that other rows have had; as input if left out
output = 0.60          # a million output tokens
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from batchwright.errors import ConfigError

RATES = ("input", "cached", "output", "hour")
MILLION = 1_000_000


class Billed(NamedTuple):
    """What one end of an estimate is billed for.

    Attributes:
        input_tokens: prompt tokens, those that are cached left out.
        cached_tokens: prompt tokens that other rows have had.
        output_tokens: of all rows.
        hours: of the machine.
    """

    input_tokens: int
    cached_tokens: int
    output_tokens: int
    hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """One entry of a price list. Rates are for a million tokens, or an hour."""

    name: str
    input: float = 0.0
    cached: float = 0.0
    output: float = 0.0
    hour: float = 0.0

    def cost(self, billed: Billed) -> float:
        """Money, in the list's currency."""
        tokens = (
            billed.input_tokens * self.input
            + billed.cached_tokens * self.cached
            + billed.output_tokens * self.output
        )
        return tokens / MILLION + billed.hours * self.hour


@dataclass(frozen=True, slots=True)
class PriceList:
    """Entries in the order of the file."""

    currency: str
    prices: tuple[Price, ...]


def read_prices(path: str) -> PriceList:
    """Read a price list.

    Raises:
        ConfigError: it is missing, not TOML, empty, or has an entry that is no price.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path} is not TOML: {error}") from error
    currency = values.pop("currency", "")
    if not isinstance(currency, str) or not currency.isprintable() or len(currency) > 16:
        raise ConfigError(f'{path}: currency must be a short text such as "USD"')
    if not values:
        raise ConfigError(f"{path} has no prices; write entries like [name] with hour = 0.35")
    return PriceList(currency, tuple(_price(path, name, rates) for name, rates in values.items()))


def _price(path: str, name: str, rates: Any) -> Price:
    known = ", ".join(RATES)
    if not isinstance(rates, Mapping):
        raise ConfigError(f"{path}: {name} is not an entry; write [{name}] and below it {known}")
    if unknown := sorted(set(rates) - set(RATES)):
        raise ConfigError(f"{path}: [{name}] has {', '.join(unknown)}; known: {known}")
    if not rates:
        raise ConfigError(f"{path}: [{name}] has no rate; give one or more of {known}")
    for rate, value in rates.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise ConfigError(f"{path}: [{name}] {rate} is {value!r}, must be a number from 0 on")
    return Price(name=name, **{"cached": rates.get("input", 0.0), **rates})

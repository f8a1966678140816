"""Price lists: good ones become money, bad ones say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchwright.errors import ConfigError
from batchwright.plan.prices import Billed, Price, read_prices

GOOD = """
currency = "USD"

[own-machine]
hour = 0.35

[service]
input = 0.15
cached = 0.05
output = 0.60

[no-discount]
input = 1
"""
BILLED = Billed(input_tokens=2_000_000, cached_tokens=1_000_000, output_tokens=500_000, hours=2.0)


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "prices.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_a_list_in_the_order_of_its_file(tmp_path: Path) -> None:
    prices = read_prices(write(tmp_path, GOOD))
    assert prices.currency == "USD"
    assert prices.prices == (
        Price(name="own-machine", hour=0.35),
        Price(name="service", input=0.15, cached=0.05, output=0.6),
        Price(name="no-discount", input=1, cached=1),
    )


def test_costs_by_hand(tmp_path: Path) -> None:
    own, service, flat = read_prices(write(tmp_path, GOOD)).prices
    assert own.cost(BILLED) == pytest.approx(0.70)
    assert service.cost(BILLED) == pytest.approx(2 * 0.15 + 0.05 + 0.5 * 0.6)
    assert flat.cost(BILLED) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prices"),
        ('currency = "USD"', "has no prices"),
        ("[a", "is not TOML"),
        (b"\xff", "is not TOML"),
        ("[a]\n", r"\[a\] has no rate"),
        ("hour = 0.3", "hour is not an entry"),
        ("[a]\nhours = 1", r"\[a\] has hours; known: input"),
        ("[a]\nhour = -1", "hour is -1"),
        ("[a]\nhour = inf", "hour is inf"),
        ("[a]\nhour = nan", "hour is nan"),
        ("[a]\nhour = true", "hour is True"),
        ('[a]\nhour = "1"', "hour is '1'"),
        ("currency = 5\n[a]\nhour = 1", "currency must be a short text"),
        ('currency = "\\u001b[2J"\n[a]\nhour = 1', "currency must be a short text"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prices(write(tmp_path, text))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_prices(str(tmp_path / "prices.toml"))

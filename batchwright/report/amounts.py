"""Amounts as people read them."""

from __future__ import annotations

import time


def count(value: float) -> str:
    """12,345; below ten one decimal, if it is not whole."""
    return f"{value:,.1f}" if 0 < value < 10 and value != round(value) else f"{value:,.0f}"


def percent(fraction: float | None) -> str:
    """62%, 3.1%; "-" for what is not known."""
    if fraction is None:
        return "-"
    return f"{fraction:.1%}" if 0 < fraction < 0.1 else f"{fraction:.0%}"


def seconds(value: float) -> str:
    """0.25 s, 12.3 s."""
    return f"{value:,.2f} s" if value < 10 else f"{value:,.1f} s"


def duration(value: float) -> str:
    """8 s, 2:05 min, 3:04 h."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def moment(value: float) -> str:
    """Seconds since 1970 as local time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    except (OverflowError, ValueError, OSError):  # a damaged log can say anything
        return "a time unknown"


def memory(num_bytes: float) -> str:
    """1.76 GB, 250 MB."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def flops(value: float) -> str:
    """A number with the prefix of the unit that follows: "3.2 T"."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:,.1f} {prefix}"
    return f"{value / 1e6:,.1f} M"

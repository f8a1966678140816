"""Checks of single values from untrusted input. Each names the value, the limit and the remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from batchwright.errors import RequestError


def fail(param: str, problem: str, *, code: str = "invalid_request") -> NoReturn:
    """Raise the RequestError of one parameter: `param` followed by what is wrong with it."""
    raise RequestError(f"{param} {problem}", code=code, param=param)


def shown(value: object) -> str:
    """A value as messages show it: at most 60 characters, however long or odd it is."""
    if isinstance(value, str | bytes):
        value = value[:80]
    elif isinstance(value, dict):
        return f"an object with {len(value)} {'entry' if len(value) == 1 else 'entries'}"
    elif isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    elif isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(value: object) -> str:
    """A value that may be a prompt, as messages show it: they go to logs, where no text of a prompt
    may be."""
    return f"text of {len(value)} characters" if isinstance(value, str) else shown(value)


def number(param: str, value: Any, low: float, high: float) -> float:
    """A finite real number in [low, high]."""
    if type(value) is float:  # the usual case; asking for the abstract kind takes long
        result = value
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        fail(param, f"must be a number, not {shown(value)}")
    else:
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
    if not low <= result <= high:  # also false for nan
        fail(param, f"is {shown(value)}; it must be between {low:g} and {high:g}")
    return result


def integer(param: str, value: Any, low: int, high: int) -> int:
    """A whole number in [low, high]; 3.0 counts as 3."""
    if type(value) is not int:
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            fail(param, f"must be a whole number, not {shown(value)}")
    result = int(value)
    if not low <= result <= high:
        fail(param, f"is {shown(result)}; it must be between {low} and {high}")
    return result


def boolean(param: str, value: Any) -> bool:
    """True or false, nothing that merely looks like it."""
    if not isinstance(value, bool):
        fail(param, f"must be true or false, not {shown(value)}")
    return value


def text(param: str, value: Any, *, min_chars: int = 0, max_chars: int | None = None) -> str:
    """A string of min_chars to max_chars characters, without lone surrogates."""
    if not isinstance(value, str):
        fail(param, f"must be a string, not {shown(value)}")
    if len(value) < min_chars:
        fail(param, f"has {len(value)} characters; it needs at least {min_chars}")
    if max_chars is not None and len(value) > max_chars:
        fail(param, f"has {len(value)} characters; at most {max_chars} are allowed")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        fail(param, "has half a surrogate pair, which is not valid text; remove it")
    return value


def items(param: str, value: Any, max_items: int) -> Sequence[Any]:
    """A list (or tuple) of at most max_items."""
    if not isinstance(value, list | tuple):
        fail(param, f"must be a list, not {kind_of(value)}")
    if len(value) > max_items:
        fail(param, f"has {len(value)} entries; at most {max_items} are allowed")
    return value


def token_ids(param: str, value: Any, max_items: int) -> list[int]:
    """A list of whole numbers in [0, 2**31); the vocabulary's own limit is checked later."""
    ids = items(param, value, max_items)
    for index, token_id in enumerate(ids):
        plain = isinstance(token_id, numbers.Integral) and not isinstance(token_id, bool)
        if not plain or not 0 <= token_id < 2**31:
            fail(
                param, f"has {kind_of(token_id)} at index {index}; token ids are whole numbers >= 0"
            )
    return [int(token_id) for token_id in ids]


def unknown(param: str, known: Iterable[str]) -> NoReturn:
    """Raise for a parameter nobody knows, with the closest known name."""
    param = param if len(param) <= 80 else param[:77] + "..."
    close = difflib.get_close_matches(param, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "remove it"
    raise RequestError(
        f"unknown parameter {param!r}; {hint}", code="unknown_parameter", param=param
    )

"""What llguidance takes too lightly in a JSON Schema: made stricter, or refused.

format date, date-time   29 February in any year    a pattern knows the leap years
minProperties            counts a key twice         refused where a key may come twice
bounds such as minimum   are rounded to float64     refused where that changes them
"""

from __future__ import annotations

from typing import Any

_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))  # name -> schema
_DATA = frozenset(("const", "enum", "default", "examples"))  # no schemas, whatever they look like
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")

_LEAP_YEAR = (
    "([0-9]{2}(0[48]|[2468][048]|[13579][26])|"  # divisible by 4 and not by 100
    "([02468][048]|[13579][26])00)"  # divisible by 400
)
_REAL_DAY = "^([0-9]{4}-((0[13-9]|1[0-2])-[0-9]{2}|02-([01][0-9]|2[0-8]))|" + _LEAP_YEAR + "-02-29)"


def strict_schema(schema: Any) -> Any:
    """A schema that lets through no more than the given one, also when llguidance reads it.

    Args:
        schema: JSON, at most some hundred levels deep; it is not changed.
    Raises:
        ValueError: it has a bound that would not be kept.
    """
    if isinstance(schema, list):
        return [strict_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict_value(key, value) for key, value in schema.items()}
    _check_bounds(strict)
    _check_min_properties(strict)
    if strict.get("format") in ("date", "date-time"):
        also = strict.get("allOf", [])
        strict["allOf"] = [*(also if isinstance(also, list) else [also]), {"pattern": _REAL_DAY}]
    return strict


def _strict_value(key: str, value: Any) -> Any:
    if key in _DATA:
        return value
    if key in _MAPS and isinstance(value, dict):
        return {name: strict_schema(inner) for name, inner in value.items()}
    return strict_schema(value)


def _check_bounds(schema: dict[str, Any]) -> None:
    for key in _BOUNDS:
        value = schema.get(key)
        if isinstance(value, int) and not _is_float64(value):
            raise ValueError(f"{key} has more digits than a float64 keeps; give a rounder number")


def _is_float64(value: int) -> bool:
    try:
        return int(float(value)) == value
    except OverflowError:
        return False


def _check_min_properties(schema: dict[str, Any]) -> None:
    """A key that the schema does not list may be written twice, and would count twice."""
    least, required = schema.get("minProperties"), schema.get("required", [])
    is_open = schema.get("additionalProperties") is not False or "patternProperties" in schema
    if not isinstance(least, int) or not isinstance(required, list) or not is_open:
        return
    if least - len(required) > 1:
        raise ValueError(
            f"minProperties {least} needs keys that are not listed, which may repeat; list them "
            "in properties and required"
        )

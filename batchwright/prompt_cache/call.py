"""PromptCall: what a row's body says in `prompt_cache`, checked without the schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchwright.validation import checks

MAX_MODULES = 1024
_CALL_KEYS = ("schema", "modules", "parameters")


@dataclass(frozen=True, slots=True)
class PromptCall:
    """What a row says about its prompt, besides the text that comes last.

    Attributes:
        schema: which one; None if there is only one.
        modules: paths of the modules it imports.
        arguments: texts of their parameters.
    """

    schema: str | None
    modules: tuple[str, ...]
    arguments: tuple[tuple[str, str], ...]


def parse_call(value: Any) -> PromptCall:
    """The value of `prompt_cache` in a row's body.

    Raises:
        RequestError: it has another form; what the schema knows is checked by `compose`.
    """
    if not isinstance(value, dict):
        checks.fail("prompt_cache", f"must be an object, not {checks.shown(value)}")
    for key in value:
        if key not in _CALL_KEYS:
            checks.unknown(key, _CALL_KEYS)
    schema = value.get("schema")
    if schema is not None:
        schema = checks.text("prompt_cache.schema", schema, max_chars=100)
    modules, arguments = value.get("modules", []), value.get("parameters", {})
    checks.items("prompt_cache.modules", modules, MAX_MODULES)
    if not isinstance(arguments, dict):
        checks.fail("prompt_cache.parameters", f"must be an object, not {checks.shown(arguments)}")
    return PromptCall(
        schema,
        tuple(checks.text(f"prompt_cache.modules[{i}]", m) for i, m in enumerate(modules)),
        tuple(
            (name, checks.text(f"prompt_cache.parameters.{name:.80}", text))
            for name, text in arguments.items()
        ),
    )

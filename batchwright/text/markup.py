"""How a chat template marks reasoning and tool calls: read from the template's own text.

A model writes tool calls the way its template shows it them, so a mark that the template spells is
one to look for in answers, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from batchwright.request import Markup

THINK_START, THINK_END = "<think>", "</think>"

TOOL_MARKS: Mapping[str, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),  # Hermes, Qwen, SmolLM3
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "llama": ("<|python_tag|>",),  # Llama 3.1 to 3.3
}
"""The marks of each form of tool calls; a template with the first of them uses the form."""

_LLAMA_EXAMPLE = '{"name": function name, "parameters"'  # templates of 3.2 do without the tag


def markup_of(source: str, special: Mapping[str, int], *, with_tools: bool) -> Markup:
    """What a template says about answers.

    Args:
        source: the template's text.
        special: special tokens' spellings and ids, which may hold marks.
        with_tools: the row gives tools.
    """
    reasons = THINK_END in source
    form = _tool_form(source) if with_tools else None
    marks: Collection[str] = (THINK_START, THINK_END) if reasons else ()
    marks = (*marks, *TOOL_MARKS[form]) if form else marks
    visible = frozenset(special[mark] for mark in marks if mark in special)
    return Markup(reasons, form, visible)


def _tool_form(source: str) -> str | None:
    for form, marks in TOOL_MARKS.items():
        if marks[0] in source:
            return form
    return "llama" if _LLAMA_EXAMPLE in source else None

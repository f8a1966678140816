"""What a user says about columns: `--column prompt=text`, `--template "Classify: {text}"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchwright.errors import ConfigError, RequestError
from batchwright.job.formats.prompt_template import Template, parse_template
from batchwright.job.names import check_names
from batchwright.job.rows import COMPLETIONS, ENDPOINTS, InputRow, endpoint_of_bare_row

PROMPTS = ("messages", "prompt", "prompt_token_ids", "input")


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """What a user says about columns; made by `parse_columns`.

    Attributes:
        columns: parameter -> column; "custom_id" -> "" asks for automatic names.
        template: builds the prompt.
        endpoint: where rows go; None if it follows from the parameters.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    template: Template | None = None
    endpoint: str | None = None

    @property
    def is_given(self) -> bool:
        """Whether there is a mapping at all."""
        return bool(self.columns) or self.template is not None


def parse_columns(
    column: Sequence[str] | None = None, template: str | None = None, endpoint: str | None = None
) -> ColumnMap:
    """Read `--column PARAMETER=NAME` (any number), `--template TEXT` and `--endpoint URL`.

    Raises:
        ConfigError: something in another form, an unknown parameter, or two prompts.
    """
    columns: dict[str, str] = {}
    for item in column or ():
        param, sign, name = item.partition("=")
        param = "custom_id" if param == "id" else param
        if not sign or not param or not (name or param == "custom_id"):
            raise ConfigError(f"--column {item!r:.80} is not PARAMETER=NAME, such as prompt=text")
        if param in columns:
            raise ConfigError(f"--column names a column for {param} twice; give one")
        columns[param] = name
    if endpoint is not None and endpoint not in ENDPOINTS:
        raise ConfigError(f"endpoint is {endpoint!r:.80}; supported: {', '.join(ENDPOINTS)}")
    prompts = [name for name in PROMPTS if name in columns] + ["--template"] * (
        template is not None
    )
    if len(prompts) > 1:
        raise ConfigError(f"{prompts[0]} and {prompts[1]} both give the prompt; give one")
    parsed = None if template is None else parse_template(template)
    _check_params(columns, endpoint or (COMPLETIONS if template else None))
    return ColumnMap(columns, parsed, endpoint)


def _check_params(columns: Mapping[str, str], endpoint: str | None) -> None:
    """Fail now, rather than in each row, if no row could have these parameters."""
    body: dict[str, Any] = {param: None for param in columns if param != "custom_id"}
    prompts = body.keys() & {*PROMPTS, "context"}
    if endpoint is None and prompts:
        endpoint = endpoint_of_bare_row(body)
    problem = None
    for url in ENDPOINTS if endpoint is None else (endpoint,):
        given = body.keys() - {"prompt"}  # it becomes what the endpoint calls it
        try:
            check_names(InputRow(0, "", url, dict.fromkeys(given)))
            return
        except RequestError as error:
            problem = problem or error
    assert problem is not None
    raise ConfigError(f"--column: {problem.message}")

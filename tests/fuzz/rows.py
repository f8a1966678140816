"""Rows as bytes: through the reader, the checks of their bodies, and the making of requests."""

from __future__ import annotations

import io
from itertools import islice

from batchwright.errors import InputError, RequestError
from batchwright.job.formats.column_map import ColumnMap, parse_columns
from batchwright.job.formats.csv_rows import read_csv
from batchwright.job.formats.openai_batch import read_json_lines
from batchwright.job.formats.row_names import with_names
from batchwright.job.formats.source import Source
from batchwright.job.prepare import prepare_rows
from batchwright.job.rows import InputRow
from batchwright.job.validate import ParsedRow, parse_row
from tests.job.fakes import ByteTokenizer

COLUMNS = (
    ColumnMap(),
    parse_columns(["prompt=a", "max_tokens=b"]),
    parse_columns(["messages=a", "id=b"]),
    parse_columns(template="{a} and {b}"),
)
MAX_ROWS = 16


def run(data: bytes) -> None:
    """The first byte chooses lines or a table, and the columns; the rest is the file."""
    choice = data[0] if data else 0
    source, given = Source(io.BytesIO(data[1:]), "in"), COLUMNS[choice // 2 % len(COLUMNS)]
    rows = read_csv(source, given) if choice % 2 else read_json_lines(source, given)
    parsed: list[ParsedRow] = []
    try:
        for row in islice(with_names(rows), MAX_ROWS):
            if isinstance(row, InputRow):
                parsed += parse(row)
            else:
                assert row.error.line == row.line
    except InputError:
        pass
    for request in prepare_rows(parsed, ByteTokenizer()):
        assert isinstance(request, RequestError) or request.id


def parse(row: InputRow) -> list[ParsedRow]:
    """The row, or nothing if it is refused."""
    try:
        return [parse_row(row)]
    except RequestError:
        return []


def seeds() -> list[bytes]:
    """A row of each kind, and a table for each set of columns."""
    return [b"\x00" + line for line in LINES.strip().encode().splitlines()] + [
        b"\x00" + LINES.strip().encode(),
        b'\x01prompt,max_tokens,stop\n"a, b",3,"[""x""]"\n\xc3\xa9,,\n',
        b"\x03a,b\nhello,4\n",
        b'\x05a,b\n"[{""role"": ""user"", ""content"": ""x""}]",id\n',
        b"\x07a,b\n1,2\n",
        b'\x06{"a": 1, "b": "x"}\n',
    ]


LINES = r"""
{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}], "temperature": 0, "max_completion_tokens": 3, "n": 2, "seed": 1, "stop": ["a"], "logprobs": true, "top_logprobs": 2, "logit_bias": {"5": -1.5}}}
{"custom_id": "2", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "c", "content": "3"}], "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}], "tool_choice": "auto", "response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}}}}}
{"custom_id": "3", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["a", [1, 2]], "echo": true, "max_tokens": 0, "logprobs": 1, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1, "stop_token_ids": [3], "ignore_eos": true, "min_tokens": 1}}
{"custom_id": "4", "method": "POST", "url": "/v1/embeddings", "body": {"input": ["a", "b"], "encoding_format": "base64", "pooling": "last", "normalize": false}}
{"custom_id": "5", "method": "POST", "url": "/v1/score", "body": {"context": [1, 2], "continuation": "b", "add_special_tokens": false}}
{"id": 7, "prompt": "x", "structured_outputs": {"choice": ["a", "b"]}, "repetition_detection": {"max_pattern_size": 4, "min_count": 2}, "user": "u", "metadata": {"k": "v"}}
{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}
{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "continue_final_message": true, "chat_template_kwargs": {"a": 1}}
{"prompt_token_ids": [1, 2, 3], "structured_outputs": {"regex": "[a-z]+"}, "prompt_logprobs": 1}
{"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ messages }}", "guided_json": {"type": "string"}}
"""  # noqa: E501

WORDS = (
    "custom_id method url body prompt messages role content max_tokens temperature top_p top_k "
    "stop logprobs logit_bias tools function parameters response_format json_schema "
    "structured_outputs grammar regex choice input context continuation null true "
    "1e999 -1 18446744073709551616 \\ud800 \\u0000 /v1/completions /v1/chat/completions"
).split()

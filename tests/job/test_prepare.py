"""ParsedRows to Requests."""

from typing import Any

import numpy as np
import pytest

from batchwright.errors import RequestError
from batchwright.job.prepare import prepare_rows
from batchwright.job.rows import CHAT, COMPLETIONS, InputRow
from batchwright.job.validate import parse_row
from batchwright.request import Request
from tests.job.fakes import BOS, ByteTokenizer


def prepared(endpoint: str, **body: Any) -> Request:
    row = parse_row(InputRow(4, "r", endpoint, body))
    (found,) = prepare_rows([row], ByteTokenizer())
    if isinstance(found, RequestError):
        raise found
    return found


def test_a_chat_is_rendered_then_tokenised() -> None:
    request = prepared(CHAT, messages=[{"role": "user", "content": "Hi"}], temperature=0)
    assert request.prompt == "<user>Hi\n<assistant>"
    assert request.prompt_token_ids.tolist() == [BOS, *b"<user>Hi\n<assistant>"]
    assert request.prompt_token_ids.dtype == np.int32
    assert (request.id, request.params.temperature) == ("r", 0.0)


def test_a_prompt_may_do_without_special_tokens() -> None:
    assert prepared(COMPLETIONS, prompt="Hi").prompt_token_ids.tolist() == [BOS, *b"Hi"]
    request = prepared(COMPLETIONS, prompt="Hi", add_special_tokens=False)
    assert request.prompt_token_ids.tolist() == [*b"Hi"]


def test_token_ids_pass_through() -> None:
    request = prepared(COMPLETIONS, prompt_token_ids=[0, 256])
    assert request.prompt_token_ids.tolist() == [0, 256]
    assert request.prompt is None


def test_errors_of_the_template_carry_the_line() -> None:
    with pytest.raises(RequestError, match="nobody") as error:
        prepared(CHAT, messages=[{"role": "nobody", "content": "Hi"}])
    assert error.value.line == 4


def test_a_bad_text_fails_alone_in_its_batch() -> None:
    bodies = [{"prompt": "a"}, {"prompt": "\0"}, {"prompt": "b", "add_special_tokens": False}]
    bodies += [{"prompt": "c"}, {"prompt_token_ids": [5]}]
    rows = [parse_row(InputRow(i, str(i), COMPLETIONS, body)) for i, body in enumerate(bodies)]
    found = prepare_rows(rows, ByteTokenizer())
    assert [f.id if isinstance(f, Request) else f.line for f in found] == ["0", 1, "2", "3", "4"]
    ids = [f.prompt_token_ids.tolist() for f in found if isinstance(f, Request)]
    assert ids == [[BOS, 97], [98], [BOS, 99], [5]]

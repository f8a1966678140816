"""The example of docs/prompt_cache.md is a schema and a row of it."""

import json
import re
from pathlib import Path

from batchwright.prompt_cache.call import parse_call
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.prompt_cache.schema import parse_schema
from tests.job.fakes import ByteTokenizer

PAGE = Path(__file__).parent.parent.parent / "docs" / "prompt_cache.md"


def test_the_example_works() -> None:
    schema, row = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    schemas = PromptSchemas([parse_schema(schema.encode())], ByteTokenizer())
    body = json.loads(row)
    ids, layout = schemas.compose(parse_call(body["prompt_cache"]), list(body["prompt"].encode()))
    text = bytes(ids[1:]).decode()
    assert text == (
        "You answer customers of a shop.\nOrder  is paid.\nAnswer in English.\n"
        "It is late.\nA17Where is it?"
    )
    assert len(layout.segments) == 2, "the scaffold with the text outside, and the inner module"

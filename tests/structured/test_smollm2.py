"""Structured output of the real model: every text has its form, whatever else is in the batch."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from batchwright.llm import LLM
from batchwright.request import FinishReason, SamplingParams
from batchwright.structured import spec as specs
from batchwright.structured.spec import GrammarSpec

pytestmark = pytest.mark.cpu

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
DATE = r"\d{4}-\d{2}-\d{2}"
LABELS = ["positive", "negative", "neither"]
ROWS: list[tuple[str, GrammarSpec | None]] = [
    ("Describe a person as JSON:", specs.json_schema(SCHEMA)),
    ("The capital of France is", None),
    ("The food was cold. The review is", specs.choice(LABELS)),
    ("A JSON object:", specs.json_object()),
    ("Today is", specs.regex(DATE)),
    ("Once upon a time", None),
]


def has_its_form(text: str, grammar: GrammarSpec) -> bool:
    if grammar == specs.json_schema(SCHEMA):
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    if grammar == specs.json_object():
        return isinstance(json.loads(text), dict)
    return text in LABELS or re.fullmatch(DATE, text) is not None


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", max_model_len=256)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_whole_text_has_its_form_alone_and_in_the_mix(llm: LLM, temperature: float) -> None:
    prompts = [prompt for prompt, _ in ROWS]
    params = [
        SamplingParams(temperature=temperature, max_tokens=32, seed=index, grammar=grammar, n=n)
        for index, (_, grammar) in enumerate(ROWS)
        for n in [1 + (index == 4 and temperature > 0)]
    ]
    mixed = llm.generate(prompts, params)
    num_whole = 0
    for (_, grammar), result in zip(ROWS, mixed):
        assert result.error is None
        for output in result.outputs:
            if grammar is not None and output.finish_reason is FinishReason.STOP:
                assert has_its_form(output.text, grammar)
                num_whole += 1
    assert num_whole >= 3
    for index in (2, 4):
        (alone,) = llm.generate([prompts[index]], [params[index]])
        assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in mixed[index].outputs]


def test_a_bad_grammar_fails_alone(llm: LLM) -> None:
    params = [SamplingParams(grammar=specs.regex(p), max_tokens=4) for p in ("(", "ok")]
    bad, good = llm.generate(["A", "B"], params)
    assert bad.error is not None and "unclosed group" in bad.error.message
    assert good.outputs[0].text == "ok"

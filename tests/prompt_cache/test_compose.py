"""Positions of modules, unions and parameters, and prompts made of them. A byte is a token."""

import json

import pytest

from batchwright.errors import ConfigError, RequestError
from batchwright.prompt_cache.call import PromptCall, parse_call
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.prompt_cache.positions import Place, place_schema
from batchwright.prompt_cache.schema import parse_schema
from tests.job.fakes import BOS, ByteTokenizer


class NoBegin(ByteTokenizer):
    """Texts begin without a token of their own."""

    def encode_batch(self, texts, *, add_special_tokens=True, parse_special=False):
        return super().encode_batch(texts, add_special_tokens=False)


def schema(content, scaffolds=(), name="s"):
    value = {"name": name, "content": content, "scaffolds": list(scaffolds)}
    return parse_schema(json.dumps(value).encode())


def module(name, content):
    return {"module": name, "content": content}


def placed(content, tokenizer=NoBegin):
    return place_schema(schema(content), tokenizer())


def compose(schemas, modules=(), text="?", **arguments):
    call = PromptCall(None, tuple(modules), tuple(arguments.items()))
    ids, layout = schemas.compose(call, list(text.encode()))
    assert len(ids) == len(layout.positions())
    return ids, layout


def prompts(content, scaffolds=(), tokenizer=NoBegin):
    return PromptSchemas([schema(content, scaffolds)], tokenizer())


def text_of(ids):
    return "".join("^" if i == BOS else chr(i) for i in ids)


# Positions -----------------------------------------------------------------------------------


def test_behind_modules_of_50_and_60_tokens_the_next_stands_at_110():
    found = placed([module("a", "x" * 50), module("b", "y" * 60), module("c", "z")])
    assert [found.modules[name].pieces[0][0] for name in "abc"] == [0, 50, 110]
    assert found.num_positions == 111


def test_a_union_starts_at_one_position_and_takes_that_of_its_longest_member():
    union = {"union": [module("b", "y" * 7), module("c", "z" * 30), module("d", "w" * 12)]}
    found = placed([module("a", "x" * 5), union, module("e", "v")])
    assert [found.modules[name].pieces[0][0] for name in "bcde"] == [5, 5, 5, 35]
    assert {found.modules[name].union for name in "bcd"} == {1}
    assert found.modules["a"].union is None and found.num_positions == 36


def test_parameters_take_their_length_and_modules_in_modules_their_place():
    inner = module("in", ["uv", {"parameter": "q", "length": 3}])
    found = placed(
        [module("a", ["xx", {"parameter": "p", "length": 10}, "yyy", inner, "z"]), "end"]
    )
    outer = found.modules["a"]
    assert [(p, len(ids)) for p, ids in outer.pieces] == [(0, 2), (12, 3), (20, 1)]
    assert outer.parameters == {"p": Place(2, 10)}
    assert found.modules["a.in"].pieces == [(15, list(b"uv"))]
    assert found.modules["a.in"].parameters == {"q": Place(17, 3)}
    assert found.always[0].pieces == [(21, list(b"end"))]


def test_the_begin_token_stands_first():
    found = placed([module("a", "x")], ByteTokenizer)
    assert found.always[0].pieces == [(0, [BOS])]
    assert found.modules["a"].pieces[0][0] == 1


# Prompts -------------------------------------------------------------------------------------


def test_a_prompt_has_its_modules_by_position_then_its_text():
    schemas = prompts(["I.", module("a", "aaa"), module("b", "bb"), module("c", "c")])
    ids, layout = compose(schemas, ["c", "a"], "why?")
    assert text_of(ids) == "I.aaacwhy?"
    assert layout.positions().tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert [s.runs for s in layout.segments] == [((0, 2),), ((2, 3),), ((7, 1),)]
    assert layout.num_imported == 6 and layout.end == 12 and layout.shift == 2
    assert (ids, layout) == compose(schemas, ["a", "c"], "why?"), "the order of naming is nothing"


def test_the_text_stands_behind_what_is_imported_not_behind_the_schema():
    schemas = prompts([module("a", "aaa"), module("b", "b" * 90)])
    assert compose(schemas, ["a"])[1].runs == ((3, 1),)
    assert compose(schemas, ["b"])[1].runs == ((93, 1),)
    assert compose(schemas, [])[1].runs == ((0, 1),)


def test_arguments_stand_in_their_places_and_may_be_shorter():
    content = [
        module("a", ["x", {"parameter": "p", "length": 4}, "y", {"parameter": "q", "length": 2}])
    ]
    schemas = prompts(content)
    ids, layout = compose(schemas, ["a"], p="12", q="34")
    assert text_of(ids) == "xy1234?"
    assert layout.positions().tolist() == [0, 5, 1, 2, 6, 7, 8]
    (segment,) = layout.segments
    assert segment.runs == ((0, 1), (5, 1)), "encoded together, around the empty places"
    ids, layout = compose(schemas, ["a"], **{"a.p": "", "q": "3"})
    assert text_of(ids) == "xy3?"
    assert layout.runs == ((6, 1), (8, 1)), "the reserved end counts"


def test_a_module_in_a_module_brings_those_around_it():
    schemas = prompts([module("a", ["x", module("b", ["y", module("c", "z")])])])
    assert text_of(compose(schemas, ["a.b.c"])[0]) == "xyz?"
    assert text_of(compose(schemas, ["a.b"])[0]) == "xy?"


def test_a_scaffold_joins_its_modules_when_all_are_there():
    content = ["I.", module("a", "aa"), module("b", "bb"), module("c", "cc")]
    schemas = prompts(content, [["a", "b"], ["a", "b", "c"]])
    (whole,) = compose(schemas, ["a", "b", "c"])[1].segments
    assert whole.runs == ((0, 8),), "the largest, with the text outside of modules"
    joined, alone = compose(schemas, ["a", "b"])[1].segments, compose(schemas, ["a", "c"])[1]
    assert [s.runs for s in joined] == [((0, 6),)]
    assert [s.runs for s in alone.segments] == [((0, 2),), ((2, 2),), ((6, 2),)]


def test_a_scaffold_with_a_gap_keeps_the_order_of_positions():
    schemas = prompts([module(n, 2 * n) for n in "abc"], [["a", "c"]])
    joined, between = compose(schemas, ["a", "b", "c"])[1].segments
    assert joined.runs == ((0, 2), (4, 2)) and between.runs == ((2, 2),)


def test_equal_segments_of_different_rows_are_equal():
    schemas = prompts([module("a", "aaa"), module("b", "bb")])
    first, second = compose(schemas, ["a", "b"])[1], compose(schemas, ["b"], "another text")[1]
    assert first.segments[1] == second.segments[0]
    assert hash(first.segments[1]) == hash(second.segments[0])
    assert first.prefix_key == compose(schemas, ["a", "b"], "longer")[1].prefix_key
    assert first.prefix_key != second.prefix_key


# Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "arguments", "words"),
    [
        (["rome"], {}, "names 'rome'; schema s has: trip, trip.in, paris, miami"),
        (["in"], {}, "names 'in'"),
        (["paris", "miami"], {}, "names paris and miami, members of one union; name one"),
        (["trip"], {}, 'prompt_cache.parameters.trip.days is missing; give it, or ""'),
        (["trip"], {"days": "12345"}, "days has 5 tokens, the schema reserves 4; shorten it or"),
        (["trip"], {"days": "1", "when": "x"}, "when is no parameter of what is imported; there"),
        (["trip"], {"days": "1", "trip.days": "2"}, "trip.days is given twice"),
        (["paris"], {"days": "1"}, "days is no parameter of what is imported; there are: none"),
    ],
)
def test_what_a_schema_does_not_know_is_told(modules, arguments, words):
    days = {"parameter": "days", "length": 4}
    content = [
        module("trip", ["x", days, module("in", "y")]),
        {"union": [module("paris", "p"), module("miami", "m")]},
    ]
    with pytest.raises(RequestError) as error:
        compose(prompts(content), modules, **arguments)
    assert words in error.value.message


def test_schemas_are_found_by_name():
    schemas = PromptSchemas([schema(["a"], name="one"), schema(["b"], name="two")], NoBegin())
    assert text_of(schemas.compose(PromptCall("two", (), ()), [33])[0]) == "b!"
    with pytest.raises(RequestError, match="schema is missing; the job has one, two"):
        schemas.compose(PromptCall(None, (), ()), [33])
    with pytest.raises(RequestError, match="is 'three'; the job has one, two; give its file"):
        schemas.compose(PromptCall("three", (), ()), [33])
    with pytest.raises(RequestError, match="prompt is empty"):
        schemas.compose(PromptCall("one", (), ()), [])


def test_a_text_that_the_vocabulary_lacks_is_an_error_at_the_start():
    with pytest.raises(ConfigError, match="prompt schema s: the text has a character"):
        prompts(["\0"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7, "must be an object, not 7"),
        ({"module": []}, "did you mean 'modules'"),
        ({"modules": "a"}, "prompt_cache.modules must be a list"),
        ({"modules": [7]}, "prompt_cache.modules[0] must be a string"),
        ({"modules": ["a"] * 1025}, "at most 1024"),
        ({"modules": None}, "prompt_cache.modules must be a list"),
        ({"parameters": []}, "prompt_cache.parameters must be an object"),
        ({"parameters": {"p": 7}}, "prompt_cache.parameters.p must be a string, not 7"),
        ({"schema": 7}, "prompt_cache.schema must be a string"),
    ],
)
def test_a_call_is_checked(value, words):
    with pytest.raises(RequestError) as error:
        parse_call(value)
    assert words in error.value.message


def test_a_call_is_read():
    value = {"schema": "s", "modules": ["a", "b"], "parameters": {"p": "x"}}
    assert parse_call(value) == PromptCall("s", ("a", "b"), (("p", "x"),))

"""Schema files: what is understood, and that everything else is told with its place."""

import json

import pytest

from batchwright.errors import ConfigError
from batchwright.prompt_cache import schema as schema_module
from batchwright.prompt_cache.schema import (
    Module,
    Parameter,
    Union,
    modules_in,
    parse_schema,
    read_schema,
    read_schemas,
)

TRAVEL = {
    "name": "travel",
    "content": [
        "You are an agent.\n",
        {
            "module": "trip",
            "content": [
                "Plan ",
                {"parameter": "days", "length": 4},
                " days.",
                {"module": "hotels", "content": "Cheap hotels."},
                {"union": [{"module": "sea", "content": "By the sea."}]},
            ],
        },
        {
            "union": [
                {"module": "paris", "content": "Paris is old."},
                {"module": "miami", "content": ["Miami ", "is warm."]},
            ]
        },
    ],
    "scaffolds": [["trip.hotels", "paris"]],
}


def parse(value):
    return parse_schema(json.dumps(value).encode(), "travel.json")


def test_modules_unions_parameters_and_scaffolds_are_read():
    schema = parse(TRAVEL)
    assert (schema.name, schema.parse_special) == ("travel", False)
    text, trip, union = schema.parts
    assert text == "You are an agent.\n"
    assert isinstance(trip, Module) and trip.parts[1] == Parameter("days", 4)
    assert isinstance(union, Union)
    assert [m.path for m in modules_in(schema.parts)] == [
        "trip",
        "trip.hotels",
        "trip.sea",
        "paris",
        "miami",
    ]
    assert schema.scaffolds == (frozenset({"trip", "trip.hotels", "paris"}),)


def changed(path, value):
    """TRAVEL with one entry replaced."""
    copy = json.loads(json.dumps(TRAVEL))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "must be an object"),
        ({"name": "x"}, "lacks content"),
        (changed(["nam"], "x"), "has 'nam'; known are content, name"),
        (changed(["name"], "a b"), "name is 'a b'; a name has"),
        (changed(["name"], 7), "name is 7"),
        (changed(["content"], 7), "content must be a text or a list, not 7"),
        (changed(["content", 0], {"parameter": "p", "length": 3}), "content[0] is a parameter out"),
        (changed(["content", 0], {}), "content[0] must be a text or have one of"),
        (changed(["content", 0], {"module": "a", "union": []}), "must be a text or have one of"),
        (changed(["content", 0], None), "content[0] must be a text"),
        (changed(["content", 1, "content", 1, "length"], 0), "content[1].content[1].length is 0"),
        (changed(["content", 1, "content", 1, "length"], True), "length is True"),
        (changed(["content", 1, "content", 1, "length"], 10**9), "from 1 to 65,536"),
        (changed(["content", 1, "content", 3, "module"], "days"), "two modules or parameters"),
        (changed(["content", 2, "union", 0, "module"], "trip"), "two modules or parameters"),
        (changed(["content", 2, "union"], []), "must be a list of modules"),
        (changed(["content", 2, "union", 0], "text"), "union[0] must be a module"),
        (changed(["content", 2, "union", 0, "module"], "a.b"), "is 'a.b'; a name has"),
        (changed(["scaffolds"], {}), "scaffolds must be a list"),
        (changed(["scaffolds", 0], []), "scaffolds[0] must be a list of modules"),
        (changed(["scaffolds", 0], ["rome"]), "scaffolds[0] names 'rome', which is no module"),
        (changed(["scaffolds", 0], ["paris", "miami"]), "two members of a union"),
        (changed(["parse_special"], 1), "parse_special must be true or false"),
    ],
)
def test_a_bad_schema_is_told_with_the_place(value, words):
    with pytest.raises(ConfigError) as error:
        parse(value)
    assert words in str(error.value) and str(error.value).startswith("travel.json: ")


def test_depth_parts_and_bytes_are_bounded(monkeypatch):
    def nested(depth):
        content = "x"
        for _ in range(depth):
            content = [{"module": "m", "content": content}]
        return {"name": "n", "content": content}

    assert len(list(modules_in(parse(nested(16)).parts))) == 16
    with pytest.raises(ConfigError, match="more than 16 modules"):
        parse(nested(17))

    def unions(depth):
        part = {"module": "m", "content": "x"}
        for _ in range(depth):
            part = {"module": "m", "content": [{"union": [part]}]}
        return {"name": "n", "content": [part]}

    with pytest.raises(ConfigError, match="16 modules and unions"):
        parse(unions(9))
    with pytest.raises(ConfigError, match="is not valid JSON"):
        parse_schema(b"[" * 100_000 + b"]" * 100_000)
    monkeypatch.setattr(schema_module, "MAX_PARTS", 10)
    with pytest.raises(ConfigError, match="beyond 10 parts"):
        parse({"name": "n", "content": ["a"] * 11})
    monkeypatch.setattr(schema_module, "MAX_BYTES", 100)
    with pytest.raises(ConfigError, match="more than 100 bytes"):
        parse(TRAVEL)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"name": "\xff"}', b"<schema/>"])
def test_what_is_not_json_is_told(content):
    with pytest.raises(ConfigError, match=r"schema is not valid JSON .*; correct it"):
        parse_schema(content, "schema")


def test_files_are_read_and_names_differ(tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(TRAVEL))
    two.write_text(json.dumps(changed(["content", 0], "Other.")))
    assert read_schema(str(one)).digest != read_schema(str(two)).digest
    with pytest.raises(ConfigError, match="another prompt schema is named 'travel' too"):
        read_schemas([str(one), str(two)])
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_schema(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_schema(str(tmp_path))

"""Schema files: modules, unions, parameters and scaffolds, read from JSON and checked.

    {"name": "travel",
     "content": [
        "You are a travel agent.\n",
        {"module": "trip", "content": ["Plan ", {"parameter": "days", "length": 4}, " days.\n"]},
        {"union": [{"module": "paris", "content": "..."}, {"module": "miami", "content": "..."}]}],
     "scaffolds": [["trip", "paris"]]}

The grammar is that of the paper's markup language (arXiv:2311.04934, section 3), written as JSON:
no entities, and white space is what it looks like. Positions are given in `positions.py`, where
there is a tokenizer. Nothing of a file is trusted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from batchwright.errors import ConfigError
from batchwright.validation.checks import shown

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 16
MAX_PARTS = 20_000
MAX_PARAMETER_TOKENS = 65_536
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_KEYS = {
    "module": {"module", "content"},
    "union": {"union"},
    "parameter": {"parameter", "length"},
}
_SCHEMA_KEYS = {"name", "content", "scaffolds", "parse_special"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A place in a module that each prompt fills, with at most `length` tokens."""

    name: str
    length: int


@dataclass(frozen=True, slots=True)
class Module:
    """Text that a prompt may import, by its path: the names of the modules around it and its own,
    joined by dots."""

    path: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Union:
    """Modules of which a prompt imports at most one. They start at the same position."""

    members: tuple[Module, ...]


Part = str | Parameter | Module | Union


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema file.

    Attributes:
        name: what prompts call it.
        parts: its content; text outside of modules is part of every prompt.
        scaffolds: sets of module paths that are encoded together when a prompt imports them all.
            A module in a module is listed with those around it.
        parse_special: special tokens spelled in its texts become those tokens.
        digest: identifies the file's content.
    """

    name: str
    parts: tuple[Part, ...]
    scaffolds: tuple[frozenset[str], ...]
    parse_special: bool
    digest: str


def read_schemas(paths: list[str]) -> list[Schema]:
    """Read schema files.

    Raises:
        ConfigError: a file cannot be read, is no schema, or two have the same name.
    """
    schemas = [read_schema(path) for path in paths]
    names = [schema.name for schema in schemas]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"{path}: another prompt schema is named {name!r} too; rename one")
    return schemas


def schema_settings(schemas: Sequence[Schema]) -> dict[str, Any]:
    """What a job's manifest says of its schemas; nothing if there is none."""
    return {"prompt_schemas": {s.name: s.digest for s in schemas}} if schemas else {}


def read_schema(path: str) -> Schema:
    """Read one file; errors as `read_schemas`."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; name a JSON file") from error
    return parse_schema(content, path)


def parse_schema(content: bytes, where: str = "prompt schema") -> Schema:
    """A schema from the bytes of its file; `where` begins the message of a ConfigError."""
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{where} has more than {MAX_BYTES:,} bytes; divide it")
    try:
        value = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON ({error}); correct it") from error
    return _Reader(where).schema(value, hashlib.blake2b(content, digest_size=16).hexdigest())


def modules_in(parts: tuple[Part, ...]) -> Iterator[Module]:
    """All modules, those around others first."""
    for part in parts:
        if isinstance(part, Module):
            yield part
            yield from modules_in(part.parts)
        elif isinstance(part, Union):
            yield from modules_in(part.members)


def around(path: str) -> list[str]:
    """The path of a module and of those around it, outermost first."""
    names = path.split(".")
    return [".".join(names[: end + 1]) for end in range(len(names))]


class _Reader:
    """Walks through a decoded file and complains with the place where something is wrong."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._num_parts = 0

    def schema(self, value: Any, digest: str) -> Schema:
        if not isinstance(value, dict):
            self._fail("", f"must be an object with name and content, not {shown(value)}")
        self._check_keys("", value, _SCHEMA_KEYS, {"name", "content"})
        name = self._name("name", value["name"])
        parse_special = value.get("parse_special", False)
        if not isinstance(parse_special, bool):
            self._fail("parse_special", f"must be true or false, not {shown(parse_special)}")
        parts = self._content("content", value["content"], "", 0)
        for index, part in enumerate(parts):
            if isinstance(part, Parameter):
                self._fail(f"content[{index}]", "is a parameter outside of modules; put it in one")
        scaffolds = self._scaffolds(value.get("scaffolds", []), parts)
        return Schema(name, parts, scaffolds, parse_special, digest)

    def _content(self, at: str, value: Any, scope: str, depth: int) -> tuple[Part, ...]:
        """What stands in the module of path `scope`, or at the top ("")."""
        if depth > MAX_DEPTH:
            self._fail(at, f"lies in more than {MAX_DEPTH} modules and unions; flatten the schema")
        if isinstance(value, str):
            return (self._text(at, value),)
        if not isinstance(value, list):
            self._fail(at, f"must be a text or a list, not {shown(value)}")
        parts = tuple(
            self._part(f"{at}[{index}]", part, scope, depth) for index, part in enumerate(value)
        )
        self._check_unique(at, parts)
        return parts

    def _part(self, at: str, value: Any, scope: str, depth: int) -> Part:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            self._fail(at, f"is beyond {MAX_PARTS:,} parts; divide the schema")
        if isinstance(value, str):
            return self._text(at, value)
        kinds = [kind for kind in _KEYS if isinstance(value, dict) and kind in value]
        if len(kinds) != 1:
            self._fail(
                at, f"must be a text or have one of module, union, parameter, not {shown(value)}"
            )
        (kind,) = kinds
        self._check_keys(at, value, _KEYS[kind], _KEYS[kind])
        if kind == "module":
            return self._module(at, value, scope, depth)
        if kind == "parameter":
            length = value["length"]
            if type(length) is not int or not 1 <= length <= MAX_PARAMETER_TOKENS:
                limits = f"a whole number of tokens from 1 to {MAX_PARAMETER_TOKENS:,}"
                self._fail(f"{at}.length", f"is {shown(length)}; it must be {limits}")
            return Parameter(self._name(f"{at}.parameter", value["parameter"]), length)
        members = value["union"]
        if not isinstance(members, list) or not members:
            self._fail(f"{at}.union", f"must be a list of modules, not {shown(members)}")
        if depth >= MAX_DEPTH:
            self._fail(at, f"lies in {MAX_DEPTH} modules and unions; flatten the schema")
        parts = [
            self._part(f"{at}.union[{i}]", member, scope, depth + 1)
            for i, member in enumerate(members)
        ]
        for index, part in enumerate(parts):
            if not isinstance(part, Module):
                self._fail(f"{at}.union[{index}]", "must be a module")
        return Union(tuple(part for part in parts if isinstance(part, Module)))

    def _module(self, at: str, value: dict[str, Any], scope: str, depth: int) -> Module:
        name = self._name(f"{at}.module", value["module"])
        path = f"{scope}.{name}" if scope else name
        return Module(path, self._content(f"{at}.content", value["content"], path, depth + 1))

    def _scaffolds(self, value: Any, parts: tuple[Part, ...]) -> tuple[frozenset[str], ...]:
        if not isinstance(value, list):
            self._fail("scaffolds", f"must be a list of lists of modules, not {shown(value)}")
        known = {module.path for module in modules_in(parts)}
        rivals = _union_of(parts)
        scaffolds = []
        for index, paths in enumerate(value):
            at = f"scaffolds[{index}]"
            if not isinstance(paths, list) or not paths:
                self._fail(at, f"must be a list of modules, not {shown(paths)}")
            for path in paths:
                if not isinstance(path, str) or path not in known:
                    self._fail(at, f"names {shown(path)}, which is no module of the schema")
            scaffold = frozenset(outer for path in paths for outer in around(path))
            unions = [rivals[path] for path in scaffold if path in rivals]
            if len(set(unions)) < len(unions):
                self._fail(at, "has two members of a union, which no prompt imports together")
            scaffolds.append(scaffold)
        return tuple(scaffolds)

    def _check_unique(self, at: str, parts: tuple[Part, ...]) -> None:
        """Names are unique in their scope, that of unions included."""
        named = [part for part in parts if isinstance(part, Module)]
        named += [member for part in parts if isinstance(part, Union) for member in part.members]
        names = [module.path.rpartition(".")[2] for module in named]
        names += [part.name for part in parts if isinstance(part, Parameter)]
        seen: set[str] = set()
        for name in names:
            if name in seen:
                self._fail(at, f"has two modules or parameters named {name!r}; rename one")
            seen.add(name)

    def _check_keys(self, at: str, value: dict[str, Any], known: set[str], due: set[str]) -> None:
        if missing := sorted(due - value.keys()):
            self._fail(at, f"lacks {', '.join(missing)}")
        if unknown := sorted(value.keys() - known):
            self._fail(at, f"has {shown(unknown[0])}; known are {', '.join(sorted(known))}")

    def _name(self, at: str, value: Any) -> str:
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            self._fail(at, f"is {shown(value)}; a name has 1 to 100 letters, digits, _ and -")
        return value

    def _text(self, at: str, value: str) -> str:
        if any("\ud800" <= char <= "\udfff" for char in value):
            self._fail(at, "has half a surrogate pair, which is not valid text; remove it")
        return value

    def _fail(self, at: str, problem: str) -> NoReturn:
        raise ConfigError(f"{self._where}: {at}{' ' if at else ''}{problem}")


def _union_of(parts: tuple[Part, ...]) -> dict[str, int]:
    """Which union each member belongs to, by its path."""
    unions: dict[str, int] = {}

    def walk(parts: tuple[Part, ...]) -> None:
        for part in parts:
            if isinstance(part, Union):
                unions.update(dict.fromkeys((m.path for m in part.members), id(part)))
                walk(part.members)
            elif isinstance(part, Module):
                walk(part.parts)

    walk(parts)
    return unions

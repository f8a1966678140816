"""Where the tokens of a schema stand: every module has a fixed first position.

It is the number of tokens before the module in the schema: behind modules of 50 and 60 tokens the
next stands at 110. A union takes as many positions as its longest member, and all members start at
its first; a parameter takes its length. Source: arXiv:2311.04934, section 3.3.

Unlike the paper, the places of a parameter are left empty while its module is encoded, instead of
being filled with unknown tokens whose states are then dropped: positions are explicit, and many
tokenizers have no unknown token that means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from batchwright.prompt_cache.schema import Module, Parameter, Part, Schema, Union
from batchwright.text.continuation import Tokenizer


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter: its first position, and how many it has."""

    position: int
    length: int


@dataclass(slots=True)
class PlacedModule:
    """A module with its tokens; `path` is None for text outside of modules.

    Attributes:
        pieces: (first position, token ids) of its own text; modules in it have theirs.
        parameters: its own, by name.
        union: number of the union it is a member of.
    """

    path: str | None
    pieces: list[tuple[int, list[int]]] = field(default_factory=list)
    parameters: dict[str, Place] = field(default_factory=dict)
    union: int | None = None


@dataclass(frozen=True, slots=True)
class PlacedSchema:
    """A schema in tokens.

    Attributes:
        modules: by path.
        always: text outside of modules, which every prompt has.
        num_positions: the schema's length.
    """

    schema: Schema
    modules: dict[str, PlacedModule]
    always: list[PlacedModule]
    num_positions: int


def place_schema(schema: Schema, tokenizer: Tokenizer) -> PlacedSchema:
    """Tokenise a schema's texts, each by itself, and give everything its position.

    The tokens with which the model's tokenizer begins every text stand first.

    Raises:
        RequestError: the vocabulary cannot express a text.
    """
    texts = list(_texts(schema.parts))
    encoded = tokenizer.encode_batch(
        texts, add_special_tokens=False, parse_special=schema.parse_special
    )
    walker = _Walker(iter(encoded))
    begin = _begin_tokens(tokenizer)
    if begin:
        walker.always.append(PlacedModule(None, [(0, begin)]))
    end = walker.place(schema.parts, None, len(begin))
    return PlacedSchema(schema, walker.modules, walker.always, end)


def _texts(parts: Sequence[Part]) -> list[str]:
    """All texts in the order in which they are placed."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Module):
            texts += _texts(part.parts)
        elif isinstance(part, Union):
            texts += _texts(part.members)
    return texts


def _begin_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text: the begin token or nothing."""
    (ids,) = tokenizer.encode_batch([""], add_special_tokens=True)
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


class _Walker:
    """Goes through the parts in order. `modules` and `always` are as in PlacedSchema."""

    def __init__(self, encoded: Iterator[list[int]]) -> None:
        self._encoded = encoded
        self._num_unions = 0
        self.modules: dict[str, PlacedModule] = {}
        self.always: list[PlacedModule] = []

    def place(self, parts: Sequence[Part], owner: PlacedModule | None, start: int) -> int:
        """Place parts from `start` on; returns the position after them."""
        for part in parts:
            if isinstance(part, str):
                ids = next(self._encoded)
                self._text(owner).pieces.append((start, ids))
                start += len(ids)
            elif isinstance(part, Parameter):
                assert owner is not None
                owner.parameters[part.name] = Place(start, part.length)
                start += part.length
            elif isinstance(part, Module):
                start = self._module(part, None, start)
            else:
                self._num_unions += 1
                union = self._num_unions
                start = max(self._module(member, union, start) for member in part.members)
        return start

    def _module(self, module: Module, union: int | None, start: int) -> int:
        placed = self.modules[module.path] = PlacedModule(module.path, union=union)
        return self.place(module.parts, placed, start)

    def _text(self, owner: PlacedModule | None) -> PlacedModule:
        if owner is None:
            owner = PlacedModule(None)
            self.always.append(owner)
        return owner

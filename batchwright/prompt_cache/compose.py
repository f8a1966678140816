"""From a row's `prompt_cache` to a prompt: which segments it imports, its arguments, its text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from batchwright.errors import ConfigError, RequestError
from batchwright.prompt_cache.call import PromptCall
from batchwright.prompt_cache.positions import Place, PlacedModule, PlacedSchema, place_schema
from batchwright.prompt_cache.schema import Schema, around
from batchwright.prompt_layout import PromptLayout, Runs, Segment
from batchwright.text.continuation import Tokenizer
from batchwright.validation import checks

logger = logging.getLogger(__name__)

Pieces = list[tuple[int, list[int]]]
"""(first position, token ids) of consecutive tokens."""


class PromptSchemas:
    """The schemas of a job, in tokens.

    Args:
        schemas: with names that differ.
        tokenizer: the model's.
    Raises:
        ConfigError: the vocabulary cannot express a text.
    """

    def __init__(self, schemas: Iterable[Schema], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._composers: dict[str, _Composer] = {}
        for schema in schemas:
            try:
                placed = place_schema(schema, tokenizer)
            except RequestError as error:
                raise ConfigError(f"prompt schema {schema.name}: {error.message}") from error
            self._composers[schema.name] = _Composer(placed)
            logger.info(
                "prompt cache: schema %s, %d modules, %d positions; lossy: a module does not see "
                "the others unless a scaffold joins them (docs/prompt_cache.md)",
                schema.name,
                len(placed.modules),
                placed.num_positions,
            )

    def compose(
        self, call: PromptCall, text_ids: list[int], *, parse_special: bool = False
    ) -> tuple[list[int], PromptLayout]:
        """The prompt of a row.

        Args:
            text_ids: tokens of the text that comes last, at least one.
            parse_special: special tokens spelled in arguments become those tokens.
        Returns:
            (token ids, layout): imported segments by position, then arguments by position, then the
            text, which begins behind the last position that the imported modules take.
        Raises:
            RequestError: there is no such schema, module or parameter, two members of a union, an
                argument that is missing or too long, or no text.
        """
        composer = self._composer(call.schema)
        if not text_ids:
            checks.fail("prompt", "is empty; a prompt with modules needs a text after them")

        def encode(texts: list[str]) -> list[list[int]]:
            return self._tokenizer.encode_batch(
                texts, add_special_tokens=False, parse_special=parse_special
            )

        return composer.compose(call, text_ids, encode)

    def _composer(self, name: str | None) -> _Composer:
        if name is None and len(self._composers) == 1:
            return next(iter(self._composers.values()))
        known = ", ".join(self._composers) or "none"
        if name is None:
            checks.fail("prompt_cache.schema", f"is missing; the job has {known}")
        if name not in self._composers:
            checks.fail(
                "prompt_cache.schema",
                f"is {name!r}; the job has {known}; give its file with --prompt-schema",
                code="unknown_prompt_schema",
            )
        return self._composers[name]


@dataclass(frozen=True, slots=True)
class _Import:
    """What a selection of modules means.

    Attributes:
        segments: what is taken over, by first position.
        token_ids: their tokens.
        parameters: (path, place) by position.
        end: the position after everything that it takes.
    """

    segments: tuple[Segment, ...]
    token_ids: tuple[int, ...]
    parameters: tuple[tuple[str, Place], ...]
    end: int


class _Composer:
    """Prompts of one schema."""

    def __init__(self, placed: PlacedSchema) -> None:
        self._placed = placed
        self._import = lru_cache(maxsize=4096)(self._make_import)

    def compose(
        self,
        call: PromptCall,
        text_ids: list[int],
        encode: Callable[[list[str]], list[list[int]]],
    ) -> tuple[list[int], PromptLayout]:
        imported = self._import(call.modules)
        runs: list[tuple[int, int]] = []
        token_ids = list(imported.token_ids)
        for place, ids in self._arguments(call, imported, encode):
            if ids:
                runs.append((place.position, len(ids)))
                token_ids += ids
        runs.append((imported.end, len(text_ids)))
        return token_ids + text_ids, PromptLayout(imported.segments, tuple(runs))

    def _arguments(
        self,
        call: PromptCall,
        imported: _Import,
        encode: Callable[[list[str]], list[list[int]]],
    ) -> list[tuple[Place, list[int]]]:
        """Tokens of the arguments, by position."""
        if not imported.parameters and not call.arguments:
            return []
        texts = self._by_path(call, [path for path, _ in imported.parameters])
        ids = encode([texts[path] for path, _ in imported.parameters])
        for (path, place), argument in zip(imported.parameters, ids, strict=True):
            if len(argument) > place.length:
                checks.fail(
                    f"prompt_cache.parameters.{path}",
                    f"has {len(argument)} tokens, the schema reserves {place.length}; shorten it "
                    "or raise the parameter's length",
                )
        return [(place, a) for (_, place), a in zip(imported.parameters, ids, strict=True)]

    def _by_path(self, call: PromptCall, paths: list[str]) -> dict[str, str]:
        """Texts of all parameters; a name alone will do where only one module has it."""
        texts: dict[str, str] = {}
        bare = Counter(path.rpartition(".")[2] for path in paths)
        for name, text in call.arguments:
            path = name
            if bare[name] == 1:
                (path,) = (p for p in paths if p.rpartition(".")[2] == name)
            if path not in paths or path in texts:
                known = ", ".join(paths) or "none"
                problem = (
                    "is given twice" if path in texts else "is no parameter of what is imported"
                )
                checks.fail(f"prompt_cache.parameters.{name:.80}", f"{problem}; there are: {known}")
            texts[path] = text
        for path in paths:
            if path not in texts:
                checks.fail(
                    f"prompt_cache.parameters.{path}",
                    'is missing; give it, or "" to leave it empty',
                )
        return texts

    def _make_import(self, names: tuple[str, ...]) -> _Import:
        paths = self._paths(names)
        known, always = self._placed.modules, self._placed.always
        parameters = [
            (f"{path}.{name}", place)
            for path in paths
            for name, place in known[path].parameters.items()
        ]
        groups: list[list[PlacedModule]] = []
        left, alone = set(paths), [[module] for module in always]
        for scaffold in sorted(self._placed.schema.scaffolds, key=len, reverse=True):
            if scaffold <= left:
                left -= scaffold
                # Every prompt has the text outside of modules: the first scaffold takes it in.
                groups.append([known[path] for path in scaffold] + [m for (m,) in alone])
                alone = []
        groups += alone + [[known[path]] for path in paths if path in left]
        pieces = [_pieces(group) for group in groups]
        pieces = sorted((p for p in pieces if p), key=lambda p: p[0][0])
        ends = [position + len(ids) for group in pieces for position, ids in group]
        ends += [place.position + place.length for _, place in parameters]
        return _Import(
            tuple(Segment.of((i for _, ids in p for i in ids), _runs(p)) for p in pieces),
            tuple(i for p in pieces for _, ids in p for i in ids),
            tuple(sorted(parameters, key=lambda item: item[1].position)),
            max(ends, default=0),
        )

    def _paths(self, names: tuple[str, ...]) -> list[str]:
        """The modules named and those around them, each once, checked."""
        known = self._placed.modules
        for name in names:
            if name not in known:
                listed = ", ".join(list(known)[:20]) or "none"
                checks.fail(
                    "prompt_cache.modules",
                    f"names {checks.shown(name)}; schema {self._placed.schema.name} has: {listed}"
                    f"{', ...' if len(known) > 20 else ''}",
                    code="unknown_prompt_module",
                )
        paths = list(dict.fromkeys(path for name in names for path in around(name)))
        members: dict[int, str] = {}
        for path in paths:
            union = known[path].union
            if union is not None and members.setdefault(union, path) != path:
                checks.fail(
                    "prompt_cache.modules",
                    f"names {members[union]} and {path}, members of one union; name one of them",
                )
        return paths


def _pieces(modules: list[PlacedModule]) -> Pieces:
    """The text of modules that are encoded together, by position."""
    return sorted(piece for module in modules for piece in module.pieces if piece[1])


def _runs(pieces: Pieces) -> Runs:
    runs: list[tuple[int, int]] = []
    for position, ids in pieces:
        if runs and sum(runs[-1]) == position:
            runs[-1] = (runs[-1][0], runs[-1][1] + len(ids))
        else:
            runs.append((position, len(ids)))
    return tuple(runs)

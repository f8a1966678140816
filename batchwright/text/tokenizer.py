"""`Tokenizer`: text to token ids and back, for prompts and for chats.

Built on the `tokenizers` library. Special tokens that are spelled in user text stay text unless the
caller asks for them (`parse_special=True`); those a chat template writes are always parsed.
"Special" is what the model's files mark as special (`special: true`, control tokens in GGUF, the
named bos/eos/... tokens); other added tokens, such as `<tool_call>` in many models, are matched in
text as the model's own tokenizer does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from batchwright.errors import ModelNotFoundError, RequestError
from batchwright.request import Markup
from batchwright.text.backend import TokenizerParts, decoder_kind, text_only_backend
from batchwright.text.chat_messages import plain_json
from batchwright.text.chat_template import Template, choose_chat_template
from batchwright.text.markup import markup_of
from batchwright.text.special_text import Marking, SpecialSpellings, strings_in

# Stands for a special token while the text around it is encoded. Two noncharacters of the private
# planes: no text has them; one that does is refused.
_SENTINEL = "\U0010fffd\U000ffffd\U0010fffd"

_SPACE_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Tokenizer:
    """Encodes, decodes and renders chats for one model. Safe to share between threads.

    Attributes:
        vocab_size: one more than the largest token id of the tokenizer (a model's embedding may
            have more rows).
        bos_token_id, eos_token_id: None if the model names none.
        end_token_ids: every id that ends an output, sorted.
        special_token_ids: ids that `skip_special_tokens` leaves out of text.
        chat_template: the model's template, several by name, or None; may be replaced.
        now: what a template's `strftime_now` tells; one moment per job, so rows are repeatable.
        backend: the `tokenizers` pipeline underneath.
        decoder_kind: see `backend.decoder_kind`.
    """

    def __init__(self, parts: TokenizerParts, *, now: datetime | None = None) -> None:
        self.backend = parts.backend
        self.vocab_size = parts.vocab_size
        self.special_tokens = parts.special_tokens
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.end_token_ids = parts.end_token_ids
        self.chat_template: str | dict[str, str] | None = parts.chat_templates or None
        if list(parts.chat_templates) == ["default"]:
            self.chat_template = parts.chat_templates["default"]
        self.now = now or datetime.now()
        self.decoder_kind = decoder_kind(self.backend.decoder)
        self._keep_leading_space = parts.keep_leading_space
        self._clean_up_spaces = parts.clean_up_spaces

        added = self.backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        contents = {token.content for token in added.values() if token.special}
        contents |= {text for text in self.special_tokens.values() if text}
        self._spellings = SpecialSpellings(contents)
        self._text_backend = text_only_backend(self.backend, frozenset(contents))
        self._segment_backend: tokenizers.Tokenizer | None = None
        self._leaks = self._find_leaks(contents)
        self._special = {added[i].content: i for i in self.special_token_ids}
        self._markups: dict[tuple[str, bool], Markup] = {}

    def _named_id(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self.backend.token_to_id(content)

    def _find_leaks(self, contents: set[str]) -> SpecialSpellings | None:
        """Special tokens that this model makes out of plain text even when told not to."""
        names = sorted(contents)
        encodings = self._text_backend.encode_batch_fast(names, add_special_tokens=False)
        leaks = [
            name
            for name, encoding in zip(names, encodings, strict=True)
            if self.backend.token_to_id(name) in encoding.ids
        ]
        return SpecialSpellings(leaks) if leaks else None

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id; None if it has none."""
        return self.backend.id_to_token(token_id)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Encode one text; see `encode_batch`."""
        return self.encode_batch(
            [text], add_special_tokens=add_special_tokens, parse_special=parse_special
        )[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        parse_special: bool = False,
    ) -> list[list[int]]:
        """Encode texts, in parallel and without the GIL.

        Args:
            add_special_tokens: add BOS and EOS as the model's own tokenizer does.
            parse_special: special tokens spelled in the text become those tokens, not text.
        Returns:
            One list of token ids per text. Characters a vocabulary cannot express are left out
            or become its unknown token, as in the model's own tokenizer.
        Raises:
            RequestError: a text is not valid Unicode, or spells a special token that this model's
                vocabulary cannot express as text. The message tells which text.
        """
        backend = self.backend if parse_special else self._text_backend
        for i, text in enumerate(texts if self._leaks and not parse_special else ()):
            self._refuse_leak(text, _which(i, texts))
        if self._keep_leading_space:
            texts = [" " + text if text.startswith((" ", "\u2581")) else text for text in texts]
        return [e.ids for e in _encode(backend, texts, add_special_tokens)]

    def _refuse_leak(self, text: str, where: str = "") -> None:
        match = self._leaks.pattern.search(text) if self._leaks else None
        if match:
            raise RequestError(
                f"{where}the text spells the special token {match.group()!r}, which this model's "
                "vocabulary cannot express as text; remove it or ask for special tokens"
            )

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        keep: frozenset[int] = frozenset(),
    ) -> str:
        """Decode token ids. Ids outside the vocabulary and invalid UTF-8 do not raise.

        Args:
            skip_special_tokens: leave special tokens out, but for those in `keep`.
        """
        if skip_special_tokens and keep:
            skipped = self.special_token_ids - keep
            ids = [token_id for token_id in ids if token_id not in skipped]
            skip_special_tokens = False
        text = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self._clean_up_spaces:
            for old, new in _SPACE_CLEAN_UP:
                text = text.replace(old, new)
        return text

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = False,
        template: Template | None = None,
    ) -> tuple[str, list[int]]:
        """Render a conversation with the model's chat template and encode it.

        Args:
            messages: dicts with a role and content (text, or a list of text parts).
            add_generation_prompt: end with the header of the assistant's turn.
            tools: JSON schemas of tools.
            template_kwargs: further variables, each of which the template must read.
            continue_final_message: leave the last message open instead.
            parse_special: special tokens spelled in the messages become those tokens.
            template: used instead of the model's.
        Returns:
            (text, token ids). The text equals transformers' byte for byte; so do the ids, unless a
            user's string spells a special token: that stays text.
        Raises:
            RequestError: no template, a bad message, or a template that fails or that changes a
                spelled special token so that it cannot be told from the template's own.
        """
        if template is None:
            template = choose_chat_template(self.chat_template, with_tools=tools is not None)
        user = {
            "messages": plain_json(messages, "messages"),
            "tools": plain_json(tools, "tools"),
            "template_kwargs": plain_json(dict(template_kwargs or {}), "chat_template_kwargs"),
        }
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "special_tokens": self.special_tokens,
            "now": self.now,
        }
        text = template.render(**user, **options)
        if parse_special or not self._spellings.touches(user):
            return text, _encode(self.backend, [text], False)[0].ids
        return text, self._encode_apart(template, text, user, options)

    def markup(self, *, with_tools: bool, template: Template | None = None) -> Markup:
        """How the model marks reasoning and tool calls in a chat's answer.

        Args:
            with_tools: the row gives tools.
            template: used instead of the model's.

        Raises:
            RequestError: the model has no chat template.
        """
        if template is not None:
            return markup_of(template.source, self._special, with_tools=with_tools)
        source = choose_chat_template(self.chat_template, with_tools=with_tools).source
        key = source, with_tools
        if key not in self._markups:
            self._markups[key] = markup_of(source, self._special, with_tools=with_tools)
        return self._markups[key]

    def _encode_apart(
        self, template: Template, text: str, user: dict[str, Any], options: dict[str, Any]
    ) -> list[int]:
        """Encode a rendered chat whose user strings spell special tokens, or parts of them."""
        taken = {template.source, text, *strings_in(user)}
        marking = Marking(self._spellings, user, set().union(*taken))
        try:
            marked = template.render(**marking.mark(user), **options)
        except RequestError as error:
            raise _cannot_tell_apart(str(error)) from error
        if marking.restore(marked) != text:
            raise _cannot_tell_apart("the chat template changes or tests that text")
        spelled = [m.span() for m in self._spellings.pattern.finditer(text)]
        if not any(marking.is_marked(marked[start:end]) for start, end in spelled):
            return _encode(self.backend, [text], False)[0].ids
        return self._encode_segments(marking, marked)

    def _encode_segments(self, marking: Marking, marked: str) -> list[int]:
        """Encode what is marked as text and the other special tokens as themselves.

        Each special token of the template gives way to a sentinel, the whole is encoded as text
        in one go (so that every segment keeps its place for prefix-space rules), and the ids of
        the sentinels are replaced.
        """
        encoding = _encode(self.backend, [marked], False, offsets=True)[0]
        pieces: list[str] = []
        special_ids: list[int] = []
        done = 0
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            content = self.id_to_token(token_id)
            if token_id not in self.special_token_ids or marked[start:end].strip() != content:
                continue  # ordinary text, or an unknown token
            pieces += [marked[done:start], _SENTINEL]
            special_ids.append(token_id)
            done = end
        pieces.append(marked[done:])
        text = marking.restore("".join(pieces))
        self._refuse_leak(text)
        if text.count(_SENTINEL) != len(special_ids):
            raise RequestError("the messages hold the private-use text U+10FFFD U+FFFFD U+10FFFD")
        backend = self._segments()
        sentinel_id = backend.token_to_id(_SENTINEL)
        ids: list[int] = _encode(backend, [text], False)[0].ids
        restored = iter(special_ids)
        return [next(restored) if i == sentinel_id else i for i in ids]

    def _segments(self) -> tokenizers.Tokenizer:
        if self._segment_backend is None:
            backend = text_only_backend(self._text_backend, frozenset())
            backend.add_tokens([AddedToken(_SENTINEL, normalized=False, special=False)])
            self._segment_backend = backend
        return self._segment_backend


def _encode(
    backend: tokenizers.Tokenizer,
    texts: Sequence[str],
    add_special_tokens: bool,
    *,
    offsets: bool = False,
) -> list[tokenizers.Encoding]:
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        return encode(list(texts), add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeEncodeError):
        for i, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"{_which(i, texts)}the text has the lone surrogate "
                    f"U+{ord(text[error.start]):04X} at character {error.start}, which is not "
                    "valid Unicode; remove it"
                ) from error
        raise


def _which(index: int, texts: Sequence[str]) -> str:
    return f"text {index}: " if len(texts) > 1 else ""


def _cannot_tell_apart(why: str) -> RequestError:
    return RequestError(
        "the messages spell a special token of the model, and it cannot be kept apart from the "
        f"chat template's own tokens: {why}; remove the spelling or ask for special tokens",
        param="messages",
    )


def load_tokenizer(path: Path, *, now: datetime | None = None) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory or a GGUF file.

    Args:
        path: the directory or file.
        now: what chat templates take for the present; None means the moment of loading.
    Raises:
        ModelNotFoundError: nothing is there, or the directory has no tokenizer.
        ModelFormatError: damaged files.
        UnsupportedModelError: a kind of tokenizer this version cannot build.
    """
    path = Path(path)
    if path.is_dir():
        from batchwright.text.hf_tokenizer import load_hf_tokenizer

        return Tokenizer(load_hf_tokenizer(path), now=now)
    if not path.is_file():
        raise ModelNotFoundError(
            f"{path}: there is no such file or directory; give a Hugging Face directory or a .gguf"
        )
    from batchwright.text.gguf_tokenizer import gguf_tokenizer_parts
    from batchwright.weights.gguf import read_gguf

    return Tokenizer(gguf_tokenizer_parts(read_gguf(path).metadata), now=now)

"""Incremental detokenisation, and stop strings found in it as they appear.

`StopStringChecker` takes a sequence's tokens as they come and says when its text first contains a
stop string, wherever token and character borders lie. Its text is always a prefix-exact view of
`tokenizer.decode(all ids so far)`; the work per token is bounded by the longest stop string and the
token itself, not by the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from batchwright.request import SamplingParams
from batchwright.text.text_stream import open_text_stream
from batchwright.text.tokenizer import Tokenizer


class StopMatch(NamedTuple):
    """A stop string was found.

    Attributes:
        stop: which one.
        text: the sequence's text, cut before the stop string (or after it, if asked for).
        num_tokens: tokens of the sequence up to and including the one that completed the stop
            string; any that were appended after it do not belong to the output.
    """

    stop: str
    text: str
    num_tokens: int


class StopStringChecker:
    """Watches one sequence for stop strings.

    The stop string that is completed first wins, character by character, so that token borders
    do not matter; of several completed by the same character, the longest. Characters that are not
    complete yet (half of a UTF-8 sequence) are not looked at.

    Args:
        tokenizer: decodes the sequence.
        params: `stop` (empty strings are ignored), `include_stop_str_in_output`, `min_tokens` (a
            stop string completed by one of the first min_tokens tokens does not count) and
            `skip_special_tokens` (what is left out of the text cannot match).
        keep: special tokens that are not left out.
        accepts: whether an output may end with this text; a stop string counts only then.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        keep: frozenset[int] = frozenset(),
        accepts: Callable[[str], bool] = lambda text: True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in params.stop if text]
        self._include = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._skip_special = params.skip_special_tokens
        self._keep = keep
        self._accepts = accepts
        self._stream = open_text_stream(
            tokenizer, skip_special_tokens=self._skip_special, keep=keep
        )
        self._reach = max(map(len, self._stop), default=1) - 1  # chars a match may need from before
        self._ids: list[int] = []
        # The text's end: `_settled` never changes again, `_open` may still be replaced.
        self._settled = ""  # at most `_reach` characters
        self._open = ""
        self._open_start = 0  # characters of text before `_open`

    def append(self, token_ids: Sequence[int]) -> StopMatch | None:
        """Take the next tokens; return the match if the text now contains a stop string.

        After a match the checker is finished: do not append again.
        """
        for token_id in token_ids:
            self._ids.append(token_id)
            num_replaced, new = self._stream.push(token_id)
            if num_replaced:
                self._open = self._open[: len(self._open) - num_replaced]
            num_old = len(self._open)
            self._open += new
            if new and len(self._ids) > self._min_tokens:
                match = self._find(num_old)
                if match is not None and self._accepts(match.text):
                    return match
            if not self._stream.is_open:
                self._settle()
        return None

    def _settle(self) -> None:
        self._open_start += len(self._open)
        if self._reach:
            self._settled = (self._settled + self._open)[-self._reach :]
        self._open = ""

    def _find(self, num_old: int) -> StopMatch | None:
        """Look for a stop string that ends in `_open[num_old:]`."""
        begin = max(0, len(self._settled) + num_old - self._reach)
        # Only the part that a new match can touch; `_open` can be long while it is unsettled.
        if begin < len(self._settled):
            window = self._settled[begin:] + self._open
        else:
            window = self._open[begin - len(self._settled) :]
        window_start = self._open_start - len(self._settled) + begin
        num_seen = len(self._settled) + num_old - begin
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            at = window.find(stop, max(0, num_seen - len(stop) + 1))
            if at >= 0 and (best is None or (at + len(stop), at) < best[:2]):
                best = (at + len(stop), at, stop)
        if best is None:
            return None
        return self._match(best[2], window_start + best[1])

    def _match(self, stop: str, start: int) -> StopMatch | None:
        text = self._tokenizer.decode(
            self._ids, skip_special_tokens=self._skip_special, keep=self._keep
        )
        if not text.startswith(stop, start):
            # Only where decoding is not exact (see `WindowStream`): trust the full text.
            start = text.find(stop)
            if start < 0:
                return None
        end = start + len(stop) if self._include else start
        return StopMatch(stop, text[:end], len(self._ids))

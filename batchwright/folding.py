"""Folding: rows that ask for the same computation as another row are answered with its result.

Only what is determined by the row itself is folded: greedy rows, rows with a seed of their own,
scores and embeddings. A row that draws with noise of its own (temperature above 0 and no seed)
never is, however many equal rows there are.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable
from operator import attrgetter

from batchwright.request import (
    Completion,
    FinishReason,
    Request,
    Result,
    SamplingParams,
    Task,
    TokenLogprob,
)

MAX_RECENT_RESULTS = 4096
MAX_RECENT_BYTES = 64 * 2**20

_PARAMS = attrgetter(
    *(f.name for f in dataclasses.fields(SamplingParams) if f.name != "logit_bias")
)
_OTHER_FIELDS = {"id", "prompt", "prompt_token_ids", "params", "parts"}
_REST = attrgetter(*(f.name for f in dataclasses.fields(Request) if f.name not in _OTHER_FIELDS))


def fold_key(request: Request) -> Hashable | None:
    """What determines a request's result; None if it has randomness of its own."""
    params = request.params
    if request.task is Task.GENERATE and params.temperature != 0.0 and params.seed is None:
        return None
    bias = tuple(params.logit_bias.items())  # equal ones have nearly always the same order
    return request.prompt_token_ids.tobytes(), _PARAMS(params), bias, _REST(request)


def answer_as(request: Request, result: Result) -> Result:
    """The result of an identical request, as the result of this one."""
    return dataclasses.replace(
        result,
        request_id=request.id,
        prompt=request.prompt,
        outputs=[dataclasses.replace(output) for output in result.outputs],
        num_cached_tokens=len(result.prompt_token_ids),
    )


class Folding:
    """Who follows whom, and results that were finished recently.

    The first of several identical requests in flight is the leader; the engine runs it and the
    others wait for its result.

    Args:
        max_results, max_bytes: what is kept of finished requests, the last used.
    """

    def __init__(
        self, max_results: int = MAX_RECENT_RESULTS, max_bytes: int = MAX_RECENT_BYTES
    ) -> None:
        self._max_results = max_results
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._recent: OrderedDict[Hashable, tuple[Result, int]] = OrderedDict()
        self._leaders: dict[Hashable, str] = {}
        self._keys: dict[str, Hashable] = {}  # of leaders
        self._followers: dict[str, dict[str, Request]] = {}  # by their leader, in order
        self._leader_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._leader_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._leader_of

    def recall(self, key: Hashable) -> Result | None:
        """The result of an identical request that finished recently."""
        entry = self._recent.get(key)
        if entry is None:
            return None
        self._recent.move_to_end(key)
        return entry[0]

    def follow(self, key: Hashable, request: Request) -> bool:
        """Let a request wait for an identical one in flight; False: there is none."""
        leader = self._leaders.get(key)
        if leader is None:
            return False
        self._followers.setdefault(leader, {})[request.id] = request
        self._leader_of[request.id] = leader
        return True

    def lead(self, key: Hashable, request_id: str) -> None:
        """Later requests with this key can follow this one."""
        self._leaders[key] = request_id
        self._keys[request_id] = key

    def followers(self, request_id: str) -> list[Request]:
        """Requests that wait for the result of this one."""
        return list(self._followers.get(request_id, {}).values())

    def leave(self, request_id: str) -> Request:
        """A follower does not wait any more."""
        return self._followers[self._leader_of.pop(request_id)].pop(request_id)

    def hand_over(self, request_id: str) -> Request | None:
        """A leader leaves: its first follower takes its place; None if it has none."""
        followers = self._followers.pop(request_id, {})
        key = self._keys.pop(request_id, None)
        if not followers:
            self._leaders.pop(key, None)
            return None
        heir = followers.pop(next(iter(followers)))
        del self._leader_of[heir.id]
        self.lead(key, heir.id)
        self._followers[heir.id] = followers
        self._leader_of.update(dict.fromkeys(followers, heir.id))
        return heir

    def close(self, request_id: str, result: Result) -> None:
        """A leader has its result, which its followers have got; sound ones are kept a while."""
        for follower in self._followers.pop(request_id, {}):
            del self._leader_of[follower]
        key = self._keys.pop(request_id, None)
        if key is None:
            return
        del self._leaders[key]
        is_cancelled = any(o.finish_reason is FinishReason.CANCELLED for o in result.outputs)
        if result.error is None and not is_cancelled:
            self._keep(key, result)

    def _keep(self, key: Hashable, result: Result) -> None:
        size = _num_bytes(result)
        self._recent[key] = (result, size)
        self._num_bytes += size
        while len(self._recent) > self._max_results or self._num_bytes > self._max_bytes:
            _, (_, freed) = self._recent.popitem(last=False)
            self._num_bytes -= freed


def _num_bytes(result: Result) -> int:
    """About what a kept result and its key take."""
    size = 1000 + 16 * len(result.prompt_token_ids) + sum(map(_completion_bytes, result.outputs))
    size += _logprob_bytes(result.prompt_logprobs)
    if result.score is not None:
        size += result.score.token_logprobs.nbytes
    if result.embedding is not None:
        size += result.embedding.nbytes
    return size


def _completion_bytes(output: Completion) -> int:
    return 300 + 4 * len(output.text) + 36 * len(output.token_ids) + _logprob_bytes(output.logprobs)


def _logprob_bytes(entries: list[TokenLogprob] | list[TokenLogprob | None] | None) -> int:
    return sum(200 + 150 * len(entry.top) for entry in entries or () if entry is not None)

"""RowQueue: the rows that no replica has yet, and which of them each replica gets next.

Rows are put in an order that keeps those with a common prefix together, and the order is cut into
as many spans as there are replicas, of about equal work. A replica takes from the front of its own
span, so a prefix is computed by one replica, or by two where a cut goes through its rows. Cuts are
made where work that is done twice and work that is unevenly divided are least together; both are
counted in tokens. A replica whose span is empty takes the second half of the largest one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from batchwright.plan.job_tree import Float64Array, build_job_tree
from batchwright.plan.order import JobFacts, OrderFunction
from batchwright.plan.orders.prefix_dfs import prefix_dfs
from batchwright.request import DEFAULT_MAX_TOKENS, Int32Array, Request, Task

NEW_SHARE = 0.25
"""Rows are divided anew when the new ones reach this share of those that were divided."""

OUTPUT_WEIGHT = 2
"""Tokens of a prompt that take as long as one of output, about: those go through the model one by
one and are drawn."""


@dataclass(eq=False, slots=True)
class Row:
    """A request that waits, or is with a replica.

    Attributes:
        arrival: when it came, counted in rows.
        num_own: prompt tokens that the row before it in the order does not have.
        output: tokens that are expected of it.
        num_deaths: replicas that died while it ran there.
    """

    request: Request
    arrival: int
    output: float
    num_own: float = 0.0
    num_deaths: int = 0

    @property
    def work(self) -> float:
        """What it takes, in prompt tokens."""
        return self.num_own + OUTPUT_WEIGHT * self.output


class RowQueue:
    """See the module docstring.

    Args:
        num_replicas: numbered from 0.
        block_size: tokens of a block; rows share whole blocks.
        order: one that keeps prefixes together, or longest_first.
        in_turns: neighbours in the order go to different replicas, for orders by length.
    """

    def __init__(
        self,
        num_replicas: int,
        *,
        block_size: int,
        order: OrderFunction = prefix_dfs,
        in_turns: bool = False,
    ) -> None:
        self._block_size = block_size
        self._order, self._in_turns = order, in_turns
        self._spans: dict[int, deque[Row]] = {number: deque() for number in range(num_replicas)}
        self._new: list[Row] = []
        self._rows: dict[str, Row] = {}  # all that wait, in no order
        self._num_divided = 0
        self._is_due = False

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    @property
    def rows(self) -> Collection[Row]:
        """All that wait."""
        return self._rows.values()

    def add(self, row: Row) -> None:
        """A row waits."""
        self._rows[row.request.id] = row
        self._new.append(row)

    def add_again(self, rows: Iterable[Row]) -> None:
        """Rows wait again, among the others as if they had never been taken."""
        for row in rows:
            self.add(row)
        self._is_due = True

    def remove(self, request_id: str) -> Row:
        """A row waits no longer."""
        return self._rows.pop(request_id)

    def clear(self) -> None:
        """No row waits any longer."""
        self._rows.clear()
        self._new.clear()
        for span in self._spans.values():
            span.clear()

    def drop_replica(self, number: int) -> None:
        """A replica takes nothing any more; the others share its span."""
        del self._spans[number]
        self._is_due = True

    def take(self, number: int, loads: dict[int, float]) -> Row | None:
        """The next row for a replica; None: nothing waits.

        Args:
            loads: of each replica the work that it has already.
        """
        if self._is_due or len(self._new) > NEW_SHARE * self._num_divided:
            self._divide(loads)
        while self._rows:
            own = self._spans[number]
            if not own and not self._take_over(number):
                self._divide(loads)  # only new rows are left
            while own:
                row = own.popleft()
                self._num_divided -= 1
                if self._rows.get(row.request.id) is row:
                    del self._rows[row.request.id]
                    return row
        return None

    # Inside -----------------------------------------------------------------------------------

    def _divide(self, loads: dict[int, float]) -> None:
        """Order all rows that wait and give each replica a span, a small one if it has much."""
        rows = sorted(self._rows.values(), key=lambda row: row.arrival)
        rows = [rows[line] for line in self._ordered(rows)]
        shared = _shared_before(rows, self._block_size)
        for row, num_shared in zip(rows, shared.tolist(), strict=True):
            row.num_own = max(row.request.num_prompt_tokens - num_shared, 1)
        self._new, self._is_due, self._num_divided = [], False, len(rows)
        if self._in_turns:
            first = sorted(self._spans, key=lambda number: loads.get(number, 0.0))
            for turn, number in enumerate(first):
                self._spans[number] = deque(rows[turn :: len(first)])
            return
        work = np.array([row.work for row in rows])
        has = np.array([loads.get(number, 0.0) for number in self._spans])
        lacks = np.maximum((work.sum() + has.sum()) / len(has) - has, 0.0)
        ends = np.cumsum(lacks)[:-1] * (work.sum() / max(lacks.sum(), 1e-9))
        cuts = [0, *_cuts(work, shared, ends), len(rows)]
        for number, start, end in zip(self._spans, cuts[:-1], cuts[1:], strict=True):
            self._spans[number] = deque(rows[start:end])

    def _ordered(self, rows: Sequence[Row]) -> list[int]:
        prompts = [_first_prompt(row.request) for row in rows]
        offsets = np.cumsum([0, *map(len, prompts)])
        numbers: dict[Hashable, int] = {}
        spaces = [numbers.setdefault(_namespace(row.request), len(numbers)) for row in rows]
        facts = JobFacts(
            num_prompt_tokens=np.diff(offsets),
            num_output_tokens=np.array([row.output for row in rows], np.float64),
            make_tree=lambda: build_job_tree(
                np.concatenate([np.empty(0, np.int32), *prompts]), offsets, np.array(spaces)
            ),
        )
        lines: list[int] = self._order(facts).rows.tolist()
        return lines

    def _take_over(self, number: int) -> bool:
        """Let a replica have the second half of the largest span; False: all are empty."""
        sizes = {other: sum(row.work for row in span) for other, span in self._spans.items()}
        largest = max(sizes, key=lambda other: sizes[other])
        rows = list(self._spans[largest])
        if not rows:
            return False
        shared = _shared_before(rows, self._block_size)
        (middle,) = _cuts(
            np.array([row.work for row in rows]), shared, np.array([0.5 * sizes[largest]])
        )
        middle = min(middle, len(rows) - 1)
        self._spans[largest], self._spans[number] = deque(rows[:middle]), deque(rows[middle:])
        return True


def expected_output(request: Request, max_model_len: int, used_share: float) -> float:
    """Output tokens of a request, if it uses this share of what it may have."""
    if request.parts:
        return sum(expected_output(part, max_model_len, used_share) for part in request.parts)
    if request.task is not Task.GENERATE:
        return 0.0
    params, room = request.params, max_model_len - request.num_prompt_tokens
    most = max(min(params.max_tokens or DEFAULT_MAX_TOKENS, room), 1)
    return params.n * max(used_share * most, params.least_output(most))


def _first_prompt(request: Request) -> Int32Array:
    return request.parts[0].prompt_token_ids if request.parts else request.prompt_token_ids


def _namespace(request: Request) -> Hashable:
    """What requests must have in common to share a prefix."""
    return request.namespace, request.layout and request.layout.prefix_key


def _shared_before(rows: Sequence[Row], block_size: int) -> Float64Array:
    """[num_rows] tokens, in whole blocks, that each row has in common with the one before it."""
    shared = np.zeros(len(rows))
    for line in range(1, len(rows)):
        one, other = rows[line - 1].request, rows[line].request
        if _namespace(one) != _namespace(other):
            continue
        first, second = _first_prompt(one), _first_prompt(other)
        most = min(len(first), len(second)) // block_size * block_size
        differ = np.flatnonzero(first[:most] != second[:most])
        num_equal = int(differ[0]) if len(differ) else most
        shared[line] = num_equal // block_size * block_size
    return shared


def _cuts(work: Float64Array, shared: Float64Array, ends: Float64Array) -> list[int]:
    """Lines at which spans begin, whose work from the first line on is about `ends`.

    Args:
        work: [num_rows].
        shared: [num_rows] work that is done twice if a span begins at the row.
        ends: [num_cuts], ascending.
    """
    before = np.concatenate(([0.0], np.cumsum(work)))
    twice = np.append(shared, 0.0)
    cuts, first = [], 0
    for end in ends.tolist():
        first += int(np.argmin(twice[first:] + np.abs(before[first:] - end)))
        cuts.append(first)
    return cuts

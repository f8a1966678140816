"""Synthetic workloads: rows of given lengths that share given prefixes, as planning keeps them.

No text and no model: token ids are numbers that make rows share what they shall share. A workload
is parts; each has a share of the rows, lengths, and a tree of prefixes. Rows come in random order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.errors import ConfigError
from batchwright.plan.job_rows import JobRows, RowColumns
from batchwright.request import Request, SamplingParams

Int64Array = npt.NDArray[np.int64]

MAX_TOKENS = 1_000_000
"""Longest prompt or output that may be asked for."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long things are: always `low`, evenly from `low` to `high`, or log-normal.

    Attributes:
        mean, sigma: of a log-normal distribution and of its logarithm; sigma 0: evenly.
    """

    low: int
    high: int
    mean: float = 0.0
    sigma: float = 0.0

    def draw(self, count: int, rng: np.random.Generator) -> Int64Array:
        """[count] int64."""
        if not self.sigma:
            return rng.integers(self.low, self.high + 1, count)
        logs = rng.normal(np.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        return np.clip(np.rint(np.exp(logs)), self.low, self.high).astype(np.int64)


def parse_lengths(text: str) -> Lengths:
    """`512`; `100-900`, evenly; `400~0.7`, log-normal of mean 400, its logarithm having sigma 0.7.

    A log-normal length is at most eight times the mean.

    Raises:
        ConfigError: anything else, or a length out of range.
    """
    match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7})|~(\d(?:\.\d+)?))?", text.strip())
    if match:
        first, last, sigma = int(match[1]), match[2], float(match[3] or 0)
        high = int(last) if last else 8 * first if sigma else first
        if 1 <= first <= high <= MAX_TOKENS:
            return Lengths(1 if sigma else first, high, first, sigma)
    raise ConfigError(
        f"{text!r:.60} is no length between 1 and {MAX_TOKENS:,}; write it like 512, 100-900 "
        "(evenly in between) or 400~0.7 (log-normal: mean, and sigma of the logarithm)"
    )


class Level(NamedTuple):
    """One level of a tree of prefixes: below every node above, so many of so many tokens."""

    fan_out: int
    num_tokens: int


def parse_tree(text: str) -> tuple[Level, ...]:
    """`8x1000,16x200`: 8 prefixes of 1,000 tokens, with 16 continuations of 200 tokens each.

    Raises:
        ConfigError: anything else.
    """
    levels = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", part.strip())
        if not match or not int(match[1]) or not int(match[2]):
            raise ConfigError(
                f"{part!r:.60} is no level of prefixes; write levels like 8x1000,16x200: 8 of "
                "1,000 tokens, below each of them 16 of 200"
            )
        levels.append(Level(int(match[1]), int(match[2])))
    return tuple(levels)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one kind.

    Attributes:
        share: of the workload's rows.
        prompt: tokens of a prompt after the prefix.
        output: true output tokens.
        tree: prefixes; rows are spread evenly over its leaves. Empty: nothing is shared.
    """

    prompt: Lengths
    output: Lengths
    tree: tuple[Level, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Workload:
    """Rows and their true output lengths, [num_rows]."""

    rows: JobRows
    columns: RowColumns
    output: Int64Array


class Named(NamedTuple):
    """A workload that has a name.

    Attributes:
        about: what its rows are like.
        num_rows: unless another number is asked for.
    """

    about: str
    parts: tuple[Part, ...]
    num_rows: int


NAMED = {
    "chat": Named(
        "questions under one system prompt of 192 tokens, answers of some hundred tokens",
        (Part(parse_lengths("200~0.8"), parse_lengths("300~0.7"), (Level(1, 192),)),),
        2000,
    ),
    "documents": Named(
        "16 questions to each of 400 documents of 2,000 tokens, answers of 100",
        (Part(parse_lengths("200"), parse_lengths("100"), (Level(400, 2000),)),),
        6400,
    ),
    "reasoning": Named(
        "short prompts, outputs of thousands of tokens, some very long",
        (Part(parse_lengths("200~0.5"), parse_lengths("2000~0.8")),),
        1000,
    ),
    "mixed": Named(
        "half read shared documents and say little, half write long after short prompts",
        (
            Part(parse_lengths("300"), parse_lengths("50~0.5"), (Level(125, 1500),), share=0.5),
            Part(parse_lengths("150~0.5"), parse_lengths("800~0.8"), share=0.5),
        ),
        4000,
    ),
}
"""Workloads by name."""


def named_workload(name: str) -> Named:
    """A workload of NAMED.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in NAMED:
        raise ConfigError(f"workload is {name!r:.60}, must be one of {', '.join(NAMED)}")
    return NAMED[name]


def make_workload(
    parts: tuple[Part, ...], num_rows: int, *, seed: int = 0, max_tokens: int | None = None
) -> Workload:
    """Draw a workload; the same arguments make the same rows.

    Args:
        max_tokens: what every row allows itself; its true output is cut there. None: each allows
            as much as it will use.
    """
    rng = np.random.default_rng(seed)
    shares = np.array([part.share for part in parts])
    counts = np.floor(np.cumsum(shares) / shares.sum() * num_rows + 0.5).astype(np.int64)
    counts = np.diff(counts, prepend=0)
    prompts: list[npt.NDArray[np.int32]] = []
    outputs: list[int] = []
    next_id = 0
    for part, count in zip(parts, counts.tolist(), strict=True):
        prefixes, next_id = _prefixes(part.tree, next_id)
        own, output = part.prompt.draw(count, rng), part.output.draw(count, rng)
        for index in range(count):
            mine = np.full(own[index], next_id + index, np.int32)
            prompts.append(np.concatenate((prefixes[index % len(prefixes)], mine)))
        outputs += output.tolist()
        next_id += count
    true = np.array(outputs, np.int64)
    limits = true if max_tokens is None else np.full(num_rows, max_tokens)
    true = np.minimum(true, limits)
    rows, order = JobRows(), rng.permutation(num_rows)
    for place, row in enumerate(order.tolist()):
        limit = int(limits[row])
        request = Request(
            id=str(place),
            prompt_token_ids=prompts[row],
            params=SamplingParams(max_tokens=limit, ignore_eos=True, seed=place),
        )
        rows.add(request, len(prompts[row]) + limit, place)
    return Workload(rows, rows.columns(), true[order])


def _prefixes(tree: tuple[Level, ...], next_id: int) -> tuple[list[npt.NDArray[np.int32]], int]:
    """Token ids of every leaf's path, and the first id that is not used."""
    paths: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)]
    for level in tree:
        longer = []
        for path in paths:
            for _ in range(level.fan_out):
                longer.append(np.concatenate((path, np.full(level.num_tokens, next_id, np.int32))))
                next_id += 1
        paths = longer
    return paths, next_id

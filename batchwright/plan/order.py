"""What an order is made from, and what it is: JobFacts and Order.

Every file of `plan/orders/` holds one function of its own name, from JobFacts to Order. It is pure:
the same facts give the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from batchwright.plan.cost import CostModel
from batchwright.plan.job_tree import Float64Array, Int64Array, JobTree
from batchwright.request import Int32Array
from batchwright.techniques import find


class Rates(NamedTuple):
    """What tokens cost; only ratios matter to an order.

    Attributes:
        compute_s_per_token: products with the weights.
        compute_s_per_pair: attention of a prompt, per pair of its tokens.
        memory_s_per_key: reading one token's keys and values while decoding.
        rows_per_load: rows that share keys for which these are read once, at most; 1: none.
    """

    compute_s_per_token: float = 1.0
    compute_s_per_pair: float = 0.0
    memory_s_per_key: float = 1.0
    rows_per_load: int = 1


EQUAL_RATES = Rates()


def rates_of(cost: CostModel) -> Rates:
    """What tokens cost in large steps of a model on a machine."""
    hardware, shape = cost.hardware, cost.shape
    kv_bytes = shape.kv_elements_per_token() * cost.kv_bytes
    return Rates(
        compute_s_per_token=shape.layer_flops_per_token / hardware.layers.best + hardware.token_s,
        # A prompt of p tokens has about p^2 / 2 pairs.
        compute_s_per_pair=shape.attention_flops_per_key / hardware.attention_flops_per_s / 2,
        memory_s_per_key=kv_bytes / hardware.kv_bytes_per_s,
        rows_per_load=cost.rows_per_load,
    )


@dataclass(frozen=True, eq=False)
class JobFacts:
    """What is known of the rows to be ordered.

    Attributes:
        num_prompt_tokens: [num_rows] int64.
        num_output_tokens: [num_rows] float64, as many as are expected.
        make_tree: makes the prefix tree of the rows, its depths in tokens, in whole blocks.
        continues: a row whose prefix is resident already; None: nothing is.
        rates: what tokens cost.
    """

    num_prompt_tokens: Int64Array
    num_output_tokens: Float64Array
    make_tree: Callable[[], JobTree] = field(repr=False)
    continues: int | None = None
    rates: Rates = EQUAL_RATES

    @property
    def num_rows(self) -> int:
        """Rows to be ordered."""
        return len(self.num_prompt_tokens)

    @cached_property
    def tree(self) -> JobTree:
        """The prefix tree, made when an order first asks for it."""
        return self.make_tree()

    @property
    def arrival(self) -> Int64Array:
        """[num_rows] int64 to sort by: rows as they came, after the row to continue with."""
        arrival = np.arange(self.num_rows)
        if self.continues is not None:
            arrival[self.continues] = -1
        return arrival


class Units(NamedTuple):
    """Runs of rows of an Order that are kept together, densest first.

    Attributes:
        size: [num_units] int64, rows; they add up to all rows.
        density: [num_units] float64, seconds of compute per second of memory traffic, not rising.
        mean_density: of the whole job.
        kv_tokens: [num_rows] float64, KV that each row of the order holds on average, in tokens.
        prompt_share: prompt tokens computed, per token of KV that is held for one Step.
        kv_per_slot: KV tokens that a running row holds on average; rows that run longer count more.
    """

    size: Int64Array
    density: Float64Array
    mean_density: float
    kv_tokens: Float64Array
    prompt_share: float = 0.0
    kv_per_slot: float = math.inf


class Order(NamedTuple):
    """In which order rows start.

    Attributes:
        rows: [num_rows] int32, every row once.
        units: if given, rows are started from both ends at once (`plan/dual_scan.py`).
    """

    rows: Int32Array
    units: Units | None = None


OrderFunction = Callable[[JobFacts], Order]


def find_order(name: str) -> OrderFunction:
    """The function of a file of `plan/orders`.

    Raises:
        ConfigError: there is no such file.
    """
    function: OrderFunction = getattr(find("plan.orders", name), name)
    return function

"""sim_job: what `batchwright sim` simulates: a job, a model's sizes and a machine, put together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from batchwright import techniques
from batchwright.config import AUTO_ORDER
from batchwright.errors import ConfigError
from batchwright.job.rows import InputRow, RowError
from batchwright.job.runner import HORIZON_ROWS
from batchwright.job.validate import ParsedRow
from batchwright.kv.groups import BLOCK_SIZE, KVGroup, blocks_per_sequence, split_blocks
from batchwright.order_runs import OrderRun, run_orders
from batchwright.plan.cost import CostModel
from batchwright.plan.estimate import folded_rows, output_lengths
from batchwright.plan.hardware import device_hardware, find_device, kv_memory_bytes
from batchwright.plan.job_rows import JobRows
from batchwright.plan.more_cores import BANDWIDTH, CoreLaw
from batchwright.plan.order import OrderFunction, find_order
from batchwright.plan.orders.fcfs import fcfs
from batchwright.plan.shape import ModelShape
from batchwright.simulate import EngineSizes
from batchwright.synthetic import Workload

if TYPE_CHECKING:
    from batchwright.opened_model import OpenedModel

HALF = 2
"""Bytes of an element of weights, keys and values on a GPU."""

MAX_NUM_SEQS = 1024
MAX_NUM_BATCHED_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A pretended machine with a model on it.

    Attributes:
        engine: its sizes; its order is left aside.
        name: of the machine.
    """

    name: str
    engine: EngineSizes
    cost: CostModel


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the user has said of the engine; None: what is usual.

    Attributes:
        kv_tokens: most tokens of keys and values.
        swap_space_bytes: of the host's memory, for those that the device has no room for.
    """

    kv_tokens: int | None = None
    swap_space_bytes: int = 0
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    prefix_sharing: bool = True


def device_machine(
    name: str,
    shape: ModelShape,
    workload: Workload,
    limits: EngineLimits,
    *,
    num_devices: int = 1,
    overlap: float = 0.0,
) -> Machine:
    """A device by its data sheet, with 2-byte weights, keys and values.

    Raises:
        ConfigError: no such device, the weights do not fit, or a row does not.
    """
    profile = find_device(name)
    hardware = device_hardware(profile, shape, HALF, num_devices=num_devices, overlap=overlap)
    num_seqs = limits.max_num_seqs or MAX_NUM_SEQS
    num_tokens = max(limits.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS, num_seqs)
    columns = workload.columns
    longest = int((columns.num_prompt + columns.most_output).max(initial=1))
    groups = split_blocks(
        int(kv_memory_bytes(profile, shape, HALF, num_devices=num_devices)),
        [one.window for one in shape.attention],
        [one.kv_elements * BLOCK_SIZE * HALF for one in shape.attention],
        block_size=BLOCK_SIZE,
        max_model_len=longest,
        max_chunk=num_tokens,
    )
    if limits.kv_tokens is not None:
        most = limits.kv_tokens // BLOCK_SIZE
        groups = [KVGroup(group.window, min(group.num_blocks, most)) for group in groups]
    cost = CostModel(shape, hardware, HALF, HALF)
    if limits.swap_space_bytes and len(groups) == 1 and groups[0].window is None and cost.swap_pays:
        block_bytes = shape.attention[0].kv_elements * BLOCK_SIZE * HALF
        num_host_blocks = limits.swap_space_bytes // block_bytes
        groups = [replace(group, num_host_blocks=num_host_blocks) for group in groups]
    _check_room(groups, longest, num_tokens)
    engine = EngineSizes(
        groups=groups,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_tokens,
        max_model_len=longest,
        prefix_sharing=limits.prefix_sharing,
        horizon=HORIZON_ROWS,
    )
    return Machine(name=hardware.name, engine=engine, cost=cost)


def _check_room(groups: Sequence[KVGroup], longest: int, max_chunk: int) -> None:
    for group in groups:
        if blocks_per_sequence(group.window, longest, BLOCK_SIZE, max_chunk) > group.num_blocks:
            raise ConfigError(
                f"the longest row may reach {longest:,} tokens, keys and values have room for "
                f"{group.num_blocks * BLOCK_SIZE:,}; give more room (--kv-tokens, --devices) or "
                "shorter rows"
            )


def this_machine(model: OpenedModel, longest: int, cost: CostModel | None = None) -> Machine:
    """The machine at hand, measured now, with the model's own settings.

    Args:
        cost: of the model on another machine, instead.
    Raises:
        ConfigError: a row of `longest` tokens does not fit.
    """
    from batchwright.job.plan_job import cost_model, engine_sizes

    engine = engine_sizes(model, fcfs)
    _check_room(engine.groups, longest, engine.max_num_batched_tokens)
    engine = replace(engine, max_model_len=max(engine.max_model_len, longest))
    cost = cost or cost_model(model)
    return Machine(name=cost.hardware.name, engine=engine, cost=cost)


def cost_with_cores(
    model: OpenedModel, num_cores: int, memory_bytes_per_s: float | None = None
) -> CostModel:
    """What the model would cost on this machine if it had more cores; see `plan/more_cores.py`.

    Raises:
        ConfigError: there is no second core to learn from.
    """
    from batchwright.job.plan_job import cost_model

    if len(os.sched_getaffinity(0)) < 2 or model.config.device != "cpu":
        raise ConfigError("--cores is learned from one and two cores of this machine's processor")
    one, two = (
        cost_model(replace(model, config=replace(model.config, num_threads=num_threads)))
        for num_threads in (1, 2)
    )
    law = CoreLaw(
        one=one.hardware,
        two=two.hardware,
        weight_bytes=one.weight_bytes,
        memory_bytes_per_s=memory_bytes_per_s or BANDWIDTH,
    )
    return replace(one, hardware=law.hardware(num_cores))


def read_workload(
    rows: Iterator[InputRow | RowError],
    model: OpenedModel,
    *,
    check: Callable[[ParsedRow], None] = lambda row: None,
) -> Workload:
    """The rows of a file that can run and are no duplicates, with the likely output lengths.

    Raises:
        InputError, ResourceError: the input cannot be read, or its tokens have no room.
    """
    from batchwright.job.plan_rows import read_rows
    from batchwright.limits import ModelLimits
    from batchwright.structured.compile import GrammarCompiler

    into, vocab_size = JobRows(), model.shape.vocab_size
    grammars = GrammarCompiler(model.tokenizer, vocab_size)
    try:
        read_rows(
            rows,
            into,
            model.tokenizer,
            ModelLimits(model.config.max_model_len, vocab_size),
            grammars=grammars,
            check=check,
        )
    finally:
        grammars.close()
    columns = into.columns()
    return Workload(into, columns, output_lengths(columns, None).likely)


def distinct_rows(workload: Workload) -> np.ndarray:
    """Indices of the rows that are computed; the others are answered by identical ones."""
    return np.flatnonzero(~folded_rows(workload.columns, HORIZON_ROWS))


def orders_for(names: Sequence[str], machine: Machine) -> list[tuple[str, OrderFunction]]:
    """The orders of these names; none: all there are, and auto.

    Raises:
        ConfigError: there is no such order.
    """
    from batchwright.order_trial import Trial
    from batchwright.plan.auto_order import AutoOrder, Measured
    from batchwright.plan.order import rates_of

    def measured() -> Measured:
        return Measured(Trial(machine.engine, machine.cost), rates_of(machine.cost), 0.0)

    known = techniques.names("plan.orders")
    wanted = names or [*sorted(known, key=lambda name: (name != "fcfs", name)), AUTO_ORDER]
    found: list[tuple[str, OrderFunction]] = []
    for name in dict.fromkeys(wanted):
        if name == AUTO_ORDER:
            found.append(
                (name, AutoOrder(measured, known, measure_s=0.0, token_s=0.0, is_told=False))
            )
        else:
            found.append((name, find_order(name)))
    return found


def simulate_orders(workload: Workload, machine: Machine, names: Sequence[str]) -> list[OrderRun]:
    """Run the workload in each order.

    Raises:
        ConfigError: there is no such order, or no row to run.
    """
    if not len(workload.columns):
        raise ConfigError("no row of the input can run; batchwright validate says why")
    orders = orders_for(names, machine)
    return run_orders(
        workload.rows,
        workload.columns,
        workload.output,
        orders,
        engine=machine.engine,
        cost=machine.cost,
        chosen=distinct_rows(workload),
    )


def facts_of(workload: Workload, machine: Machine, *, job: str, shape_name: str) -> dict[str, Any]:
    """What was simulated, in numbers, for JSON and, put into words, for people."""
    columns, hardware = workload.columns, machine.cost.hardware
    return {
        "job": job,
        "rows": len(columns),
        "prompt_tokens": int(columns.num_prompt.sum()),
        "output_tokens": int((columns.num_samples * workload.output).sum()),
        "model": shape_name,
        "parameters": machine.cost.shape.num_params,
        "machine": machine.name,
        "overlap": hardware.overlap,
        "kv_tokens": min(group.num_blocks for group in machine.engine.groups)
        * machine.engine.block_size,
        "max_num_seqs": machine.engine.max_num_seqs,
        "max_num_batched_tokens": machine.engine.max_num_batched_tokens,
    }

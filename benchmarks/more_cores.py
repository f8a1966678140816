"""What would more cores give, as threads of one process or as replicas?  A prediction.

    python -m benchmarks.more_cores [--rounds 5] [--scale 1] [--check SCALING.json ...] [--out JSON]

SmolLM2. The cost model of this machine is measured with one and with two threads, in turns;
`batchwright/plan/more_cores.py` fits a law to both, and the workloads W1 to W4 are simulated with
the real scheduler: one engine with all threads, or replicas whose rows are dealt by the real queue,
the slowest of which tells the time. Nothing here was run on more than two cores. `--check` says
what the same simulation predicts of the runs that `benchmarks.scaling` measured.

Every round has a law of its own; their spread is shown, because a small error in what one and two
threads take is a large one for 64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchwright.bench.workloads import WorkRequest, build_workloads, plain_encoder
from batchwright.data_parallel.row_queue import Row, RowQueue
from batchwright.exec.machine_cost import machine_cost
from batchwright.kv.groups import KVGroup
from batchwright.opened_model import OpenedModel, open_model
from batchwright.plan.cost import CostModel, Hardware, RateCurve
from batchwright.plan.more_cores import BANDWIDTH, CoreLaw
from batchwright.plan.orders.prefix_dfs import prefix_dfs
from batchwright.plan.shape import ModelShape
from batchwright.plan.shared_keys import StepCosts
from batchwright.request import Request, SamplingParams
from batchwright.sequence import Sequence as TokenSequence
from batchwright.simulate import EngineSizes, Simulation
from batchwright.weights.forms import stored_forms
from benchmarks.machine import describe_commit, describe_machine, describe_versions

CORES = (1, 2, 4, 8, 16, 32, 64)
PER_REPLICA = (1, 4)
ENGINE = EngineSizes(
    groups=[KVGroup(None, 2**17)],  # memory is not what is asked about
    block_size=32,
    max_num_seqs=256,
    max_num_batched_tokens=512,
    max_model_len=8192,
    order=prefix_dfs,
)


def main() -> None:
    """Measure, fit, simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1)
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes/s of memory")
    parser.add_argument("--check", type=Path, nargs="*", default=[])
    parser.add_argument("--measured", type=Path, help="--out of an earlier run: measure nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = open_model("smollm2", {"device": "cpu"})
    if options.measured:
        costs = _read_costs(options.measured, model.shape)
    else:
        costs = [
            [_measure(model, num_threads) for num_threads in (1, 2)] for _ in range(options.rounds)
        ]
    encode = plain_encoder(model.tokenizer.encode)
    curves = Curves(costs, options.bandwidth)
    result: dict[str, Any] = {"scale": options.scale, "bandwidth": options.bandwidth}
    result["measured"] = [
        [{name: value for name, value in asdict(cost).items() if name != "shape"} for cost in pair]
        for pair in costs
    ]
    result["predicted_s"] = curves.predict(build_workloads(encode, scale=options.scale))
    result["checks"] = [
        curves.check(json.loads(path.read_text()), encode) for path in options.check
    ]
    result["machine"] = describe_machine()
    result["versions"] = describe_versions("torch", "numpy", "numba")
    result["commit"] = describe_commit()
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _measure(model: OpenedModel, num_threads: int) -> CostModel:
    return machine_cost(
        model.checkpoint.config,
        model.shape,
        replace(model.config, num_threads=num_threads),
        stored_forms(model.checkpoint),
    )


def _read_costs(path: Path, shape: ModelShape) -> list[list[CostModel]]:
    def read(values: dict[str, Any]) -> CostModel:
        hardware = dict(values.pop("hardware"))
        for curve in ("layers", "head"):
            hardware[curve] = RateCurve(**{k: tuple(v) for k, v in hardware[curve].items()})
        return CostModel(shape, Hardware(**hardware), **values)

    return [[read(one) for one in pair] for pair in json.loads(path.read_text())["measured"]]


class Curves:
    """Simulated times by the law of each round."""

    def __init__(self, costs: list[list[CostModel]], bandwidth: float) -> None:
        self._costs = [one for one, _ in costs]
        self._laws = [
            CoreLaw(
                one=one.hardware,
                two=two.hardware,
                weight_bytes=one.weight_bytes,
                memory_bytes_per_s=bandwidth,
            )
            for one, two in costs
        ]

    def seconds(
        self, rows: Sequence[WorkRequest], num_threads: int, num_replicas: int
    ) -> list[float]:
        """By the law of each round."""
        parts = dealt(rows, num_replicas)
        return [
            max(
                simulate(part, replace(cost, hardware=law.hardware(num_threads, num_replicas)))
                for part in parts
            )
            for cost, law in zip(self._costs, self._laws, strict=True)
        ]

    def predict(self, workloads: dict[str, list[WorkRequest]]) -> dict[str, Any]:
        """Seconds by workload and way, printed as speed-ups over one thread."""
        found: dict[str, Any] = {}
        for name, rows in workloads.items():
            base = self.seconds(rows, 1, 1)
            print(f"{name}: {len(rows)} rows, 1 thread {_spread(base, '{:.0f}')} s; times as fast:")
            found[name] = {"1 x 1": base}
            for cores in CORES[1:]:
                cells = []
                for each in (cores, *PER_REPLICA):
                    if each > cores or (each == cores and cells):
                        continue
                    times = self.seconds(rows, each, cores // each)
                    found[name][f"{cores // each} x {each}"] = times
                    gains = [first / then for first, then in zip(base, times, strict=True)]
                    cells.append(f"{cores // each:2} x {each:2}: {_spread(gains, '{:.1f}'):18}")
                print(f"  {cores:2} cores   {''.join(cells)}")
        return found

    def check(self, measured: dict[str, Any], encode: Any) -> dict[str, Any]:
        """Predicted and measured seconds of runs of `benchmarks.scaling`."""
        ways = {"1 thread": (1, 1), "2 threads": (2, 1), "2 replicas": (1, 2)}
        rounds, found = measured["rounds"], {}
        for name, rows in build_workloads(encode, scale=measured["scale"]).items():
            for way, (threads, replicas) in ways.items():
                times = [one[way]["seconds"].get(name) for one in rounds]
                if None in times:
                    continue
                predicted = self.seconds(rows, threads, replicas)
                found[f"{name}, {way}"] = {"predicted_s": predicted, "measured_s": times}
                print(
                    f"{name} x {measured['scale']}, {way:10}: predicted "
                    f"{_spread(predicted, '{:.1f}')} s, measured {_spread(times, '{:.1f}')} s"
                )
        return found


def dealt(rows: Sequence[WorkRequest], num_replicas: int) -> list[list[WorkRequest]]:
    """The rows of each replica, if every one took them as its work is done."""
    if num_replicas == 1:
        return [list(rows)]
    queue = RowQueue(num_replicas, block_size=ENGINE.block_size)
    for arrival, row in enumerate(rows):
        prompt = np.array(row.prompt_token_ids, np.int32)
        request = Request(id=str(arrival), prompt_token_ids=prompt)
        queue.add(Row(request, arrival, float(row.num_output_tokens)))
    parts: list[list[WorkRequest]] = [[] for _ in range(num_replicas)]
    loads = dict.fromkeys(range(num_replicas), 0.0)
    while True:
        number = min(loads, key=lambda number: loads[number])
        taken = queue.take(number, loads)
        if taken is None:
            return [part for part in parts if part]
        loads[number] += taken.work
        parts[number].append(rows[taken.arrival])


def simulate(rows: Sequence[WorkRequest], cost: CostModel) -> float:
    """Seconds of one engine."""
    run = Simulation(_sequences(rows), ENGINE, StepCosts(cost, ENGINE.block_size))
    run.run()
    return run.clock.now()


def _sequences(rows: Sequence[WorkRequest]) -> Iterator[TokenSequence]:
    for number, row in enumerate(rows):
        prompt = np.array(row.prompt_token_ids, np.int32)
        params = SamplingParams(ignore_eos=True)
        yield TokenSequence(
            request=Request(id=str(number), prompt_token_ids=prompt, params=params),
            order=number,
            sample_index=0,
            end_token_ids=(),
            noise_key=number,
            max_len=len(prompt) + row.num_output_tokens,
            token_ids=prompt,
        )


def _spread(values: Sequence[float], form: str) -> str:
    """The median, and the least and most."""
    middle, least, most = np.median(values), min(values), max(values)
    return f"{form.format(middle)} ({form.format(least)}-{form.format(most)})"


if __name__ == "__main__":
    main()

"""What do two processes with one thread each, which have a model together, lose against one process
with two threads on the same CPU?

    python -m benchmarks.tensor_parallel [--rounds 3] [--out JSON]

A Llama of 100 M random weights in fp32, greedy, in turns: rows that decode and rows that are nearly
all prompt. Both do the same arithmetic on the same cores, so what differs is what is sent (two sums
a layer, between processes of one machine over loopback), and what runs on rank 0 alone or on both
(norms, embeddings, drawing). A machine with several sockets or cards may gain; this one cannot.

Beside each time stands what the cost model says of it, calibrated before every round: with two
ranks it is charged for what they send (`plan/exchange.py`). Both are by the clock.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from batchwright.config import EngineConfig, ResolvedConfig
from batchwright.engine import Engine
from batchwright.exec.machine_cost import machine_cost
from batchwright.kv.groups import BLOCK_SIZE, KVGroup
from batchwright.llm import build_engine
from batchwright.models.layers import Linear
from batchwright.models.loader import build_empty
from batchwright.models.shape import read_shape
from batchwright.plan.cost import CostModel
from batchwright.plan.shared_keys import StepCosts
from batchwright.predict import families
from batchwright.request import Request, SamplingParams
from batchwright.simulate import EngineSizes, Simulation
from batchwright.synthetic import Part, make_workload, parse_lengths
from batchwright.weights.checkpoint import open_checkpoint
from batchwright.weights.forms import stored_forms
from benchmarks.machine import describe_commit, describe_machine, describe_versions

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 16000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
WORKLOADS = {  # rows, prompt tokens, output tokens
    "decode, 1 row": (1, 16, 65),
    "decode, 16 rows": (16, 16, 65),
    "decode, 64 rows": (64, 16, 33),
    "prompts of 512": (8, 512, 1),
}
WAYS = {
    "one process, two threads": {"num_threads": 2},
    "two processes, one thread each": {"num_threads": 1, "tensor_parallel_size": 2},
}


class _NoTokenizer:
    end_token_ids: Sequence[int] = ()

    def decode(self, ids: Sequence[int], **options: object) -> str:
        return ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        _write_model(Path(directory))
        times: dict[str, dict[str, list[float]]] = {
            workload: {way: [] for way in WAYS} for workload in WORKLOADS
        }
        predicted = copy.deepcopy(times)
        for number in range(options.rounds + 1):
            for way, settings in WAYS.items():
                cost, config = _cost(Path(directory), settings)
                engine, _ = build_engine(
                    open_checkpoint(Path(directory)),
                    _NoTokenizer(),  # type: ignore[arg-type]
                    EngineConfig(device="cpu", order="fcfs", kv_cache_bytes=2**29, **settings),
                )
                for workload in WORKLOADS:
                    seconds = _seconds(engine, *WORKLOADS[workload])
                    if number:  # the first round compiles kernels
                        times[workload][way].append(seconds)
                        seconds = _predicted_s(cost, config, *WORKLOADS[workload])
                        predicted[workload][way].append(seconds)
                engine.close()
                del engine
                gc.collect()
    for workload, by_way in times.items():
        one, two = (float(np.median(by_way[way])) for way in WAYS)
        print(f"{workload:>16}: {one:.3f} s in one process, {two:.3f} s in two, {two / one:.2f} x")
        one, two = (float(np.median(predicted[workload][way])) for way in WAYS)
        print(f"{'predicted':>16}: {one:.3f} s in one process, {two:.3f} s in two")
    result = {
        "times_s": times,
        "predicted_s": predicted,
        "machine": describe_machine(),
        "versions": describe_versions("torch", "numpy"),
        "commit": describe_commit(),
    }
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _cost(directory: Path, settings: dict[str, int]) -> tuple[CostModel, ResolvedConfig]:
    config = EngineConfig(device="cpu", **settings).resolve(
        context_length=CONFIG["max_position_embeddings"], free_memory_bytes=2**30
    )
    forms = stored_forms(open_checkpoint(directory))
    return machine_cost(CONFIG, read_shape(CONFIG), config, forms), config


def _predicted_s(
    cost: CostModel, config: ResolvedConfig, num_rows: int, num_prompt: int, num_output: int
) -> float:
    part = Part(parse_lengths(str(num_prompt)), parse_lengths(str(num_output)))
    workload = make_workload((part,), num_rows)
    engine = EngineSizes(
        groups=[KVGroup(None, 1024)],
        block_size=BLOCK_SIZE,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
    )
    rows = families(workload.rows, workload.columns, workload.output, np.arange(num_rows))
    run = Simulation(rows, engine, StepCosts(cost, BLOCK_SIZE))
    run.run()
    return cost.hardware.busy * run.clock.now()


def _write_model(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG))
    model, shapes = build_empty(CONFIG, 1), {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if name == "lm_head":
                continue
            if isinstance(module, Linear) and module.parts:
                parent = name.rpartition(".")[0]
                for part, width in module.parts.items():
                    shapes[f"{parent}.{part}.{kind}"] = (width, parameter.shape[1])
            else:
                shapes[f"{name}.{kind}"] = tuple(parameter.shape)
    generator = torch.Generator().manual_seed(0)

    tensors = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors")


def _seconds(engine: Engine, num_rows: int, num_prompt: int, num_output: int) -> float:
    """Of a whole run."""
    rng = np.random.default_rng(num_rows)
    params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    rows = [
        Request(
            id=str(index),
            prompt_token_ids=rng.integers(0, CONFIG["vocab_size"], num_prompt).astype(np.int32),
            params=params,
        )
        for index in range(num_rows)
    ]
    start = time.perf_counter()
    results = list(engine.run(rows))
    seconds = time.perf_counter() - start
    assert all(result.error is None for result in results)
    return seconds


if __name__ == "__main__":
    main()

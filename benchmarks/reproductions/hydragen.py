"""Hydragen (arXiv:2402.05099), end to end: decode throughput as the shared prefix grows to 16K.

CodeLlama-13B on 8 x A100-40G, 1,024 rows that share one prefix, 128 new tokens each. The scheduler
shares the prefix's blocks; the cost model loads keys of shared blocks once for all rows (Hydragen)
or once for each (the paper's vLLM without detokenisation).

Two constants are set from two published points, before the rest runs: the fixed time of a step from
the bound without attention (18.5 thousand tokens/s), and the rate of reading keys from the baseline
at a prefix of 1K (4.9). Everything else follows.

    python -m benchmarks.reproductions.hydragen
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from batchwright.kv.groups import KVGroup
from batchwright.plan.cost import CostModel, Hardware
from batchwright.plan.hardware import DeviceProfile, device_hardware
from batchwright.plan.model_shapes import find_model_shape
from batchwright.plan.shared_keys import StepCosts
from batchwright.predict import families
from batchwright.simulate import EngineSizes, Simulation
from batchwright.synthetic import Level, Part, make_workload, parse_lengths
from benchmarks.reproductions.tables import Line, show_and_keep

A100_40G = DeviceProfile(
    name="A100-40G",
    bf16_flops_per_s=312e12,
    fp32_flops_per_s=19.5e12,
    memory_bytes_per_s=1.555e12,
    memory_bytes=40e9,
)
BATCH, NEW_TOKENS, NUM_DEVICES, BLOCK_SIZE = 1024, 128, 8, 32
PREFIXES = (1024, 2048, 4096, 8192, 16384)
BOUND, BASELINE_1K = 18.5, 4.9
PAPER = {  # thousand tokens/s at 1K and 16K
    "hydragen": (15.6, 14.0),
    "baseline": (4.9, 0.4),
}
SHAPE = find_model_shape("CodeLlama-13B")
NO_LIMIT = 2**20


def total_s(hardware: Hardware, prefix: int, num_new: int, *, shares_reads: bool) -> float:
    """Seconds of the whole batch, prompts included."""
    part = Part(parse_lengths("1"), parse_lengths(str(num_new)), (Level(1, prefix),))
    workload = make_workload((part,), BATCH)
    cost = CostModel(SHAPE, hardware, 2, 2, NO_LIMIT if shares_reads else 1)
    num_blocks = (prefix + BATCH * (NEW_TOKENS + 2 * BLOCK_SIZE)) // BLOCK_SIZE
    engine = EngineSizes(
        groups=[KVGroup(None, num_blocks)],
        block_size=BLOCK_SIZE,
        max_num_seqs=BATCH,
        max_num_batched_tokens=2 * BATCH,
        max_model_len=prefix + 1 + NEW_TOKENS,
    )
    rows = families(workload.rows, workload.columns, workload.output, np.arange(BATCH))
    run = Simulation(rows, engine, StepCosts(cost, BLOCK_SIZE))
    run.run()
    return run.clock.now()


def decode_rate(hardware: Hardware, prefix: int, *, shares_reads: bool) -> float:
    """Thousand tokens per second while decoding."""
    seconds = [
        total_s(hardware, prefix, num_new, shares_reads=shares_reads) for num_new in (1, NEW_TOKENS)
    ]
    return BATCH * (NEW_TOKENS - 1) / (seconds[1] - seconds[0]) / 1e3


def calibrated() -> Hardware:
    """Step time from the bound without attention, then the reading rate from the baseline at 1K."""
    hardware = device_hardware(A100_40G, SHAPE, 2, num_devices=NUM_DEVICES)
    products_s = hardware.layers.seconds(BATCH, SHAPE.layer_flops_per_token)
    products_s += hardware.head.seconds(BATCH, SHAPE.head_flops_per_token)
    step_s = BATCH / (BOUND * 1e3) - products_s
    keys = BATCH * (PREFIXES[0] + NEW_TOKENS / 2)
    attention_s = BATCH / (BASELINE_1K * 1e3) - products_s - step_s
    kv_bytes_per_s = keys * SHAPE.kv_elements_per_token() * 2 / attention_s
    sent = {"token_s": 0.0, "logits_s": 0.0}  # is in the fixed time, as calibrated
    return replace(hardware, step_s=step_s, kv_bytes_per_s=kv_bytes_per_s, **sent)


def main() -> None:
    """Print the curve."""
    hardware = calibrated()
    rates = {
        name: [decode_rate(hardware, p, shares_reads=name == "hydragen") for p in PREFIXES]
        for name in PAPER
    }
    no_keys = replace(hardware, kv_bytes_per_s=1e30, attention_flops_per_s=1e30)
    bound = decode_rate(no_keys, PREFIXES[0], shares_reads=True)
    lines = [Line("no attention, k tokens/s", BOUND, bound, is_calibration=True)]
    for name, (at_1k, at_16k) in PAPER.items():
        for index, prefix in enumerate(PREFIXES):
            paper = {0: at_1k, len(PREFIXES) - 1: at_16k}.get(index)
            lines.append(
                Line(
                    f"{name}, prefix {prefix // 1024}K",
                    paper,
                    rates[name][index],
                    is_calibration=name == "baseline" and index == 0,
                )
            )
    for name, (at_1k, at_16k) in PAPER.items():
        lost = 1 - rates[name][-1] / rates[name][0]
        lines.append(Line(f"{name}, lost from 1K to 16K", 1 - at_16k / at_1k, lost))
    lines.append(Line("gain at 16K", 32.0, rates["hydragen"][-1] / rates["baseline"][-1]))
    lines[-1] = lines[-1]._replace(note="paper: up to 32 (14.0 / 0.4 = 35 by its rounded figures)")
    show_and_keep(
        "hydragen",
        lines,
        [
            f"8 x A100-40G by data sheet, products at {hardware.layers.best / 8e12:.0f} TFLOP/s",
            f"calibrated: {1e3 * hardware.step_s:.1f} ms a step beside products and attention "
            "(what 8 devices send each other is in it); keys read at "
            f"{hardware.kv_bytes_per_s / 8e12:.2f} TB/s a device, the same for Hydragen",
            "keys of a shared block are loaded once a step and their FLOPs charged in full",
            "rate while decoding: time for 128 new tokens less time for 1",
            "kernels one after another (omega = 0)",
        ],
    )


if __name__ == "__main__":
    main()

"""SARATHI (arXiv:2308.16369): where the gain of decode-maximal batches peaks over P:D.

LLaMA-13B on an A6000, 18 sequences of 1K tokens, chunks of 256. The baseline computes whole prompts
in steps of their own and then decodes 18 rows at a time. Ours is the scheduler with a budget of 256
tokens a step. The paper: the gain peaks where P:D = C / (B - 1), which is 15, and found 14.

Step times of products are four published points (4 rows 50 ms, 128 tokens 55 ms, 256 tokens
69.8 ms, 257 tokens, that is 384 after rounding to tiles, 92.3 ms); nothing else is fitted.

    python -m benchmarks.reproductions.sarathi
"""

from __future__ import annotations

import numpy as np

from batchwright.kv.groups import KVGroup
from batchwright.plan.cost import CostModel, Hardware, RateCurve
from batchwright.plan.model_shapes import find_model_shape
from batchwright.predict import families
from batchwright.simulate import EngineSizes, Simulation
from batchwright.synthetic import Lengths, Part, make_workload
from benchmarks.reproductions.tables import Line, show_and_keep

SHAPE = find_model_shape("LLaMA-13B")
CHUNK, BATCH, LENGTH, BLOCK_SIZE, NUM_ROWS = 256, 18, 1024, 16, 360
POINTS = ((4, 50e-3), (128, 55e-3), (256, 69.8e-3), (384, 92.3e-3))
GRID = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22, 28, 40, 60, 100)


def a6000() -> Hardware:
    """Products by the published steps; keys by the data sheet's 0.768 TB/s, at 85 % of it."""
    flops = SHAPE.layer_flops_per_token
    curve = RateCurve(
        tuple(float(rows) for rows, _ in POINTS),
        tuple(rows * flops / seconds for rows, seconds in POINTS),
    )
    return Hardware(
        name="A6000",
        num_threads=1,
        layers=curve,
        head=RateCurve((1.0,), (1e30,)),  # the published steps include it
        ceiling_flops_per_s=155e12,
        attention_flops_per_s=curve.best,
        kv_bytes_per_s=0.85 * 0.768e12,
        memory_bytes_per_s=0.768e12,
        tile_rows=128,
    )


def seconds(prompt: int, output: int, budget: int) -> float:
    """Time of NUM_ROWS equal rows with a token budget."""
    part = Part(Lengths(prompt, prompt), Lengths(output, output))
    workload = make_workload((part,), NUM_ROWS)
    engine = EngineSizes(
        groups=[KVGroup(None, BATCH * -(-LENGTH // BLOCK_SIZE + 1))],
        block_size=BLOCK_SIZE,
        max_num_seqs=BATCH,
        max_num_batched_tokens=budget,
        max_model_len=LENGTH,
    )
    rows = families(workload.rows, workload.columns, workload.output, np.arange(NUM_ROWS))
    run = Simulation(rows, engine, CostModel(SHAPE, a6000(), 2, 2))
    run.run()
    return run.clock.now()


def baseline_seconds(prompt: int, output: int) -> float:
    """18 prompts, one step each, then their decoding together; and so on."""
    one = seconds_of_prompt(prompt)
    decode = seconds_of_decode(prompt, output)
    return NUM_ROWS / BATCH * (BATCH * one + decode)


def seconds_of_prompt(prompt: int) -> float:
    """One prompt in a step of its own, whole."""
    hardware = a6000()
    tiles = -(-prompt // hardware.tile_rows) * hardware.tile_rows
    products = hardware.layers.seconds(tiles, SHAPE.layer_flops_per_token)
    pairs = prompt * (prompt + 1) // 2
    return products + SHAPE.attention_flops([pairs]) / hardware.attention_flops_per_s


def seconds_of_decode(prompt: int, output: int) -> float:
    """18 rows decode together from their first token to their last."""
    hardware = a6000()
    products = hardware.layers.seconds(hardware.tile_rows, SHAPE.layer_flops_per_token)
    num_keys = BATCH * sum(range(prompt + 1, prompt + output))
    keys_s = num_keys * SHAPE.kv_elements_per_token() * 2 / hardware.kv_bytes_per_s
    return (output - 1) * products + keys_s


def main() -> None:
    """Print the gains over the grid."""
    gains = []
    for ratio in GRID:
        prompt = round(LENGTH * ratio / (1 + ratio))
        output = LENGTH - prompt
        gains.append(baseline_seconds(prompt, output) / seconds(prompt, output, CHUNK))
    peak = int(np.argmax(gains))
    lines = [
        Line("P:D of the largest gain", 14, GRID[peak], note="C / (B - 1) = 15.06"),
        Line("largest gain", 1.27, gains[peak], note="paper: end to end, 1K tokens"),
    ]
    lines += [Line(f"gain at P:D {r}", None, g) for r, g in zip(GRID, gains, strict=True)]
    show_and_keep(
        "sarathi",
        lines,
        [
            "products by four published step times, rounded up to tiles of 128 rows; fewer rows "
            "take as long as 128, so a decode-only step is charged 55 ms",
            "the baseline runs one batch of requests after another, as the paper's does",
            "a whole prompt runs at the rate of 384 tokens (108 TFLOP/s); theirs may be faster",
            "the budget of 256 holds the decodes too: a chunk is 256 less the rows that decode",
            f"{NUM_ROWS} equal rows, synthetic; all P:D have P + D = {LENGTH}",
        ],
        grid=list(GRID),
        gains=gains,
    )


if __name__ == "__main__":
    main()

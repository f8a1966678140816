"""What is a guess of output lengths worth: error on rows not seen, and time under memory pressure?

The lengths are real ones (`benchmarks.length_rows`, ten families of twelve rows) and synthetic
families whose lengths are drawn from a lognormal around a mean of their own. Two questions:

- error: each predictor is told of half of the rows, as an earlier run would, and asked about the
  other half: mean absolute error, share within 50 and 100 tokens, share in the right tenth of
  max_tokens. `oracle` knows the lengths.
- time: the whole job runs through the real engine and scheduler on a simulated model, in KV memory
  for about `--rows` rows of the mean length; the predictor knows nothing at first and learns as
  rows end. `optimistic` stands for admission that looks only at the memory a row starts with: it
  expects every row to end with its next token. Once the time of a step follows its tokens, as on a
  CPU, and once most of it is the same for few rows as for many, as where weights are read.

    python -m benchmarks.lengths
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from batchwright.clock import VirtualClock
from batchwright.engine import Engine
from batchwright.exec.sim import LinearCost, SimExecutor
from batchwright.kv.groups import KVGroup
from batchwright.plan.length_predictor import (
    LengthPredictor,
    Lengths,
    Rows,
    find_predictor,
    within_limits,
)
from batchwright.plan.lengths.buckets import bucket_of
from batchwright.plan.order import find_order
from batchwright.request import Int32Array, Request, SamplingParams
from batchwright.sched.scheduler import Scheduler
from batchwright.step import NewSequence
from batchwright.text.tokenizer import Tokenizer, load_tokenizer
from batchwright.weights.locate import locate_model
from benchmarks.length_rows import RECORD, bodies
from benchmarks.machine import describe_commit, describe_machine, describe_versions

BLOCK_SIZE, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, MAX_MODEL_LEN = 32, 256, 512, 2048
NAMES = ("declared", "history", "subtree", "buckets")

COSTS = {
    "cpu": LinearCost(),  # time follows the tokens
    "device": LinearCost(step_s=2e-2, token_s=5e-5, key_s=2e-8),  # reads its weights every step
}
RUNS = (("fcfs", "cpu"), ("fcfs", "device"), ("longest_first", "device"))


class Job(NamedTuple):
    """Rows with their true lengths."""

    name: str
    prompts: list[Int32Array]
    most: np.ndarray
    output: np.ndarray


class Oracle:
    """Knows the length of every prompt."""

    def __init__(self, job: Job, scale: float = 1.0) -> None:
        self._output = {p.tobytes(): n for p, n in zip(job.prompts, job.output, strict=True)}
        self._scale = scale

    def learn(self, rows: Rows, output: np.ndarray) -> None:
        pass

    def predict(self, rows: Rows, so_far: np.ndarray) -> Lengths:
        known = np.array([self._output[p.tobytes()] for p in rows.prompts], np.float64)
        return Lengths(known * self._scale, known * self._scale)


class Optimistic:
    """Admission by the memory that rows start with."""

    def learn(self, rows: Rows, output: np.ndarray) -> None:
        pass

    def predict(self, rows: Rows, so_far: np.ndarray) -> Lengths:
        return Lengths(rows.most.astype(np.float64) * 0 + 1, so_far + 1.0)


def real_job(tokenizer: Tokenizer) -> Job:
    """The recorded rows, shuffled."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    output = {f"{family}-{number}": length for family, number, length in record["lengths"]}
    prompts = [
        np.array(tokenizer.encode_chat(body["messages"])[1], np.int32) for _, body in bodies()
    ]
    lengths = np.array([output[custom_id] for custom_id, _ in bodies()])
    return _shuffled("real", prompts, np.full(len(prompts), record["max_tokens"]), lengths)


def synthetic_job(num_rows: int, seed: int = 7) -> Job:
    """Twenty families that share 40 tokens each, of mean lengths from 8 to 700; 1,024 allowed."""
    random = np.random.default_rng(seed)
    means = np.geomspace(8, 700, 20)
    family = random.integers(0, 20, num_rows)
    output = random.lognormal(np.log(means[family]), 0.35).astype(np.int64)
    prompts = [
        np.concatenate(
            (np.full(40, 100 + f), random.integers(1000, 9000, random.integers(20, 160)))
        ).astype(np.int32)
        for f in family.tolist()
    ]
    most = np.full(num_rows, 1024)
    return _shuffled("synthetic", prompts, most, np.clip(output, 1, most))


def _shuffled(name: str, prompts: list[Int32Array], most: np.ndarray, output: np.ndarray) -> Job:
    order = np.random.default_rng(11).permutation(len(prompts))
    return Job(name, [prompts[i] for i in order], most[order], output[order].astype(np.int64))


def errors(job: Job, predictor: LengthPredictor) -> dict[str, float]:
    """Error on the second half of the rows, told of the first."""
    half = len(job.prompts) // 2
    start_s = time.process_time()
    predictor.learn(Rows(job.prompts[:half], job.most[:half]), job.output[:half])
    rows = Rows(job.prompts[half:], job.most[half:])
    guess = predictor.predict(rows, np.zeros(len(rows.prompts), np.int64))
    cpu_s = time.process_time() - start_s
    mean, upper = within_limits(guess, np.ones_like(rows.most), rows.most)
    truth = job.output[half:]
    wrong = np.abs(mean - truth)
    return {
        "mean_absolute_error": float(wrong.mean()),
        "within_50": float((wrong <= 50).mean()),
        "within_100": float((wrong <= 100).mean()),
        "right_bucket": float(
            (bucket_of(np.rint(mean).astype(int), rows.most) == bucket_of(truth, rows.most)).mean()
        ),
        "within_upper": float((truth <= np.ceil(upper)).mean()),
        "cpu_us_per_row": 1e6 * cpu_s / len(job.prompts),
    }


class NoText:
    """What an engine asks of a tokenizer when nobody reads the text."""

    end_token_ids = (3,)
    special_token_ids: frozenset[int] = frozenset()
    decoder_kind = "other"

    def decode(self, ids: Any, **options: Any) -> str:
        return ""

    def id_to_token(self, id: int) -> str:
        return ""


def run(
    job: Job, predictor: LengthPredictor, order: str, num_blocks: int, cost: LinearCost
) -> dict[str, Any]:
    """The whole job on a simulated model."""
    scheduler = Scheduler(
        [KVGroup(None, num_blocks)],
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        order=find_order(order),
        lengths=predictor,
    )
    true = {p.tobytes(): int(n) for p, n in zip(job.prompts, job.output, strict=True)}

    def length(new: NewSequence) -> int:
        return true[new.token_ids[: new.num_prompt_tokens].tobytes()]

    clock = VirtualClock()
    executor = SimExecutor(clock, cost, output_length=length)
    tokenizer: Any = NoText()
    engine = Engine(scheduler, executor, tokenizer, max_model_len=MAX_MODEL_LEN, vocab_size=2**30)
    if isinstance(predictor, Optimistic | Oracle):  # they know all before anything has ended
        add = scheduler.add

        def add_known(sequence: Any, **options: Any) -> None:
            add(sequence, **options)
            scheduler.expected.estimate([sequence])

        scheduler.add = add_known  # type: ignore[method-assign]
    requests = [
        Request(
            id=str(index),
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=int(most), seed=index),
        )
        for index, (prompt, most) in enumerate(zip(job.prompts, job.most, strict=True))
    ]
    start_s = time.process_time()
    drawn = {r.request_id: len(r.outputs[0].token_ids) for r in engine.run(requests)}
    assert drawn == {str(index): int(n) for index, n in enumerate(job.output)}, "rows were hurt"
    return {
        "simulated_s": clock.now(),
        "steps": engine.stats.num_steps,
        "preemptions": engine.stats.num_preemptions,
        "recomputed_tokens": engine.stats.num_recomputed_tokens,
        "rows_per_step": engine.stats.work.num_rows / engine.stats.num_steps,
        "scheduling_cpu_s": time.process_time() - start_s,
    }


def lines_of(job: Job) -> dict[str, Callable[[], LengthPredictor]]:
    """Every predictor and foil."""
    lines: dict[str, Callable[[], LengthPredictor]] = {"optimistic": Optimistic}
    for name in NAMES:
        lines[name] = lambda name=name: find_predictor(name)  # type: ignore[misc]
    return lines | {"oracle": lambda: Oracle(job), "oracle x 0.5": lambda: Oracle(job, 0.5)}


def main() -> None:
    """Print both tables for every job, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40, help="rows of the mean length that fit")
    parser.add_argument("--synthetic", type=int, default=1500, help="rows of the synthetic job")
    parser.add_argument("--job", action="append", help="real or synthetic; by default both")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.job or ("real", "synthetic"):
        if name == "real":
            job = real_job(load_tokenizer(locate_model("smollm2")))
        else:
            job = synthetic_job(arguments.synthetic)
        lengths = np.array([len(prompt) for prompt in job.prompts])
        num_blocks = int(arguments.rows * (lengths + job.output / 2).mean() / BLOCK_SIZE)
        num_blocks = max(num_blocks, -(-int((lengths + job.most).max()) // BLOCK_SIZE))
        print(f"{name}: {len(job.prompts)} rows, mean output {job.output.mean():.0f} of up to ")
        print(f"  {job.most.max()}; {num_blocks * BLOCK_SIZE:,} KV tokens")
        for line, make in lines_of(job).items():
            found: dict[str, Any] = {"job": name, "lengths": line}
            if line != "optimistic":
                found |= errors(job, make())
            for order, cost in RUNS:
                found[f"{order}, {cost}"] = run(job, make(), order, num_blocks, COSTS[cost])
            results[f"{name}, {line}"] = found
            print(f"  {line:13}", _short(found), flush=True)
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.lengths",
                "results": results,
                "machine": describe_machine(),
                "versions": describe_versions("numpy"),
                "commit": describe_commit(),
            }
        )
    )


def _short(found: dict[str, Any]) -> str:
    parts = []
    if "within_50" in found:
        parts.append(
            f"error {found['mean_absolute_error']:6.1f}  within 50 {found['within_50']:.2f}  "
            f"100 {found['within_100']:.2f}  bucket {found['right_bucket']:.2f}  "
            f"upper {found['within_upper']:.2f}  {found['cpu_us_per_row']:5.0f} us"
        )
    for order, line in found.items():
        if isinstance(line, dict):
            parts.append(
                f"{order} {line['simulated_s']:7.1f} s, {line['preemptions']} preempted, "
                f"{line['rows_per_step']:.1f} rows, {line['scheduling_cpu_s']:.1f} s of CPU"
            )
    return "  ".join(parts)


if __name__ == "__main__":
    main()

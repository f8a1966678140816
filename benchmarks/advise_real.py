"""Do the settings that `advise` predicts to be best beat the default in real runs of the whole job?

Two jobs on SmolLM2, small enough for two cores:

- tree: prompts that share four beginnings, mixed, in KV memory that holds two of them;
- tail: many short rows, then a few long ones, at most eight at once.

The advice is found by simulation; then the whole job runs with the settings one has and with those
advised, in turns, as `batchwright run` would run it. Time is given by the clock and in CPU seconds,
which say more on a machine that does other things too; there `--threads 1` also keeps threads from
waiting for one another.

    python -m benchmarks.advise_real --rounds 3 --out benchmarks/results/DATE-advise-real.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import random
import statistics
import time
from pathlib import Path
from typing import Any

from batchwright.bench.workloads import SNIPPETS
from batchwright.job.advice import Question
from batchwright.job.advise_job import Advisor
from batchwright.job.confirm import SampleRunner
from batchwright.job.formats.row_objects import read_objects
from batchwright.plan.advise.knobs import Knobs
from batchwright.report.advice_words import options
from benchmarks.machine import describe_commit, describe_machine, describe_versions

Rows = list[dict[str, Any]]


def tree() -> tuple[Rows, dict[str, Any]]:
    """32 rows under four beginnings of about 190 tokens, in mixed order; 640 KV tokens."""
    chance = random.Random(1)
    beginnings = [" ".join(chance.sample(SNIPPETS, 10)) for _ in range(4)]
    rows = [
        {"prompt": f"{beginnings[i % 4]} {chance.choice(SNIPPETS)}", "max_tokens": 8}
        for i in range(32)
    ]
    chance.shuffle(rows)
    return _named(rows), {"kv_tokens": 640}


def tail() -> tuple[Rows, dict[str, Any]]:
    """36 rows of 8 tokens, then 4 of 120; at most 8 at once."""
    chance = random.Random(2)
    rows = [{"prompt": chance.choice(SNIPPETS), "max_tokens": 8} for _ in range(36)]
    rows += [{"prompt": chance.choice(SNIPPETS), "max_tokens": 120} for _ in range(4)]
    return _named(rows), {"max_num_seqs": 8}


JOBS = {"tree": tree, "tail": tail}


def _named(rows: Rows) -> Rows:
    """Greedy rows of exact lengths; a number keeps identical prompts from being folded."""
    fixed = {"temperature": 0, "ignore_eos": True}
    return [
        {**row, **fixed, "id": str(i), "prompt": f"{row['prompt']} [{i}]"}
        for i, row in enumerate(rows)
    ]


def measure(name: str, rounds: int, threads: int | None) -> dict[str, Any]:
    """Advise on a job and run it both ways; returns what it took."""
    from batchwright.cli.advise import use_threads
    from batchwright.llm import LLM
    from batchwright.opened_model import open_model

    rows, settings = JOBS[name]()
    if threads is not None:
        settings["num_threads"] = threads
    with Advisor(
        read_objects(rows, column=None, template=None, endpoint=None),
        open_model("smollm2", settings),
        Question(fixed=frozenset(settings)),
    ) as advisor:
        advice = advisor.advise()
    own, pick = advice.own, advice.pick
    text = options(pick.knobs, own.knobs)
    print(f"{name}: {text or 'nothing to change'}; predicted {pick.seconds / own.seconds:.3f}")

    def load(knobs: Knobs) -> LLM:
        return LLM("smollm2", **{**settings, **dataclasses.asdict(knobs)})

    lines: list[dict[str, Any]] = []
    given = list(read_objects(rows, column=None, template=None, endpoint=None))
    contestants = {"own": own.knobs, "advised": pick.knobs}
    with SampleRunner(given, load, use_threads) as runner:
        for knobs in contestants.values():
            runner.prepare(knobs)
        for number in range(rounds):
            names = sorted(contestants, reverse=number % 2 == 0)
            for who in names:
                start_s = time.process_time()
                seconds = runner.seconds(contestants[who])
                cpu_s = time.process_time() - start_s
                lines.append({"who": who, "round": number, "seconds": seconds, "cpu_s": cpu_s})
                print(f"  {who:8} {seconds:7.1f} s  {cpu_s:7.1f} s of CPU", flush=True)
    result: dict[str, Any] = {
        "job": name,
        "rows": len(rows),
        "settings": settings,
        "options": text,
        "predicted_ratio": pick.seconds / own.seconds,
        "runs": lines,
    }
    for unit in ("seconds", "cpu_s"):
        ratios = [
            line[unit] / other[unit]
            for line in lines
            for other in lines
            if (line["who"], other["who"]) == ("advised", "own") and line["round"] == other["round"]
        ]
        result[f"{unit}_ratio"] = statistics.median(ratios)
        result[f"{unit}_ratios"] = ratios
        print(f"  {unit}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    return result


def main() -> None:
    """Run the jobs, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="keep to so many, instead of searching")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    line = json.dumps(
        {
            "benchmark": "benchmarks.advise_real",
            "results": [
                measure(name, arguments.rounds, arguments.threads) for name in arguments.jobs
            ],
            "machine": describe_machine(),
            "versions": describe_versions("torch", "numpy", "numba"),
            "commit": describe_commit(),
        }
    )
    print(line)
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")


if __name__ == "__main__":
    main()

"""Do the settings that `advise` predicts to be best beat the default in real runs of the whole job?

Three jobs on SmolLM2, small enough for two cores:

- tree: prompts that share four beginnings, mixed, in KV memory that holds two of them;
- tail: many short rows, then a few long ones, at most eight at once;
- read: long prompts and short answers, then short prompts and long answers.

The advice is found by simulation; then the whole job runs with the settings one has, whose order is
`auto`, with those advised, and with the settings one has but rows as they come (`fcfs`), in turns,
as `batchwright run` would run it. Advice beats the settings one has by the rule of `batchwright
advise` (`Confirmation.beats`). Time is given by the clock and in CPU seconds, which say more on a
machine that does other things too; there `--threads 1` also keeps threads from waiting for one
another.

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
from batchwright.plan.advise.knobs import LEAST_GAIN, Knobs
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


def read() -> tuple[Rows, dict[str, Any]]:
    """24 rows of about 190 tokens that are answered with 4, then 8 short ones answered with 60."""
    chance = random.Random(3)
    rows = [{"prompt": " ".join(chance.sample(SNIPPETS, 10)), "max_tokens": 4} for _ in range(24)]
    rows += [{"prompt": chance.choice(SNIPPETS), "max_tokens": 60} for _ in range(8)]
    return _named(rows), {}


JOBS = {"tree": tree, "tail": tail, "read": read}
OWN, ADVISED, AS_THEY_COME = "own", "advised", "own, fcfs"


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
    contestants = {
        OWN: own.knobs,
        ADVISED: pick.knobs,
        AS_THEY_COME: dataclasses.replace(own.knobs, order="fcfs"),
    }
    if pick is own:
        del contestants[ADVISED]
    with SampleRunner(given, load, use_threads) as runner:
        for knobs in contestants.values():
            runner.prepare(knobs)
        for number in range(rounds):
            names = list(contestants)[:: 1 if number % 2 == 0 else -1]
            for who in names:
                start_s = time.process_time()
                seconds = runner.seconds(contestants[who])
                cpu_s = time.process_time() - start_s
                lines.append({"who": who, "round": number, "seconds": seconds, "cpu_s": cpu_s})
                print(f"  {who:10} {seconds:7.1f} s  {cpu_s:7.1f} s of CPU", flush=True)
    result: dict[str, Any] = {
        "job": name,
        "rows": len(rows),
        "settings": settings,
        "options": text,
        "predicted_s": {"own": own.seconds, "advised": pick.seconds},
        "predicted_ratio": pick.seconds / own.seconds,
        "runs": lines,
    }
    for who in [name for name in contestants if name != OWN]:
        result[who] = _against_own(lines, who)
        print(f"  {who}: {result[who]}")
    return result


def _against_own(lines: list[dict[str, Any]], who: str) -> dict[str, Any]:
    """Ratios of the times of a contestant to those of one's own settings, round by round."""
    found: dict[str, Any] = {}
    for unit in ("seconds", "cpu_s"):
        by_round = {(line["who"], line["round"]): line[unit] for line in lines}
        ratios = [by_round[who, r] / by_round[OWN, r] for r in sorted({x["round"] for x in lines})]
        found[unit] = {"median": statistics.median(ratios), "ratios": ratios}
    ratios = found["seconds"]["ratios"]
    found["beats"] = max(ratios) < 1 and statistics.median(ratios) <= 1 - LEAST_GAIN
    return found


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

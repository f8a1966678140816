"""What does an order over the whole file save, against one over the rows in the engine?

Questions about documents, shuffled: the rows of one document stand far apart in a file of many. The
whole job runs, from file to file, with the real tokenizer and a simulated model whose KV memory
holds a few hundred rows. Printed: prompt tokens computed against the least that must be, the time
the model would have taken, the time that passed, and the most memory.

    python -m benchmarks.long_file --rows 50k --documents 5k
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from batchwright.cli.numbers import parse_count
from benchmarks.job_rows import peak_bytes
from benchmarks.machine import describe_machine

WORDS = "the of and to in is was for on that with as it at by from his be this which or had not are"
DOCUMENT_WORDS, QUESTION_WORDS, OUTPUT_TOKENS = 600, 30, 16
KV_BLOCKS = 4096
CASES = {
    "fcfs": ("fcfs", False),
    "prefix_dfs, rows in the engine": ("prefix_dfs", False),
    "prefix_dfs, whole file": ("prefix_dfs", True),
}


def write_rows(path: Path, num_rows: int, num_documents: int) -> None:
    """Rows of a random document and a question of their own."""
    random, words = Random(1), WORDS.split()
    documents = [" ".join(random.choices(words, k=DOCUMENT_WORDS)) for _ in range(num_documents)]
    with path.open("w", encoding="utf-8") as file:
        for index in range(num_rows):
            question = " ".join(random.choices(words, k=QUESTION_WORDS))
            prompt = f"{random.choice(documents)}\n{index} {question}?"
            row = {"id": str(index), "prompt": prompt, "max_tokens": OUTPUT_TOKENS}
            file.write(json.dumps({**row, "temperature": 0, "ignore_eos": True}) + "\n")


def run_one(folder: Path, case: str) -> dict:
    """One case, in this process."""
    from batchwright.job.directory import JobDirectory
    from batchwright.job.formats.arranged_lines import Arrangement
    from batchwright.job.formats.read_input import read_input
    from batchwright.job.run_job import JobPaths, run_job
    from batchwright.job.runner import JobOptions
    from benchmarks.simulated_model import SimulatedModel

    order, whole_file = CASES[case]
    model = SimulatedModel(kv_blocks=KV_BLOCKS, order=order)
    arrangement = Arrangement(model.order) if whole_file else None
    start_s = time.perf_counter()
    with JobDirectory(folder / "out.jsonl.job") as directory:
        summary = run_job(
            read_input(str(folder / "in.jsonl"), arrangement=arrangement),
            JobPaths(str(folder / "out.jsonl"), str(folder / "out.errors.jsonl")),
            directory,
            model,
            JobOptions(model_name="simulated", created=0),
        )
        directory.clear()
    stats = model.engine.stats
    return {
        "case": case,
        "rows": summary.num_succeeded,
        "prompt_tokens": summary.num_prompt_tokens,
        "cached_tokens": stats.num_cached_tokens,
        "computed_tokens": stats.num_computed_tokens,
        "model_s": model.clock.now(),
        "seconds": time.perf_counter() - start_s,
        "idle_s": summary.idle_s,
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Run each case in a process of its own and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=parse_count, default=50_000)
    parser.add_argument("--documents", type=parse_count, default=5_000)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        folder, case = arguments.case
        print(json.dumps(run_one(Path(folder), case)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "in.jsonl", arguments.rows, arguments.documents)
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.long_file", "--case", folder, case]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            for path in Path(folder).glob("out*.jsonl"):
                path.unlink()
            results.append(result)
            print(
                f"{case:32} {result['cached_tokens'] / result['prompt_tokens']:5.1%} of prompts "
                f"shared  model {result['model_s']:8,.0f} s  passed {result['seconds']:6.1f} s "
                f"(idle {result['idle_s']:.1f})  {result['peak_bytes'] / 2**20:5,.0f} MiB"
            )
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.long_file",
                "documents": arguments.documents,
                "results": results,
                **describe_machine(),
            }
        )
    )


if __name__ == "__main__":
    main()

"""How long does the prefix tree of a whole job take, and how much memory, after tokenising?

Rows have about 300 prompt tokens, of which 60 % are shared: every row goes through a system prompt
and, below it, one of many documents or few-shot blocks, and ends in tokens of its own. Rows arrive
shuffled. The bound expected is memory: each shared token is read once or twice. The tree is built
in a process of its own from a token file, once read into memory and once memory-mapped.

    python -m benchmarks.job_tree --rows 1m
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from batchwright.cli.numbers import parse_count
from batchwright.plan.job_tree import JobTree, build_job_tree
from benchmarks.machine import describe_commit, describe_machine, describe_versions

VOCAB_SIZE = 49_152
SYSTEM_TOKENS, DOCUMENT_TOKENS, OWN_TOKENS = 100, 80, 120  # mean of the own ones
NUM_SYSTEMS, ROWS_PER_DOCUMENT = 20, 50


def write_job(folder: Path, num_rows: int, seed: int = 1) -> None:
    """tokens.bin (int32) and offsets.npy, written in pieces."""
    random = np.random.default_rng(seed)

    def text(*shape: int) -> np.ndarray:
        return random.integers(0, VOCAB_SIZE, shape, dtype=np.int32)

    systems = text(NUM_SYSTEMS, SYSTEM_TOKENS)
    documents = text(max(num_rows // ROWS_PER_DOCUMENT, 1), DOCUMENT_TOKENS)
    document_of_row = random.integers(0, len(documents), num_rows)
    own = random.integers(OWN_TOKENS // 2, OWN_TOKENS * 3 // 2 + 1, num_rows)
    lengths = SYSTEM_TOKENS + DOCUMENT_TOKENS + own
    np.save(folder / "offsets.npy", np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))
    with (folder / "tokens.bin").open("wb") as file:
        for document, num_own in zip(document_of_row.tolist(), own.tolist(), strict=True):
            file.write(systems[document % NUM_SYSTEMS].tobytes())
            file.write(documents[document].tobytes())
            file.write(text(num_own).tobytes())


def measure(folder: Path, *, in_memory: bool) -> dict[str, float]:
    """Build the tree in this process."""
    build_job_tree(np.zeros(2, np.int32), np.array([0, 1, 2]))  # load the compiled loops
    offsets = np.load(folder / "offsets.npy")
    tokens: np.ndarray = np.memmap(folder / "tokens.bin", np.int32, "r")
    if in_memory:
        tokens = np.fromfile(folder / "tokens.bin", np.int32)
    before_s, before_cpu_s = time.perf_counter(), time.process_time()
    tree = build_job_tree(tokens, offsets)
    built_s, built_cpu_s = time.perf_counter(), time.process_time()
    _use(tree, offsets)
    used_s = time.perf_counter()
    num_tokens = int(offsets[-1])
    return {
        "rows": len(offsets) - 1,
        "tokens": num_tokens,
        "nodes": tree.num_nodes,
        "shared_fraction": 1 - tree.num_distinct_tokens() / num_tokens,
        "build_s": built_s - before_s,
        "build_cpu_s": built_cpu_s - before_cpu_s,
        "order_s": used_s - built_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "token_bytes": 4 * num_tokens,
    }


def _use(tree: JobTree, offsets: np.ndarray) -> None:
    """What every order asks: users, sums over them, and rows depth first."""
    tree.sum_over_users(np.diff(offsets))
    tree.depth_first(tree.rows[tree.first])


def main() -> None:
    """Write the job, build its tree twice, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=parse_count, default=1_000_000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", choices=["memory", "mapped"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        in_memory = arguments.tokens == "memory"
        print(json.dumps(measure(arguments.folder, in_memory=in_memory)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), arguments.rows)
        for tokens in ("memory", "mapped"):
            command = [sys.executable, "-m", "benchmarks.job_tree", "--folder", folder]
            command += ["--tokens", tokens]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result = results[tokens] = json.loads(done.stdout)
            print(
                f"tokens {tokens:6}  {result['rows']:,} rows, {result['tokens']:,} tokens, "
                f"{result['shared_fraction']:.1%} shared, {result['nodes']:,} nodes: built in "
                f"{result['build_s']:.1f} s ({result['build_cpu_s']:.1f} s of CPU), ordered in "
                f"{result['order_s']:.1f} s, peak {result['peak_bytes'] / 2**30:.2f} GiB"
            )
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.job_tree",
                "results": results,
                "machine": describe_machine(),
                "versions": describe_versions("numpy", "numba"),
                "commit": describe_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()

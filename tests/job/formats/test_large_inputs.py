"""Memory does not grow with the number of rows, from the input to the table written."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from batchwright.job.formats.output import write_projection
from batchwright.job.formats.result_line import success_line

ROOT = Path(__file__).parents[3]
NUM_ROWS = 200_000
MB = 1 << 20

# Prints by how many bytes the process grew while it read the rows after the first thousand.
READ = """
import resource, sys
from batchwright.job.formats.read_input import read_input
from batchwright.job.validate import parse_row
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for number, row in enumerate(read_input(sys.argv[1])):
    parse_row(row)
    if number == 1000:
        before = peak()
assert number + 1 == int(sys.argv[2])
print(peak() - before)
"""


def growth_while_reading(path: Path) -> int:
    command = [sys.executable, "-c", READ, str(path), str(NUM_ROWS)]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in.csv", "in.jsonl", "in.jsonl.gz", "in.parquet"])
def test_reading_two_hundred_thousand_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = ((f"request-{number}", f"{number} " * 100) for number in range(NUM_ROWS))
    if name == "in.csv":
        with path.open("w") as file:
            file.write("id,prompt\n")
            file.writelines(f'{key},"{prompt}"\n' for key, prompt in rows)
    elif name == "in.parquet":
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        keys, prompts = zip(*rows)
        parquet.write_table(pa.table({"id": keys, "prompt": prompts}), path)
    else:
        lines = (msgspec.json.encode({"id": key, "prompt": prompt}) for key, prompt in rows)
        write_projection(str(path), (line + b"\n" for line in lines))
    # All rows in memory would take over 120 MB.
    assert growth_while_reading(path) < 20 * MB


WRITE = """
import resource, sys
from batchwright.job.formats.output import write_projection
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
write_projection(sys.argv[2], open(sys.argv[3], "rb"))
before = peak()
write_projection(sys.argv[2], open(sys.argv[1], "rb"))
print(peak() - before)
"""


def lines(num_rows: int) -> Iterator[bytes]:
    for number in range(num_rows):
        choice = {"index": 0, "text": f"{number} " * 100, "finish_reason": "stop"}
        line = success_line(f"request-{number}", {"choices": [choice]}, {"number": number})
        yield msgspec.json.encode(line) + b"\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.jsonl.zst"])
def test_writing_two_hundred_thousand_rows(tmp_path: Path, name: str) -> None:
    if name == "out.parquet":
        pytest.importorskip("pyarrow")
    large, small = tmp_path / "large.jsonl", tmp_path / "small.jsonl"
    write_projection(str(large), lines(NUM_ROWS))
    write_projection(str(small), lines(10_000))
    command = [sys.executable, "-c", WRITE, str(large), str(tmp_path / name), str(small)]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert int(found.stdout) < 40 * MB


IDS = """
import resource
from batchwright.job.formats.id_set import IdSet
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ids = IdSet()
for start in range(0, 1_000_000, 250):
    assert all(ids.add([f"request-{number}" for number in range(start, start + 250)]))
    if start == 100_000:
        before = peak()
assert not any(ids.add(["request-777777", "request-3"]))
print(peak() - before)
"""


@pytest.mark.slow
def test_a_million_ids_take_no_more_memory_than_a_hundred_thousand() -> None:
    found = subprocess.run([sys.executable, "-c", IDS], cwd=ROOT, check=True, capture_output=True)
    assert int(found.stdout) < 4 * MB

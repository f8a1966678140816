"""Check what `make demo` produced: every row answered once, and only the bad row failed.

Usage: python examples/check_demo.py out/demo/results.jsonl EXIT_STATUS
"""

import json
import sys
from pathlib import Path

EXPECTED_FAILURES = {"bad-row"}
INPUT = Path(__file__).parent / "requests.jsonl"


def custom_ids(path: Path) -> list[str]:
    """The custom_id of each line, in order; a bare row without one is named by its line."""
    ids = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        ids.append(row.get("custom_id") or row.get("id") or f"line-{number}")
    return ids


def problems(results: Path, exit_status: int) -> list[str]:
    """Everything that is not as the demo promises."""
    errors = results.with_suffix(".errors.jsonl")
    succeeded = custom_ids(results) if results.exists() else []
    failed = custom_ids(errors) if errors.exists() else []
    found = []
    if exit_status != 1:
        found.append(f"the exit status is {exit_status}; 1 (some rows failed) was expected")
    if sorted(succeeded + failed) != sorted(custom_ids(INPUT)):
        found.append("the rows answered are not the rows asked, each once")
    if set(failed) != EXPECTED_FAILURES:
        found.append(f"failed rows: {sorted(failed)}; expected: {sorted(EXPECTED_FAILURES)}")
    return found


def main() -> int:
    """Print the verdict; 0 when all is as promised."""
    results, exit_status = Path(sys.argv[1]), int(sys.argv[2])
    found = problems(results, exit_status)
    for problem in found:
        print(f"demo: {problem}", file=sys.stderr)
    if found:
        return 1
    num_rows = len(custom_ids(INPUT))
    print(
        f"As it should be: {num_rows - 1} of {num_rows} rows succeeded. The one that failed, "
        f'bad-row, is wrong on purpose (its temperature is the word "hot"); it failed alone, '
        f"which is why the exit status was 1.\nAnswers: {results}\n"
        f"The failure: {results.with_suffix('.errors.jsonl')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

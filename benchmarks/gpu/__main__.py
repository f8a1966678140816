"""Checks and measures the GPU kernels on the card at hand.

    python -m benchmarks.gpu [--only check,rates,...] [--budget-s 240] [--out DIR] [--dry-run]

Sections, each a table and DIR/SECTION.json: `check` (every kernel against its twin, fp32, fp16 and
bf16), `rates` (what a cost model must know of the card), `attention`, `rowwise`, `sampling` and
`moe` (shares of bandwidth and matrix rate), `fp8` (products in 8 bits), and, only when named,
`tune` (other tile shapes), `parity` (SmolLM2's tokens against transformers'), `engine` (whole jobs
on random weights) and `swap` (keys and values that go to the host).
`check` takes at most half of the budget; what it did not reach counts as failed. After a failed
check the exit status is 1 and the JSON of the others says so: such speeds are for finding the
fault, they are no results. Needs torch, triton, numpy and numba; `parity` also safetensors,
tokenizers, jinja2 and transformers. `--dry-run`: tiny sizes on the CPU in Triton's interpreter, to
see that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

SECTIONS = ("check", "rates", "attention", "rowwise", "sampling", "moe", "fp8")
ALL_SECTIONS = (*SECTIONS, "tune", "parity", "engine", "swap")


def main() -> int:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--budget-s", type=float, default=600.0, help="for all sections together")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny, in the interpreter")
    parser.add_argument("--workers", type=int, default=8, help="processes of `check`")
    parser.add_argument(
        "--model", default="smollm2", help="for parity: a model, or a folder of part-* of its file"
    )
    parser.add_argument("--models", default="", help="for engine: names, with semicolons")
    parser.add_argument("--workloads", default="", help="for engine: names, with commas")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # of a process of `check`: number/of
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(ALL_SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(ALL_SECTIONS)}")
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run works without one")
    if args.part:
        _check_part(*map(int, args.part.split("/")), args.dry_run)
        return 0

    from benchmarks.gpu.card import Budget, Timer, describe

    device = "cpu" if args.dry_run else "cuda"
    timer, budget = Timer(device), Budget(args.budget_s)
    args.out.mkdir(parents=True, exist_ok=True)
    about = describe(device)
    print(json.dumps(about))
    checks, failed = "not run", False
    for name in ALL_SECTIONS:
        if name not in names:
            continue
        start = time.monotonic()
        if budget.is_spent():
            print(f"== {name}: left out, the budget is spent")
            continue
        if name == "check":
            found = _check(args.workers, args.dry_run, Budget(args.budget_s / 2))
            checks = "failed" if found["failed"] else "passed"
            text = _check_table(found)
        else:
            section = import_module(f"benchmarks.gpu.{name}")
            parity = (args.model,)
            engine = _names(args.models, ";"), _names(args.workloads, ",")
            extra = {"parity": parity, "engine": engine}.get(name, ())
            try:
                found = section.run(timer, budget, *extra)
                text = section.table(found)
            except Exception as error:  # noqa: BLE001  told, and the other sections go on
                text = traceback.format_exc()
                found = {"failed": 1, "error": f"{type(error).__name__}: {error}"[:2000]}
            failed |= bool(found.get("failed"))
        seconds = time.monotonic() - start
        result = {
            "section": name,
            "about": about,
            "checks": checks,
            "seconds": round(seconds, 1),
        } | found
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"== {name} ({seconds:.0f} s)\n{text}", flush=True)
    return int(failed or checks == "failed")


def _names(text: str, separator: str) -> list[str]:
    return [part for part in text.split(separator) if part]


def _check(workers: int, dry_run: bool, budget: Any) -> dict[str, Any]:
    """All checks, spread over processes: most of their time is the compiler's and the twin's."""
    workers = 1 if dry_run else workers
    environment = os.environ | {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    options = ["--dry-run"] if dry_run else []
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", "--part", f"{i}/{workers}", *options],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for i in range(workers)
    ]  # fmt: skip
    lines: list[dict[str, Any]] = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(1.0, budget.left_s()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        lines += [json.loads(line) for line in output.splitlines() if line.endswith("}")]
    # every part tells how many checks it has before it starts
    expected = sum(line["checks_of_part"] for line in lines if "checks_of_part" in line)
    told = sum("checks_of_part" in line for line in lines)
    lines = [line for line in lines if "check" in line]
    failed = sum(not line["ok"] for line in lines) + expected - len(lines) + workers - told
    return {"failed": failed, "not_reached": expected - len(lines), "lines": lines}


def _check_part(number: int, parts: int, dry_run: bool) -> None:
    """Every `parts`-th check, from `number` on, in every dtype; prints a JSON line of each."""
    import torch

    from benchmarks.gpu.check import all_checks

    device = "cpu" if dry_run else "cuda"
    dtypes = [torch.float32, torch.float16]
    if not dry_run:  # the interpreter's products in bf16 are wrong
        dtypes.append(torch.bfloat16)
    checks = [check for check in all_checks() if check.small or not dry_run]
    todo = [(check, dtype) for check in checks for dtype in dtypes][number::parts]
    if dry_run:
        todo = todo[::8]
    print(json.dumps({"checks_of_part": len(todo)}), flush=True)
    for check, dtype in todo:
        line: dict[str, Any] = {"check": check.name, "dtype": str(dtype).removeprefix("torch.")}
        try:
            errors = check.run(dtype, device)
        except Exception as error:  # noqa: BLE001  told as a failed check, and the others go on
            line |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        else:
            ok = all(error <= tolerance for error, tolerance in errors.values())  # NaN is not
            line |= {"ok": ok, "errors": errors}
        print(json.dumps(line), flush=True)


def _check_table(found: dict[str, Any]) -> str:
    """Failures in full, and the largest error of each kind of kernel."""
    lines = [
        f"{len(found['lines'])} checks done, {found['not_reached']} not reached; "
        f"failed or not reached: {found['failed']}"
    ]
    lines += [json.dumps(line) for line in found["lines"] if not line["ok"]]
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for line in found["lines"]:
        for what, (error, tolerance) in line.get("errors", {}).items():
            key = f"{line['check'].split(':')[0]}, {what}", line["dtype"]
            worst[key] = max(worst.get(key, (0.0, tolerance)), (error, tolerance))
    lines += [
        f"{name} {dtype}: largest error {error:.2g}, tolerance {tolerance:.2g}"
        for (name, dtype), (error, tolerance) in sorted(worst.items())
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Runs the tests of GPU kernels in Triton's interpreter, and the dry run of benchmarks.gpu."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_kernels_equal_their_twins_in_the_interpreter() -> None:
    files = [f"tests/kernels/test_triton{part}.py" for part in ("", "_sample", "_experts")]
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None and int(passed[1]) >= 80 and "skipped" not in output, output


@pytest.mark.slow
def test_dry_run_of_parity(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run("-m", "benchmarks.gpu", "--dry-run", "--only", "parity", "--out", str(tmp_path))
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["failed"] == 0 and found["tiny"]["num_tokens"] == 12


@pytest.mark.slow
def test_dry_run_of_the_gpu_benchmark(tmp_path: Path) -> None:
    sections = "check,rates,attention,rowwise,sampling,moe,fp8,tune,engine"
    run("-m", "benchmarks.gpu", "--dry-run", "--only", sections, "--out", str(tmp_path))
    for section in sections.split(","):
        found = json.loads((tmp_path / f"{section}.json").read_text())
        assert found["section"] == section and "dry run" in found["about"]["card"]
        assert found["products" if section == "rates" else "lines"] and found["checks"] == "passed"
        assert not found["not_reached" if section == "check" else "left_out"]


def test_the_gpu_benchmark_needs_only_what_a_cuda_image_has() -> None:
    """Nothing of job/ or server/, and no package beyond torch, Triton, numpy and Numba."""
    code = """
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(name)
UPPER = ("batchwright.job", "batchwright.server")
MISSING = {"llguidance", "matplotlib", "msgspec", "psutil", "pyarrow", "rich", "starlette", "typer"}
sys.meta_path.insert(0, Missing())
SECTIONS = "attention check engine fp8 moe parity rates rowwise sampling tune __main__"
for name in SECTIONS.split():
    importlib.import_module(f"benchmarks.gpu.{name}")
loaded = [name for name in sys.modules if name.startswith(UPPER)]
sys.exit(", ".join(loaded) or 0)
"""
    run("-c", code)

"""Draws and attention of the device executor by the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = [pytest.mark.cpu, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def test_a_job_by_the_kernels() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    tests = ["tests/exec/test_device.py", "tests/exec/test_device_sampler.py"]
    tests += ["-k", "draws or sampler"]
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    ran = done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout
    assert ran, done.stdout + done.stderr

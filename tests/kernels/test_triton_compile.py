"""GPU kernels compiled ahead of time: registers, spills, shared memory, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
# a program's limit: on an L40S or RTX 4090; half of an H100's multiprocessor, less 1 KiB
MAX_SHARED_BYTES = {80: 99 << 10, 89: 99 << 10, 90: 113 << 10}
MAX_EXPERTS_SHARED_BYTES = 227 << 10
"""Of products of many rows on an H100, of which one program fills a multiprocessor."""
MAX_STACK_BYTES = 32  # spilled registers, of the largest tiles on sm_80


def compile_set(name: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_compile", name],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_resources(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        limit = MAX_SHARED_BYTES[kernel["architecture"]]
        if kernel["kernel"].startswith("experts") and kernel["architecture"] == 90:
            limit = MAX_EXPERTS_SHARED_BYTES
        assert kernel["shared_bytes"] <= limit, kernel
        assert kernel["stack_bytes"] <= MAX_STACK_BYTES, kernel
        is_attention = kernel["kernel"].startswith(("narrow", "wide"))
        if is_attention and "fp32" in kernel["kernel"]:
            assert kernel["wgmma"] == kernel["mma"] == 0, kernel  # they would round to tf32
        elif is_attention:
            uses_wgmma = kernel["architecture"] == 90 and kernel["kernel"].startswith("wide")
            assert kernel["wgmma" if uses_wgmma else "mma"], kernel
            is_8_bit = kernel["kernel"].endswith((" fp8", " fp8e4nv", " i8"))
            assert kernel["cp_async_16"] or is_8_bit, kernel
        elif kernel["kernel"].startswith("experts") and "fp32" not in kernel["kernel"]:
            assert kernel["wgmma"] or kernel["mma"], kernel


def test_kernels_of_an_8b_model_compile() -> None:
    kernels = compile_set("everyday")
    assert {kernel["architecture"] for kernel in kernels} == {80, 90}
    check_resources(kernels)


@pytest.mark.slow
def test_every_shape_and_option_compiles() -> None:
    kernels = compile_set("every")
    assert len(kernels) > 100
    check_resources(kernels)

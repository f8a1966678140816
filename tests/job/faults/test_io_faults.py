"""Every file operation of a job fails, is torn, or is the last thing the process does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).with_name("failing_io.c")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    path = tmp_path_factory.mktemp("io") / "failing_io.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return path


def disturb(library: Path, folder: Path, mode: str, stride: int) -> dict:
    """The driver's report."""
    environment = os.environ | {"LD_PRELOAD": str(library), "OPENBLAS_NUM_THREADS": "1"}
    arguments = [str(library), str(folder), mode, str(stride)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.job.faults.driver", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    print(report)
    assert not report["problems"], (report, done.stderr[-2000:])
    return report


@pytest.mark.parametrize("mode", ["fail", "full", "torn", "kill", "tear"])
@pytest.mark.parametrize(
    "stride", [7, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_a_disturbed_job_goes_on_to_the_same_end(
    library: Path, tmp_path: Path, mode: str, stride: int
) -> None:
    report = disturb(library, tmp_path, mode, stride)
    assert report["points"] > 60 // stride
    killed = report["statuses"].get("-9", 0)
    if mode in ("kill", "tear"):
        assert killed == report["points"]
    else:
        assert report["statuses"].get("75", 0) > report["points"] / 2  # it did hurt


@pytest.mark.parametrize(
    "stride", [9973, pytest.param(499, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_a_job_goes_on_after_its_quota_was_used_up(
    library: Path, tmp_path: Path, stride: int
) -> None:
    report = disturb(library, tmp_path, "quota", stride)
    assert report["statuses"].get("75", 0) > report["points"] / 2


@pytest.mark.parametrize("num_kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_job_killed_at_any_moment_goes_on_to_the_same_end(
    library: Path, tmp_path: Path, num_kills: int
) -> None:
    report = disturb(library, tmp_path, "moment", num_kills)
    assert report["statuses"]["-9"] == num_kills

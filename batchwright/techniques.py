"""find(family, name) and names(family): a technique is a file, and the file is its registration.

`python -m batchwright.techniques > docs/techniques.md` makes the list of all of them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from batchwright.errors import ConfigError

FAMILIES = {
    "plan.orders": "In which order rows start (`--order`). Level bits: an order changes when a row "
    "runs, never what it answers. It changes which keys are resident, so how many tokens are "
    "computed again, and how full steps are.",
    "plan.lengths": "How long outputs are expected to be (`--lengths`). Level bits. It changes "
    "which rows run together, in which order, and how many are preempted.",
    "attention.backends": "How a layer attends over paged keys and values "
    "(`LLM(model, attention=...)`).",
}


def names(family: str) -> list[str]:
    """Techniques of a family, which is a folder, e.g. names("attention.backends")."""
    package = importlib.import_module(f"batchwright.{family}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(family: str, name: str) -> ModuleType:
    """The module of a technique, e.g. find("attention.backends", "numba").

    Raises:
        ConfigError: there is no such file.
    """
    if not name.isidentifier() or name not in names(family):
        raise ConfigError(f"no {family} called {name!r}; there are {', '.join(names(family))}")
    return importlib.import_module(f"batchwright.{family}.{name}")


def describe() -> str:
    """The techniques of all families in Markdown, from their docstrings; none is imported."""
    lines = [
        "# Techniques",
        "",
        "Made from docstrings by `python -m batchwright.techniques`. Levels: *bits*, a row's bits "
        "do not depend on it; *rounding*, the same mathematics summed in another order; *lossy*.",
    ]
    for family, what in FAMILIES.items():
        lines += ["", f"## {family.replace('.', '/')}", "", what]
        folder = Path(__file__).parent.joinpath(*family.split("."))
        for name in names(family):
            tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
            lines += ["", f"### {name}", "", ast.get_docstring(tree) or ""]
    lines += [
        "",
        "## Beside the families",
        "",
        "[Prompt Cache](prompt_cache.md): modules of prompts computed once wherever they stand "
        "(`--prompt-schema`). Lossy, opt-in.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(describe())

"""find(family, name) and names(family): a technique is a file, and the file is its registration."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from batchwright.errors import ConfigError


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

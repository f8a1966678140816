"""Where things that can be made again are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_directory(kind: str) -> Path | None:
    """The user's directory for one kind of cached files; None if the user has no home.

    `$XDG_CACHE_HOME/batchwright/KIND`, or `~/.cache/batchwright/KIND`. It need not exist.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification says to ignore relative ones
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:
            return None
    return Path(base) / "batchwright" / kind

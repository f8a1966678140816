"""Finds what would make the host wait for a device, on a CPU too, where nothing does."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import batchwright

PACKAGE = Path(batchwright.__file__).parent
WATCHED = tuple(str(PACKAGE / name) for name in ("attention", "exec", "sampling"))
"""On a CPU, models and their kernels compute on the host by right."""
TRANSFER = str(PACKAGE / "exec" / "device" / "transfer.py")
"""It alone has pinned memory and copies from it and to it."""

FROM_HOST = "from_numpy", "tensor", "as_tensor", "asarray"
TO_HOST = "cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "nonzero"


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """An AssertionError where watched code makes a tensor of what lies on the host, or reads one.

    On a device either is a blocking copy: what lies on the host is not pinned. With a card torch
    itself is asked too.
    """
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, FROM_HOST), (torch.Tensor, TO_HOST)):
            for name in names:
                patch.setattr(owner, name, _refused(name, getattr(owner, name)))
        with_card = torch.cuda.is_available()
        if with_card:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if with_card:
                torch.cuda.set_sync_debug_mode("default")


def _refused(name: str, function: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        file = sys._getframe(1).f_code.co_filename
        assert file == TRANSFER or not file.startswith(WATCHED), f"{file} calls {name}"
        return function(*arguments, **options)

    return call

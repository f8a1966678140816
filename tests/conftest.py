"""Settings shared by all tests."""

import pytest
from hypothesis import settings

import batchwright  # noqa: F401  first: it settles how OpenMP threads wait

# The same examples in every run, and no deadline: a shared machine stalls now and then.
settings.register_profile("everyday", derandomize=True, deadline=None)
settings.load_profile("everyday")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests where there is no CUDA device; torch is imported only if one was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

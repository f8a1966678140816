"""Fixtures for the model tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from batchwright import kernels
from batchwright.models.causal_lm import CausalLM
from batchwright.models.loader import load_model
from batchwright.weights.checkpoint import open_checkpoint
from tests.models.ragged import ragged_logits
from tests.models.reference import (
    make_checkpoint,
    random_sequences,
    reference_logits,
    relative_error,
)

MAX_POSITIONS = 256


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """These products are so small that a second thread only waits for the first."""
    num_torch, num_numba = torch.get_num_threads(), kernels.get_num_threads()
    kernels.set_num_threads(1)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    kernels.set_num_threads(num_numba)
    torch.set_num_threads(num_torch)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random inputs in every run, whichever tests run."""
    torch.manual_seed(0)


@pytest.fixture(scope="package")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """Directory and transformers' model of a tiny checkpoint, made once."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def get(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = path, make_checkpoint(name, path)
        return made[name]

    return get


@pytest.fixture(scope="package")
def load() -> Callable[..., CausalLM]:
    """Our model of a checkpoint directory; config entries can be changed on the way."""

    def get(path: Path, dtype: torch.dtype = torch.float32, **changes: object) -> CausalLM:
        source = open_checkpoint(path)
        source.config.update(changes)
        return load_model(source, dtype=dtype, max_positions=MAX_POSITIONS)

    return get


@pytest.fixture(scope="package")
def expected(
    checkpoint: Callable[[str], tuple[Path, PreTrainedModel]],
) -> Callable[[str], list[torch.Tensor]]:
    """transformers' logits of the standard sequences, computed once for each checkpoint."""
    computed: dict[str, list[torch.Tensor]] = {}

    def get(name: str) -> list[torch.Tensor]:
        if name not in computed:
            computed[name] = reference_logits(checkpoint(name)[1], random_sequences())
        return computed[name]

    return get


@pytest.fixture(scope="package")
def error_of(expected: Callable[[str], list[torch.Tensor]]) -> Callable[..., float]:
    """Relative error of a model's logits, whole sequences unless a chunk is given."""

    def get(name: str, model: CausalLM, **options: Any) -> float:
        ours = ragged_logits(model, random_sequences(), **options)
        return relative_error(ours, expected(name))

    return get

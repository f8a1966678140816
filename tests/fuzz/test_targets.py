"""The fuzzing targets without a fuzzer: their seeds, and seeds with random damage."""

from importlib import import_module
from random import Random

import pytest

from tests.fuzz.run import TARGETS

pytestmark = pytest.mark.cpu
NUM_DAMAGED = 300


def damaged(data: bytes, random: Random) -> bytes:
    """Some bytes of it replaced, removed, doubled or put elsewhere."""
    out = bytearray(data)
    for _ in range(random.randint(1, 4)):
        start = random.randrange(len(out) + 1)
        end = min(len(out), start + random.choice((1, 1, 4, 8, 40)))
        piece = bytes(out[start:end])
        kind = random.randrange(4)
        out[start:end] = (random.randbytes(len(piece)), b"", 2 * piece, b"\xff" * len(piece))[kind]
    return bytes(out)


# A deadline that is over while a finalizer runs is told as a warning, and comes again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("target", TARGETS)
def test_seeds_and_damaged_seeds(target: str) -> None:
    module, random = import_module(f"tests.fuzz.{target}"), Random(2)
    seeds = module.seeds()
    for seed in seeds:
        module.run(seed)
    for _ in range(NUM_DAMAGED):
        module.run(damaged(random.choice(seeds), random))

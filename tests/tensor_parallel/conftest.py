"""One pair of processes for all tests of a module: starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchwright import llm
from batchwright.tensor_parallel import followers as followers_module
from batchwright.tensor_parallel.followers import Followers


class LastingFollowers(Followers):
    """Engines come and go; these stay, and load what the next one wants."""

    def close(self) -> None:
        """Not yet."""

    def end(self) -> None:
        super().close()


def lasting(size: int, program: str | None = None) -> Iterator[LastingFollowers]:
    """Followers that run `program`, ended afterwards; a fixture's body."""
    usual = followers_module.PROGRAM
    followers_module.PROGRAM = program or usual
    followers = LastingFollowers(size, on_gpu=False)
    followers_module.PROGRAM = usual
    yield followers
    followers.end()


@pytest.fixture(scope="session")
def lasting_pair() -> Iterator[LastingFollowers]:
    yield from lasting(2)


@pytest.fixture
def pair(lasting_pair, monkeypatch) -> LastingFollowers:
    """Engines with tensor_parallel_size 2 are this process and one that lasts."""

    def start(size: int, *, on_gpu: bool) -> LastingFollowers:
        assert size == 2 and not on_gpu
        return lasting_pair

    monkeypatch.setattr(llm, "Followers", start)
    return lasting_pair

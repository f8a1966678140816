"""Programs make the calls that were recorded again, in little memory, with few threads or many."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from batchwright import kernels
from batchwright.kernels import program
from batchwright.kernels.linear.packing import pack
from batchwright.kernels.program import CannotRecord, SharedMemory, check, record
from batchwright.models.functional import add_rms_norm, rms_norm, silu_and_mul
from batchwright.models.layers import Linear

pytestmark = pytest.mark.cpu

SIZE, ROWS, LAYERS = 48, 5, 4


class Chain:
    """A few layers of products, norms and activations, of one input that stays in its place."""

    def __init__(self, *, quantized: bool = False) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(ROWS, SIZE)
        self.weight = torch.rand(SIZE) + 0.5
        self.linears = []
        for _ in range(LAYERS):
            linear = Linear(SIZE, 2 * SIZE)
            linear.weight.data = torch.randn(2 * SIZE, SIZE)
            if quantized:
                linear.quantize_int8()
            else:
                linear.hold(pack(linear.weight))
            self.linears.append(linear)

    @torch.inference_mode()
    def compute(self) -> torch.Tensor:
        residual, y = self.x, rms_norm(self.x, self.weight, 1e-5)
        for linear in self.linears:
            y, residual = add_rms_norm(silu_and_mul(linear(y)), residual, self.weight, 1e-5)
        return y


@pytest.fixture(autouse=True)
def threads():
    """As many as the test finds."""
    before = kernels.get_num_threads()
    yield
    kernels.set_num_threads(before)


def filled_with_nan(memory: SharedMemory) -> None:
    memory.of(0)[:] = 255  # all bits of a NaN


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_other_numbers_in_the_same_places(quantized, num_threads):
    """What is in the memory between calls when a run begins does not matter."""
    kernels.set_num_threads(num_threads)
    chain, memory = Chain(quantized=quantized), SharedMemory()
    start = chain.x.clone()
    expected = chain.compute().clone()
    chain.x.copy_(start)
    recorded, made = record(chain.compute, memory)
    assert torch.equal(recorded, expected)
    for seed in range(3):
        x = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(seed))
        chain.x.copy_(x)
        expected = chain.compute().clone()
        chain.x.copy_(x)
        filled_with_nan(memory)
        assert torch.equal(made.run(), expected)


def test_programs_share_memory_and_need_little():
    """Two programs, one after the other in the same memory, and no more of it with more layers."""
    memory = SharedMemory()
    first, second = Chain(), Chain()
    second.linears = second.linears * 8
    inputs = first.x.clone()
    first.linears = first.linears * 2
    programs = [record(chain.compute, memory)[1] for chain in (first, second)]
    row = 4 * SIZE * ROWS  # a norm's result, a product's, two rows wide, an activation's
    assert memory.of(0).nbytes <= 2 * (4 * row + 4 * 64)
    for chain, one in zip((first, second), programs, strict=True):
        chain.x.copy_(inputs)
        expected = chain.compute().clone()
        chain.x.copy_(inputs)
        assert torch.equal(one.run(), expected)


def test_memory_in_use_is_never_given_out_twice():
    generator = np.random.default_rng(0)
    for _ in range(50):
        pieces = []
        for at in range(40):
            piece = program._Piece(0, int(generator.integers(1, 5000)), is_counter=False)
            piece.first_use, piece.last_use = at, at + int(generator.integers(0, 8))
            pieces.append(piece)
        total = program._place(pieces)
        assert total < sum(piece.num_bytes for piece in pieces)
        for i, a in enumerate(pieces):
            assert a.offset + a.num_bytes <= total
            for b in pieces[i + 1 :]:
                if b.first_use <= a.last_use:
                    apart = a.offset + a.num_bytes <= b.offset or b.offset + b.num_bytes <= a.offset
                    assert apart


def test_what_torch_computes_is_refused():
    chain = Chain()
    start = chain.x.clone()
    expected = chain.compute().clone()
    chain.x.copy_(start)
    assert torch.equal(check(chain.compute), expected)
    with pytest.raises(CannotRecord, match=r"torch computes aten\.add"):
        check(lambda: chain.compute() + 1.0)


@pytest.mark.parametrize(
    "copying",
    [lambda y: y.T.reshape(-1), lambda y: y.T.contiguous(), lambda y: y.to(torch.float64)],
    ids=["reshape", "contiguous", "to"],
)
@torch.inference_mode()
def test_copies_are_refused_too(copying):
    """In inference mode these come undivided, and might be views."""
    chain = Chain()
    assert check(lambda: chain.compute().reshape(-1)).shape == (ROWS * SIZE,)
    with pytest.raises(CannotRecord):
        check(lambda: copying(chain.compute()))


def test_what_other_threads_call_is_not_recorded():
    chain, others = Chain(), []

    def compute() -> torch.Tensor:
        thread = threading.Thread(target=lambda: others.append(Chain().compute()))
        thread.start()
        thread.join()
        return chain.compute()

    alone = record(Chain().compute, SharedMemory())[1]
    assert record(compute, SharedMemory())[1].kernels == alone.kernels
    assert len(others) == 1


def test_seconds_are_told_by_kernel():
    chain = Chain()
    _, made = record(chain.compute, SharedMemory())
    assert sum(made.seconds_by_kernel().values()) == 0.0
    start = time.perf_counter()
    made.run()
    total = time.perf_counter() - start
    seconds = made.seconds_by_kernel()
    assert set(seconds) == {"rms_norm", "linear", "gated_activation"}
    assert 0.0 < seconds["linear"] < sum(seconds.values()) < 1.1 * total


WHAT_IS_IMPORTED = """
import sys
from batchwright.kernels.program import check
from tests.kernels.test_program import Chain
check(Chain().compute)
assert "torch._dynamo.eval_frame" not in sys.modules
"""


def test_a_check_imports_no_compiler():
    """torch's own, more than a second of the start-up."""
    subprocess.run([sys.executable, "-c", WHAT_IS_IMPORTED], check=True, timeout=120)


FEWER_THREADS = """
import torch
from batchwright import kernels
from batchwright.kernels.program import SharedMemory, record
from tests.kernels.test_program import Chain
kernels.set_num_threads(2)
assert kernels.get_num_threads() == 2
chain = Chain()
start = chain.x.clone()
expected = chain.compute().clone()
chain.x.copy_(start)
_, made = record(chain.compute, SharedMemory())
chain.x.copy_(start)
assert torch.equal(made.run(), expected)
assert not made.threads_come
made.run()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_a_loop_that_gets_fewer_threads_ends():
    """OpenMP's own limit: the threads that a program waits for never come."""
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1", "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FEWER_THREADS]
    subprocess.run(command, env=environment, check=True, timeout=120)

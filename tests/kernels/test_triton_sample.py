"""The GPU sampler draws the tokens of its twin: on a card, or in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    DEVICE = "cuda"
elif os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE = "cpu"
else:
    pytest.skip("no CUDA device and no interpreter", allow_module_level=True)

from batchwright.errors import ShapeError
from batchwright.kernels.sample.layout import SLOT
from batchwright.kernels.sample.triton import append_tokens, make_scratch, sample_rows
from benchmarks.gpu.sample_case import SampleProblem, logprob_errors, make_problem

# the interpreter computes both sides of a tl.where
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(problem: SampleProblem, *, block: int = 32, special: bool = True) -> None:
    found, right = problem.run(DEVICE, block=block, special=special), problem.run_twin()
    assert found.tolist() == right.tolist()
    assert np.unique(right).size > 2
    if special:
        assert problem.scratch is not None and not problem.scratch.counts.any()


def test_all_options_together() -> None:
    check(make_problem(18, 133, torch.float32))


def test_filters() -> None:
    check(make_problem(12, 201, torch.float32, adjusted=False, masked=False, seed=1), block=64)


def test_a_row_in_one_block() -> None:
    check(make_problem(12, 100, torch.float32, seed=2), block=4096)


def test_adjusted_rows_without_filters() -> None:
    check(make_problem(18, 133, torch.float16, filtered=False, masked=False, seed=3))


@pytest.mark.parametrize("masked", [False, True])
def test_plain_rows_need_no_scratch(masked: bool) -> None:
    problem = make_problem(
        12, 201, torch.float32, filtered=False, adjusted=False, masked=masked, seed=4
    )
    check(problem, block=64, special=False)


def test_many_tied_tokens_around_the_edge_of_the_nucleus() -> None:
    problem = make_problem(
        8, 300, torch.float32, kinds=("ties", "constant"), adjusted=False, masked=False
    )
    problem.slots["temperature"] = (1, 0.5, 2, 1, 30, 1, 1, 1)
    problem.slots["top_p"] = (0.3, 0.5, 0.7, 0.9, 0.5, 0.0, 0.25, 0.999)
    problem.slots["top_k"] = (0, 7, 0, 0, 40, 0, 299, 300)
    problem.slots["min_p"] = (0, 0, 0.2, 0, 0, 0, 0, 0)
    check(problem, block=128)


def test_more_samples_than_programs_share_scratch() -> None:
    problem = make_problem(9, 70, torch.float32, seed=5)
    problem.scratch = make_scratch(2, 70, DEVICE)
    check(problem)


def test_noise_of_a_flat_row_is_that_of_the_definition() -> None:
    """Nothing but the noise decides, in every lane of several blocks."""
    problem = make_problem(
        14, 515, torch.float32, kinds=("constant",), filtered=False, adjusted=False, masked=False
    )
    problem.slots["temperature"] = 1
    check(problem, block=128, special=False)


def test_appended_tokens() -> None:
    slots = np.zeros(4, SLOT)
    slots["num_tokens"] = (3, 0, 8, 2)
    history = torch.full((4, 8), -5, dtype=torch.int32, device=DEVICE)
    there = torch.from_numpy(slots.view(np.uint8).reshape(4, -1)).to(DEVICE, copy=True)
    index = torch.tensor([3, 1, 0, 2], dtype=torch.int32, device=DEVICE)
    append_tokens(there, history, index, torch.tensor([7, 8, -1, 6], dtype=torch.int32).to(DEVICE))
    after = there.cpu().numpy().view(SLOT).reshape(4)
    assert after["num_tokens"].tolist() == [4, 0, 8, 3]
    assert history[0, 3] == -1 and history[3, 2] == 7 and (history == -5).sum() == 30


def test_disagreeing_tensors_are_refused() -> None:
    i = torch.zeros(2, dtype=torch.int32)
    tables = {"bias_ids": i, "bias_values": i, "suppressed_ids": i, "history": i}
    logits, slots = torch.zeros(2, 40), torch.zeros(2, SLOT.itemsize, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="indices"):
        sample_rows(logits, i, i[:1], i, slots, **tables)
    with pytest.raises(ShapeError, match="slots are"):
        sample_rows(logits, i, i, i, slots[:, :8], **tables)
    with pytest.raises(ShapeError, match="contiguous"):
        sample_rows(logits.T, i, i, i, slots, **tables)
    with pytest.raises(ShapeError, match="belong together"):
        sample_rows(logits, i, i, i, slots, mask_of_sample=i, **tables)
    with pytest.raises(ShapeError, match="40 bits"):
        sample_rows(logits, i, i, i, slots, mask_of_sample=i, allowed=i[:, None], **tables)
    with pytest.raises(ShapeError, match="scratch"):
        sample_rows(logits, i, i, i, slots, scratch=make_scratch(2, 39, "cpu"), **tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logprobs_equal_their_twin(dtype: torch.dtype) -> None:
    errors = logprob_errors(11, 133, dtype, DEVICE, max_top=5, block=32)
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


def test_logprobs_without_rivals() -> None:
    errors = logprob_errors(9, 133, torch.float32, DEVICE, max_top=0, block=256)
    assert all(error <= tolerance for error, tolerance in errors.values()), errors

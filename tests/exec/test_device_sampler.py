"""What starting rows want drawn comes to the device with their step; the tokens are the CPU's.

SlotLists without kernels; DeviceSampler on a card or in Triton's interpreter (TRITON_INTERPRET=1,
see test_device_interpreter.py).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from batchwright.exec.device.layout import Layout
from batchwright.exec.device.sampler import DeviceSampler, Drawn, HostSampler, Sampler
from batchwright.exec.device.slot_lists import CHUNK, SlotLists
from batchwright.exec.device.transfer import Upload
from batchwright.request import SamplingParams
from batchwright.step import NewSequence, Step
from tests.exec.waiting import nothing_waits

pytestmark = pytest.mark.cpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    not KERNELS, reason="no kernels: neither a card nor Triton's interpreter"
)
VOCAB_SIZE = 70
NUM_SLOTS = 6
NONE = np.empty(0, np.int32)


class Sent:
    """Arrays to the device as the executor sends them."""

    def __init__(self) -> None:
        self.upload = Upload(1 << 16, DEVICE)
        self.num_bytes = 0

    def __call__(self, arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
        layout = Layout.of(arrays)
        layout.write(arrays, self.upload.begin(layout.end))
        self.num_bytes = layout.end
        return layout.views(self.upload.send(layout.end))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
def test_lists_of_slots(dtype: torch.dtype) -> None:
    """Several at once, shorter and longer than what was there, wider than the lines; others keep
    what they have."""
    lists, sent = SlotLists("ids", 7, 5, dtype, DEVICE), Sent()
    rng = np.random.default_rng(0)
    expected: dict[int, Any] = {}
    for longest in (5, 16, 17, 3, 40, 100, 33):
        slots = rng.permutation(7)[: rng.integers(1, 5)].tolist()
        counts = [longest, *rng.integers(1, longest + 1, len(slots) - 1)]
        kind = np.int32 if dtype == torch.int32 else np.float32
        new = {slot: rng.integers(1, 99, n).astype(kind) for slot, n in zip(slots, counts)}
        with nothing_waits():
            lists.apply(sent(lists.inputs(new)))
        expected |= new
        found = lists.lines.cpu().numpy()
        for slot, one in expected.items():
            assert found[slot, : len(one)].tolist() == one.tolist()
        assert lists.lines.dtype == dtype and lists.lines.shape[1] % CHUNK == 0


def test_lines_are_widened_only_for_a_list_that_has_no_room() -> None:
    lists = SlotLists("ids", 3, 20, torch.int32, DEVICE)
    assert lists.inputs({}) == {}
    before = lists.lines
    lists.apply({})
    lists.inputs({1: np.ones(32, np.int32)})
    assert lists.lines is before and before.shape == (3, 32)
    lists.inputs({1: np.ones(33, np.int32)})
    assert lists.lines.shape == (3, 64)


def new_sequence(slot: int, tokens: list[int], num_prompt: int = 2, **params: Any) -> NewSequence:
    end = params.pop("end_token_ids", ())
    return NewSequence(
        slot, np.array(tokens, np.int32), num_prompt, SamplingParams(**params), 7 + slot, 0, end
    )


def step_of(new: list[NewSequence], slots: list[int], **fields: Any) -> Step:
    fields = {"score_tokens": NONE, "score_targets": NONE} | fields
    return Step(
        step_id=0, finished_slots=NONE, new_sequences=tuple(new), table_updates=(),
        block_copies=(), slots=NONE, cu_seqlens_q=NONE, token_ids=NONE, positions=NONE,
        kv_slots=(), sample_tokens=NONE, sample_slots=np.array(slots, np.int32), **fields,
    )  # fmt: skip


def draw(sampler: Sampler, sent: Sent, logits: torch.Tensor, step: Step, positions: Any) -> Drawn:
    for new in step.new_sequences:
        sampler.add(new)
    views = sent(sampler.inputs(step, positions))
    sampler.apply(views)
    return sampler.draw(logits, step, positions, views)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.0, "repetition_penalty": 3.0},
    {"temperature": 1.0, "presence_penalty": 2.0, "frequency_penalty": 1.0, "top_k": 9},
    {"temperature": 0.0, "logit_bias": {3: 4.0, 9: -50.0}},
    {"temperature": 0.7, "logit_bias": dict.fromkeys(range(0, 60, 2), -9.0)},
    {"temperature": 0.0, "min_tokens": 6, "end_token_ids": tuple(range(5, 45))},
    {"temperature": 0.0, "min_tokens": 2, "end_token_ids": (1, 2), "frequency_penalty": 1.5},
    {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3, "logprobs": 2},
]


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes both sides
def test_tokens_are_those_of_the_cpu_whatever_starts_where() -> None:
    """Rows of every kind take slots that others had, several a step; some are preempted and come
    back in another slot with what they drew. Tables grow on the way. Nothing waits."""
    host = HostSampler(NUM_SLOTS, 80, VOCAB_SIZE)
    there = DeviceSampler(NUM_SLOTS, 80, VOCAB_SIZE, DEVICE)
    widths = {name: one.lines.shape[1] for name, one in there._lists.items()}
    rng = np.random.default_rng(1)
    sent = Sent()
    running: dict[int, tuple[int, dict[str, Any], list[int]]] = {}  # prompt, params, tokens
    waiting: list[tuple[int, dict[str, Any], list[int]]] = []
    num_back, kind = 0, 0
    for number in range(24):
        for slot in list(running):
            chance = rng.random()
            if chance < 0.2:
                del running[slot]  # finished
            elif chance < 0.35:
                waiting.append(running.pop(slot))
        free = [slot for slot in range(NUM_SLOTS) if slot not in running]
        new = []
        for slot in rng.permutation(free)[: rng.integers(0, 4)].tolist():
            if waiting and rng.random() < 0.6:
                num_prompt, params, tokens = waiting.pop(0)
                num_back += len(tokens) > num_prompt and "penalty" in str(params)
            else:
                params, kind = KINDS[kind % len(KINDS)], kind + 1
                tokens = rng.integers(0, VOCAB_SIZE, rng.integers(1, 40)).tolist()
                num_prompt = len(tokens)
            running[slot] = num_prompt, params, tokens
            new.append(new_sequence(slot, list(tokens), num_prompt, **dict(params)))
        # a row whose prompt is not computed yet draws nothing
        slots = [slot for slot in running if rng.random() < 0.9]
        step = step_of(new, slots)
        positions = np.array([len(running[s][2]) - running[s][0] for s in slots], np.int32)
        logits = torch.from_numpy(2 * rng.standard_normal((len(slots), VOCAB_SIZE))).float()
        expected = draw(host, Sent(), logits, step, positions).token_ids.tolist()
        on_device = logits.to(DEVICE)
        with nothing_waits():
            drawn = draw(there, sent, on_device, step, positions).token_ids
        assert drawn.tolist() == expected, f"step {number}"
        for slot, token in zip(slots, expected):
            running[slot][2].append(token)
    assert num_back >= 3 and kind > len(KINDS)
    now = {name: one.lines.shape[1] for name, one in there._lists.items()}
    assert now["bias_ids"] == now["bias_values"] > widths["bias_ids"]
    assert now["suppressed_ids"] > widths["suppressed_ids"] and now["history"] == widths["history"]


@needs_kernels
def test_a_slot_is_free_of_what_its_last_row_wanted() -> None:
    """And rows that want nothing of the kind send nothing of the kind."""
    sampler, sent = DeviceSampler(2, 20, 8, DEVICE), Sent()
    logits = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7]], device=DEVICE)
    first = new_sequence(0, [7, 7], temperature=0.0, logit_bias={7: -9.0}, repetition_penalty=2.0)
    zero = np.zeros(1, np.int32)
    assert draw(sampler, sent, logits, step_of([first], [0]), zero).token_ids.tolist() == [6]
    second = new_sequence(0, [7, 7], temperature=0.0)
    assert draw(sampler, sent, logits, step_of([second], [0]), zero).token_ids.tolist() == [7]
    sampler.add(second)
    arrays = sampler.inputs(step_of([second], [0]), zero)
    assert set(arrays) == {"new_slots", "new_lines", "draw_slots", "output_positions"}
    assert set(sampler.inputs(step_of([], [0]), zero)) == {"draw_slots", "output_positions"}


@needs_kernels
@pytest.mark.parametrize("score_top", [0, 3, 100])
def test_scores_are_those_of_the_cpu(score_top: int) -> None:
    """More of them than slots; more rivals than tokens are given as far as there are any."""
    rng = np.random.default_rng(4)
    targets = rng.integers(0, VOCAB_SIZE, 11).astype(np.int32)
    step = step_of([], [], score_tokens=targets, score_targets=targets, score_top=score_top)
    logits = torch.from_numpy(rng.standard_normal((8, VOCAB_SIZE))).float()
    samplers = HostSampler(2, 20, VOCAB_SIZE), DeviceSampler(2, 20, VOCAB_SIZE, DEVICE)
    views, rows = Sent()(samplers[1].inputs(step, NONE)), slice(3, 11)
    expected = samplers[0].score(logits, step, rows, {})
    on_device = logits.to(DEVICE)
    with nothing_waits():
        found = samplers[1].score(on_device, step, rows, views)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one.cpu(), other, rtol=0, atol=1e-6)

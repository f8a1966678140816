"""Steps as messages: what the other ranks need arrives, and nothing else does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from batchwright.step import Step, TableUpdate
from batchwright.tensor_parallel.step_message import decode_step, encode_step

LEFT_BEHIND = {
    *("finished_slots", "new_sequences", "mask_of_sample", "masks", "score_targets", "score_top"),
    *("pool_rows", "pool_done", "parents", "adapter_ids"),
}


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape) - 1


def step(num_groups: int, **changes) -> Step:
    fields = {
        "step_id": 12,
        "finished_slots": numbers(2),
        "new_sequences": (),
        "table_updates": tuple(
            TableUpdate(numbers(n), numbers(n) + 5, numbers(n) + 7) for n in range(num_groups)
        ),
        "block_copies": tuple(numbers(n, 2) for n in range(num_groups)),
        "slots": numbers(3),
        "cu_seqlens_q": np.array([0, 2, 3, 7], np.int32),
        "token_ids": numbers(7),
        "positions": numbers(7) + 9,
        "kv_slots": tuple(numbers(7) + n for n in range(num_groups)),
        "sample_tokens": numbers(2),
        "sample_slots": numbers(2) + 4,
        "score_tokens": numbers(3),
        "score_targets": numbers(3),
        "masks": np.ones((1, 4), np.uint32),
    }
    return Step(**{**fields, **changes})


def equal(a, b) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray):
        return b.dtype == np.int32 and b.flags.writeable and np.array_equal(a, b)
    return a == b


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_copies": numbers(4, 2), "position_ids": numbers(7) + 20},
        {"kv_copies": numbers(0, 2)},
        {"saved_blocks": numbers(3, 2), "loaded_blocks": numbers(1, 2) + 9},
        {"loaded_blocks": numbers(0, 2)},
        {"score_tokens": numbers(0), "sample_tokens": numbers(0), "sample_slots": numbers(0)},
    ],
)
def test_what_arrives(num_groups, changes):
    sent = step(num_groups, **changes)
    arrived = decode_step(encode_step(sent))
    for field in dataclasses.fields(Step):
        if field.name not in LEFT_BEHIND:
            assert equal(getattr(sent, field.name), getattr(arrived, field.name)), field.name
    assert arrived.masks is None and not len(arrived.score_targets)


def test_a_step_of_decoding_is_small():
    num = 256
    decoding = step(
        1,
        **dict.fromkeys(("slots", "token_ids", "positions"), numbers(num)),
        **dict.fromkeys(("sample_tokens", "sample_slots"), numbers(num)),
        cu_seqlens_q=numbers(num + 1),
        kv_slots=(numbers(num),),
        masks=np.ones((num, 4000), np.uint32),
    )
    assert len(encode_step(decoding)) < 8000

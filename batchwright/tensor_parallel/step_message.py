"""A Step as one array of int32: what ranks beside rank 0 need of it.

They compute hidden states and logits and draw nothing, so sampling parameters, prompts, masks,
score targets and pooling stay behind: a step of 256 decoding rows is 7 KB. Layout: the number of
elements of every array (-1: None), then all arrays.
"""

from __future__ import annotations

import numpy as np

from batchwright.request import Int32Array
from batchwright.step import Step, TableUpdate

_NONE = -1
_GROUP_ARRAYS = 5
_OTHER_ARRAYS = 11
_DRAWN_ARRAYS = 3
_EMPTY = np.empty(0, np.int32)


def encode_step(step: Step) -> bytes:
    """The message of a Step."""
    assert step.parents is None and step.adapter_ids is None, "not known to the ranks yet"
    arrays: list[Int32Array | None] = []
    for update, copies, kv_slots in zip(
        step.table_updates, step.block_copies, step.kv_slots, strict=True
    ):
        arrays += [update.slots, update.indices, update.block_ids, copies, kv_slots]
    arrays += [
        np.array([step.step_id], np.int32),
        step.kv_copies,
        step.saved_blocks,
        step.loaded_blocks,
        step.slots,
        step.cu_seqlens_q,
        step.token_ids,
        step.positions,
        step.position_ids,
        step.sample_tokens,
        step.sample_slots,
        step.score_tokens,
    ]
    sizes = [_NONE if array is None else array.size for array in arrays]
    flat = [array.reshape(-1) for array in arrays if array is not None]
    return np.concatenate(
        [np.array([len(step.kv_slots), *sizes], np.int32), *flat], dtype=np.int32
    ).tobytes()


def decode_step(message: bytes) -> Step:
    """The Step of a message; what was left behind is empty."""
    words = np.frombuffer(message, np.int32).copy()  # kernels want arrays that can be written to
    num_groups = int(words[0])
    num_arrays = _GROUP_ARRAYS * num_groups + _OTHER_ARRAYS + 1
    sizes = words[1 : 1 + num_arrays]
    ends = 1 + num_arrays + np.maximum(sizes, 0).cumsum()
    arrays = [
        None if size == _NONE else words[end - size : end]
        for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)
    ]
    groups = [_GROUP_ARRAYS * group for group in range(num_groups)]
    step_id, *pairs, slots, cu_seqlens_q, token_ids, positions, position_ids = arrays[
        _GROUP_ARRAYS * num_groups : -_DRAWN_ARRAYS
    ]
    kv_copies, saved_blocks, loaded_blocks = (
        None if array is None else array.reshape(-1, 2) for array in pairs
    )
    drawn = arrays[-_DRAWN_ARRAYS:]
    return Step(
        step_id=int(_there(step_id)[0]),
        finished_slots=_EMPTY,
        new_sequences=(),
        table_updates=tuple(
            TableUpdate(*(_there(array) for array in arrays[first : first + 3])) for first in groups
        ),
        block_copies=tuple(_there(arrays[first + 3]).reshape(-1, 2) for first in groups),
        kv_copies=kv_copies,
        saved_blocks=saved_blocks,
        loaded_blocks=loaded_blocks,
        slots=_there(slots),
        cu_seqlens_q=_there(cu_seqlens_q),
        token_ids=_there(token_ids),
        positions=_there(positions),
        kv_slots=tuple(_there(arrays[first + 4]) for first in groups),
        position_ids=position_ids,
        sample_tokens=_there(drawn[0]),
        sample_slots=_there(drawn[1]),
        score_tokens=_there(drawn[2]),
        score_targets=_EMPTY,
    )


def _there(array: Int32Array | None) -> Int32Array:
    assert array is not None
    return array

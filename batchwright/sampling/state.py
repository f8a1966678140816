"""The sampler: what each slot asked for, as arrays, and the draw of a whole step from them.

Python work is per change (a sequence that arrives), never per row or token. Drawing itself is
kernels/sample; which noise a draw uses is sampling/noise.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from batchwright.errors import RequestError, ShapeError
from batchwright.kernels import get_num_threads
from batchwright.kernels.sample.layout import SLOT
from batchwright.kernels.sample.numba import Scratch, argmax_rows, make_scratch, sample_rows
from batchwright.kernels.sample.rowmath import MAX_VOCAB_SIZE
from batchwright.kernels.token_logprobs.numba import logprob_rows
from batchwright.request import Float32Array, Int32Array, SamplingParams
from batchwright.step import NewSequence, TokenLogprobs

NO_LOGPROBS = -1
MIN_TEMPERATURE = 1e-8  # keeps 1 / temperature and logits divided by it finite in float32


Lists = dict[int, Int32Array] | dict[int, Float32Array]
"""By slot; none is empty."""


class SamplingState:
    """Per-slot sampling state of an executor.

    Args:
        max_num_seqs: number of slots.
        max_model_len: longest sequence, prompt and output together.
        vocab_size: width of a logits row.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, vocab_size: int) -> None:
        if not 0 < vocab_size <= MAX_VOCAB_SIZE:
            raise ShapeError(
                f"vocab_size is {vocab_size}; sampling supports 1 to {MAX_VOCAB_SIZE} tokens"
            )
        self.vocab_size = vocab_size
        self._slots = np.zeros(max_num_seqs, SLOT)
        self._is_greedy = np.zeros(max_num_seqs, np.bool_)  # an argmax of the raw logits is enough
        self._num_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int32)
        self._bias_ids = np.empty((max_num_seqs, 1), np.int32)
        self._bias_values = np.empty((max_num_seqs, 1), np.float32)
        self._suppressed_ids = np.empty((max_num_seqs, 8), np.int32)
        # Only lines of slots with penalties are ever touched, so only they take memory.
        self._history = np.empty((max_num_seqs, max_model_len + 1), np.int32)
        self._scratch: Scratch | None = None

    def add(self, new: NewSequence) -> None:
        """Install a sequence in its slot, whatever was there.

        `new.token_ids` may hold generated tokens after the prompt (a sequence that comes back).

        Raises:
            RequestError: logit_bias names a token outside the vocabulary.
        """
        params, slot = new.params, new.slot
        if params.logit_bias:
            self._set_bias(slot, params.logit_bias)
        self._slots[slot] = self._record(new)
        suppressed = [token for token in new.end_token_ids if 0 <= token < self.vocab_size]
        if params.grammar is not None:
            suppressed = []  # its masks keep to min_tokens, as far as the grammar lets them
        self._suppressed_ids = _widened(self._suppressed_ids, len(suppressed))
        self._suppressed_ids[slot, : len(suppressed)] = suppressed
        self._slots[slot]["num_suppressed"] = len(suppressed)
        if _has_penalties(params):
            self._history[slot, : len(new.token_ids)] = new.token_ids
            self._slots[slot]["num_tokens"] = len(new.token_ids)
        self._is_greedy[slot] = (
            params.temperature == 0.0
            and not params.logit_bias
            and not _has_penalties(params)
            and not (params.min_tokens and suppressed)
        )
        self._num_logprobs[slot] = NO_LOGPROBS if params.logprobs is None else params.logprobs

    def _record(self, new: NewSequence) -> npt.NDArray[np.void]:
        params = new.params
        record = np.zeros((), SLOT)
        record["noise_key"] = new.noise_key
        record["sample_index"] = new.sample_index
        record["num_prompt_tokens"] = new.num_prompt_tokens
        record["num_biased"] = len(params.logit_bias)
        record["top_k"] = max(params.top_k, 0)
        # As small as validation lets through; 0 is greedy.
        record["temperature"] = params.temperature and max(params.temperature, MIN_TEMPERATURE)
        for name in (
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_tokens",
        ):
            record[name] = getattr(params, name)
        return record

    def _set_bias(self, slot: int, bias: dict[int, float]) -> None:
        low, high = min(bias), max(bias)
        if low < 0 or high >= self.vocab_size:
            raise RequestError(
                f"logit_bias names token id {low if low < 0 else high}; "
                f"the model's ids are 0 to {self.vocab_size - 1}",
                param="logit_bias",
            )
        self._bias_ids = _widened(self._bias_ids, len(bias))
        self._bias_values = _widened(self._bias_values, len(bias))
        self._bias_ids[slot, : len(bias)] = list(bias)
        self._bias_values[slot, : len(bias)] = list(bias.values())

    def lists(self, slots: npt.NDArray[np.int64]) -> dict[str, Lists]:
        """What is kept of slots beside their records, for a sampler that keeps it elsewhere.

        Returns:
            bias_ids, bias_values, suppressed_ids, history: arguments of the kernels in
            kernels/sample; only slots that have any, views that hold until the next `add`.
        """
        records = self._slots[slots]
        num_suppressed = np.where(records["min_tokens"] > 0, records["num_suppressed"], 0)
        return {
            "bias_ids": _lists(self._bias_ids, slots, records["num_biased"]),
            "bias_values": _lists(self._bias_values, slots, records["num_biased"]),
            "suppressed_ids": _lists(self._suppressed_ids, slots, num_suppressed),
            "history": _lists(self._history, slots, records["num_tokens"]),
        }

    def records(self, slots: npt.NDArray[np.int64]) -> Int32Array:
        """[num_slots, SLOT.itemsize / 4] int32, the words of the slots' records."""
        words: Int32Array = self._slots[slots].view(np.int32).reshape(len(slots), -1)
        return words

    def is_special(self, slot: int) -> bool:
        """Whether a draw of this slot needs more than its logits and a temperature."""
        record = self._slots[slot]
        return bool(
            record["num_biased"]
            or record["num_tokens"]
            or (record["num_suppressed"] and record["min_tokens"])
            or record["top_k"]
            or record["top_p"] < 1
            or record["min_p"] > 0
        )

    def num_logprobs(self, slots: Int32Array) -> Int32Array:
        """[num_slots] rivals that each wants reported; NO_LOGPROBS: no log-probabilities."""
        wanted: Int32Array = self._num_logprobs[slots]
        return wanted

    def are_plain(self, slots: Int32Array) -> bool:
        """Whether an argmax of the raw logits is all that these slots want of a draw."""
        return bool((self._is_greedy[slots] & (self._num_logprobs[slots] < 0)).all())

    def sample(
        self,
        logits: Float32Array,
        row_of_sample: Int32Array,
        slots: Int32Array,
        output_positions: Int32Array,
        allowed: npt.NDArray[np.uint32] | None = None,
        mask_of_sample: Int32Array | None = None,
    ) -> tuple[Int32Array, TokenLogprobs | None]:
        """Draw one token per sample. Changes no state: call `append` with what is kept of it.

        Args:
            logits: [num_rows, vocab_size] float32, C-contiguous; not changed.
            row_of_sample: [num_samples] int32, the logits row of each draw; rows may repeat.
            slots: [num_samples] int32, distinct.
            output_positions: [num_samples] int32, output tokens the slot had before this draw.
            allowed: [num_masks, at least ceil(vocab_size / 32)] uint32; token v may be drawn if
                bit v % 32 of word v // 32 is set. None: every token may.
            mask_of_sample: [num_samples] int32, the line of `allowed` of each draw; -1: every token
                may. None: draws and lines correspond.
        Returns:
            token_ids: [num_samples] int32; -1 where no token can be drawn: the row has a NaN or
                +inf, or all its logits are -inf (after penalties, bias and `allowed`).
            Log-probabilities of the raw logits if any of the slots asked for them, else None. There
                is a line per sample; lines of slots that did not ask, and of tokens -1, hold NaN,
                rank 0 and ids -1, and so do places beyond a slot's own count.

        Exactness: *bits*. A draw depends on its row, its slot's parameters and history, and the
        noise of (key, sample_index, output_position), and on nothing else.
        """
        _check(logits, self.vocab_size)
        if allowed is None and bool(self._is_greedy[slots].all()):
            token_ids = argmax_rows(logits, row_of_sample)
        else:
            if allowed is None:
                allowed = np.empty((1, 0), np.uint32)
                mask_of_sample = np.full(len(slots), -1, np.int32)
            elif mask_of_sample is None:
                mask_of_sample = np.arange(len(slots), dtype=np.int32)
            token_ids = self._draw(
                logits, row_of_sample, slots, output_positions, allowed, mask_of_sample
            )
        num_top = self._num_logprobs[slots]
        if not bool((num_top >= 0).any()):
            return token_ids, None
        return token_ids, logprob_rows(logits, row_of_sample, token_ids, num_top)

    def _draw(
        self,
        logits: Float32Array,
        row_of_sample: Int32Array,
        slots: Int32Array,
        output_positions: Int32Array,
        allowed: npt.NDArray[np.uint32],
        mask_of_sample: Int32Array,
    ) -> Int32Array:
        if self._scratch is None or len(self._scratch.words) < get_num_threads():
            self._scratch = make_scratch(get_num_threads(), self.vocab_size)
        return sample_rows(
            logits,
            row_of_sample,
            slots,
            output_positions,
            self._slots,
            self._bias_ids,
            self._bias_values,
            self._suppressed_ids,
            self._history,
            allowed,
            mask_of_sample,
            self._scratch,
        )

    def append(self, slots: Int32Array, token_ids: Int32Array) -> None:
        """Add drawn tokens to the history of their slots (distinct); penalties look at it.

        Slots without penalties keep no history. -1 is kept and ignored.
        """
        keeps = self._slots["num_tokens"][slots] > 0
        if not keeps.any():
            return
        kept = slots[keeps]
        lengths = self._slots["num_tokens"][kept]
        if int(lengths.max()) >= self._history.shape[1]:
            raise ShapeError(f"a sequence outgrew max_model_len = {self._history.shape[1] - 1}")
        self._history[kept, lengths] = token_ids[keeps]
        self._slots["num_tokens"][kept] = lengths + 1


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _lists(lines: Any, slots: npt.NDArray[np.int64], lengths: Int32Array) -> Lists:
    has_any = lengths > 0
    pairs = zip(slots[has_any].tolist(), lengths[has_any].tolist(), strict=True)
    return {slot: lines[slot, :length] for slot, length in pairs}


def _widened(array: Any, num_columns: int) -> Any:
    """`array` itself, or a copy with at least twice the columns if it is too narrow."""
    if num_columns <= array.shape[1]:
        return array
    wider = np.empty((len(array), max(num_columns, 2 * array.shape[1])), array.dtype)
    wider[:, : array.shape[1]] = array
    return wider


def _check(logits: Float32Array, vocab_size: int) -> None:
    if logits.dtype != np.float32 or logits.ndim != 2 or not logits.flags.c_contiguous:
        raise ShapeError(
            f"logits must be C-contiguous float32 rows, not {logits.dtype} "
            f"{logits.shape} with strides {logits.strides}"
        )
    if logits.shape[1] != vocab_size:
        raise ShapeError(f"logits have {logits.shape[1]} columns; vocab_size is {vocab_size}")

"""Random sampling problems for the GPU kernel, and their draws by the naive twin."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from batchwright.kernels.sample import naive
from batchwright.kernels.sample.layout import SLOT
from batchwright.kernels.sample.triton import BLOCK, Scratch, make_scratch, sample_rows
from batchwright.kernels.token_logprobs.naive import token_logprobs
from batchwright.kernels.token_logprobs.triton import logprob_rows

LOGPROB_TOLERANCE = 4e-6
"""Relative above 1, else absolute: exponentials with 22 good bits, summed in fp32 in every lane."""

KINDS = ("normal", "peaked", "ties", "constant", "zipf", "huge", "nan", "inf", "impossible")


def make_row(kind: str, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """[vocab_size] float32 logits of one kind."""
    x = 2 * rng.standard_normal(vocab_size)
    if kind == "peaked":  # one token holds nearly everything
        x[rng.integers(vocab_size)] += 20
    elif kind == "ties":  # few distinct values, both zeros
        x = np.round(x) / 2 * rng.choice([-1.0, 1.0], vocab_size)
    elif kind == "constant":
        x[:] = 3.0
    elif kind == "zipf":
        x = 0.3 * x - 1.2 * np.log(rng.permutation(vocab_size) + 5.0)
    elif kind == "huge":
        x *= 1e4
    elif kind == "impossible":
        x[:] = -np.inf
    elif kind in ("nan", "inf"):
        x[vocab_size // 2] = float(kind)
    return x.astype(np.float32)


@dataclass
class SampleProblem:
    """One call of sample_rows: inputs as NumPy arrays, logits as a torch tensor on the CPU.

    Attributes:
        logits: [num_rows, vocab_size], fp32, fp16 or bf16.
        slots: [num_samples] SLOT; the slot of sample i is i.
        history, bias_ids, bias_values, suppressed_ids: a line per slot.
        allowed: [num_masks, words] uint32, or None.
        mask_of_sample: [num_samples].
    """

    logits: torch.Tensor
    rows: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    history: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray
    suppressed_ids: np.ndarray
    allowed: np.ndarray | None
    mask_of_sample: np.ndarray
    scratch: Scratch | None = field(default=None)

    def run(self, device: str, *, block: int = BLOCK, special: bool = True) -> np.ndarray:
        """Draw by the kernel."""
        num_samples, vocab_size = len(self.rows), self.logits.shape[1]

        def there(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(x).to(device, copy=True)

        if special and self.scratch is None:
            self.scratch = make_scratch(num_samples, vocab_size, device)
            self.scratch.rows.fill_(torch.nan)  # nothing may be read that was not written
            self.scratch.list_logits.fill_(torch.nan)
            self.scratch.list_tokens.fill_(1 << 30)
        masked = self.allowed is not None
        tokens = sample_rows(
            self.logits.to(device),
            there(self.rows),
            torch.arange(num_samples, dtype=torch.int32, device=device),
            there(self.positions),
            there(self.slots.view(np.uint8).reshape(num_samples, SLOT.itemsize)),
            bias_ids=there(self.bias_ids),
            bias_values=there(self.bias_values),
            suppressed_ids=there(self.suppressed_ids),
            history=there(self.history),
            allowed=there(self.allowed.view(np.int32)) if self.allowed is not None else None,
            mask_of_sample=there(self.mask_of_sample) if masked else None,
            scratch=self.scratch if special else None,
            out=torch.full((num_samples,), -7, dtype=torch.int32, device=device),
            block=block,
        )
        found: np.ndarray = tokens.cpu().numpy()
        return found

    def run_twin(self) -> np.ndarray:
        """Draw by naive.py."""
        return np.array([self._draw_twin(i) for i in range(len(self.rows))], np.int32)

    def _draw_twin(self, i: int) -> int:
        if self.rows[i] < 0:
            return -1
        slot, row = self.slots[i], self.logits[self.rows[i]].float().numpy()
        num_prompt, num_tokens = int(slot["num_prompt_tokens"]), int(slot["num_tokens"])
        num_biased = int(slot["num_biased"])
        history = self.history[i, :num_tokens]
        suppresses = self.positions[i] < slot["min_tokens"]
        allowed = None
        if self.allowed is not None and self.mask_of_sample[i] >= 0:
            bits = np.unpackbits(
                self.allowed[self.mask_of_sample[i]].view(np.uint8), bitorder="little"
            )
            allowed = bits[: len(row)].astype(np.bool_)
        with np.errstate(invalid="ignore"):
            row = naive.adjust_logits(
                row,
                bias=dict(zip(self.bias_ids[i, :num_biased].tolist(),
                              self.bias_values[i, :num_biased].tolist(), strict=True)),
                prompt_ids=history[:num_prompt],
                output_ids=history[num_prompt:],
                repetition_penalty=float(slot["repetition_penalty"]) if num_tokens else 1.0,
                frequency_penalty=float(slot["frequency_penalty"]),
                presence_penalty=float(slot["presence_penalty"]),
                suppressed_ids=tuple(self.suppressed_ids[i]) if suppresses else (),
                allowed=allowed,
            )  # fmt: skip
        return naive.draw_token(
            row,
            temperature=float(slot["temperature"]),
            top_k=int(slot["top_k"]),
            top_p=float(slot["top_p"]),
            min_p=float(slot["min_p"]),
            noise_key=int(slot["noise_key"]),
            sample_index=int(slot["sample_index"]),
            output_position=int(self.positions[i]),
        )


def make_problem(
    num_samples: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    kinds: tuple[str, ...] = KINDS,
    filtered: bool = True,
    adjusted: bool = True,
    masked: bool = True,
    seed: int = 0,
) -> SampleProblem:
    """Samples with random parameters, each often off; rows are shared by two, one is not used."""
    rng = np.random.default_rng(seed)
    num_rows = -(-num_samples // 2) + 1
    x = np.stack([make_row(kinds[i % len(kinds)], vocab_size, rng) for i in range(num_rows)])
    slots = np.zeros(num_samples, SLOT)
    slots["top_p"] = slots["repetition_penalty"] = 1
    slots["noise_key"] = rng.integers(0, 2**64, num_samples, np.uint64)
    slots["sample_index"] = rng.integers(0, 8, num_samples)
    slots["temperature"] = rng.choice([0, 1e-8, 0.1, 0.7, 1, 2, 50], num_samples)
    if filtered:
        slots["top_k"] = rng.choice([0, 0, 1, 3, 50, vocab_size // 2], num_samples)
        slots["top_p"] = rng.choice([1, 1, 0, 0.1, 0.5, 0.9, 0.99, 0.9999999], num_samples)
        slots["min_p"] = rng.choice([0, 0, 0.05, 0.5, 1], num_samples)
    history = rng.integers(0, min(vocab_size, 40), (num_samples, 50)).astype(np.int32)
    if adjusted:
        slots["num_biased"] = rng.choice([0, 0, 1, 3], num_samples)
        slots["num_suppressed"] = rng.choice([0, 2], num_samples)
        slots["min_tokens"] = rng.choice([0, 1000], num_samples)
        penalised = rng.random(num_samples) < 0.5
        slots["num_tokens"] = np.where(penalised, rng.integers(10, 50, num_samples), 0)
        slots["num_prompt_tokens"] = np.where(penalised, rng.integers(1, 10, num_samples), 0)
        slots["repetition_penalty"] = np.where(penalised & (rng.random(num_samples) < 0.6), 1.3, 1)
        slots["frequency_penalty"] = np.where(penalised, 0.1, 0)
        slots["presence_penalty"] = np.where(penalised, rng.choice([0, -0.7], num_samples), 0)
    words = rng.integers(0, 2**32, (3, -(-vocab_size // 32) + 1), np.uint64).astype(np.uint32)
    words[1] &= np.roll(words[0], 1) & np.roll(words[2], 2)
    rows = (np.arange(num_samples) // 2).astype(np.int32)
    rows[num_samples // 2] = -1
    bias_ids = np.stack([rng.permutation(vocab_size)[:3] for _ in range(num_samples)])
    return SampleProblem(
        logits=torch.from_numpy(x).to(dtype),
        rows=rows,
        slots=slots,
        positions=rng.integers(0, 1500, num_samples).astype(np.int32),
        history=history,
        bias_ids=bias_ids.astype(np.int32),
        bias_values=(4 * rng.standard_normal((num_samples, 3))).astype(np.float32),
        suppressed_ids=rng.integers(0, vocab_size, (num_samples, 2)).astype(np.int32),
        allowed=words if masked else None,
        mask_of_sample=rng.integers(-1, 3, num_samples).astype(np.int32),
    )


def logprob_errors(
    num: int, vocab_size: int, dtype: torch.dtype, device: str, *, max_top: int, block: int = BLOCK
) -> dict[str, tuple[float, float]]:
    """(error, tolerance) of each result of logprob_rows against its twin."""
    rng = np.random.default_rng(0)
    x = np.stack([make_row(KINDS[i % len(KINDS)], vocab_size, rng) for i in range(num)])
    x[0, vocab_size // 3 :] = -np.inf  # rivals run out
    x[0, 3:9] = -np.inf
    logits = torch.from_numpy(x).to(dtype)
    rows = rng.permutation(num).astype(np.int32)
    tokens = rng.integers(0, vocab_size, num).astype(np.int32)
    num_top = rng.integers(-1, max_top + 1, num).astype(np.int32)
    rows[0], num_top[0], tokens[1] = 0, max_top, -1
    there = [torch.from_numpy(x).to(device) for x in (rows, tokens, num_top)]
    found = [
        x.cpu().numpy()
        for x in logprob_rows(logits.to(device), *there, max_top=max_top, block=block)
    ]
    wide = token_logprobs(logits.float().numpy()[rows], np.where(num_top < 0, -1, tokens), max_top)
    beyond = np.arange(max_top)[None, :] >= num_top[:, None]
    top_ids = np.where(beyond, -1, wide.top_ids)
    top_logprobs = np.where(beyond, np.nan, wide.top_logprobs)

    def largest(a: np.ndarray, b: np.ndarray) -> float:
        if not (np.isnan(a) == np.isnan(b)).all() or not ((a == -np.inf) == (b == -np.inf)).all():
            return np.inf
        finite = np.isfinite(b)
        scale = np.maximum(1.0, np.abs(b[finite]))
        return float((np.abs(a[finite] - b[finite]) / scale).max(initial=0.0))

    return {
        "logprobs": (largest(found[0], wide.logprobs), LOGPROB_TOLERANCE),
        "ranks that differ": (float((found[1] != wide.ranks).sum()), 0.0),
        "rivals that differ": (float((found[2] != top_ids).sum()), 0.0),
        "rivals' logprobs": (largest(found[3], top_logprobs), LOGPROB_TOLERANCE),
    }

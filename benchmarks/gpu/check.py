"""Section `check`: every kernel against its twin, computed in fp64 from the same rounded numbers.

The same cases run in Triton's interpreter (tests/kernels/test_triton.py, the small ones) and on a
card. Memory that a kernel must not read, and outputs that it must write, are NaN beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from batchwright.kernels.expert_product.triton import ProductTile
from batchwright.kernels.gated_activation import naive as naive_gated
from batchwright.kernels.gated_activation import triton as gated
from batchwright.kernels.rms_norm import naive as naive_rms_norm
from batchwright.kernels.rms_norm.triton import rms_norm
from batchwright.kernels.rotary_kv_write import naive as naive_rotary
from batchwright.kernels.rotary_kv_write.triton import rotary_kv_write
from benchmarks.gpu import fp8_case
from benchmarks.gpu.attention_case import (
    AttentionCase,
    largest_difference,
    make_problem,
    relative_error,
)
from benchmarks.gpu.card import architecture
from benchmarks.gpu.expert_case import expert_errors
from benchmarks.gpu.sample_case import logprob_errors
from benchmarks.gpu.sample_case import make_problem as make_sample_problem

ATTENTION_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative, per token and head. fp32: sums over thousands of keys. Otherwise weights and result are
rounded to 11 or 8 bits: 2**-11 or 2**-8 each, and as much again for what cancels in the sum."""
LSE_TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
"""Absolute: scores (up to 15) and their sum are fp32 for every dtype, but tensor cores cut off what
they add below the last bit of the largest term, instead of rounding."""
ROW_TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative, per row: one rounding of the result (2**-11, 2**-8) and fp32 arithmetic before."""

Errors = dict[str, tuple[float, float]]
"""What was compared: (its error, the tolerance)."""


@dataclass(frozen=True)
class Check:
    """One comparison. `small`: fit for the interpreter."""

    name: str
    run: Callable[[torch.dtype, str], Errors]
    small: bool


SMALL_ATTENTION = [
    AttentionCase(name="odd lengths", rows=((0, 1), (0, 5), (31, 1), (130, 1), (7, 20))),
    AttentionCase(
        name="cut in pieces", rows=((0, 1), (700, 1), (560, 5)), num_q_heads=4, num_kv_heads=2,
        head_dim=16, num_programs=(100, 100),
    ),
    AttentionCase(
        name="window, cap, sinks", rows=((0, 1), (500, 1), (190, 7)), num_q_heads=2,
        num_kv_heads=1, head_dim=24, block_size=16, window=300, soft_cap=20.0, sinks=True,
        num_programs=(100, 100),
    ),
    AttentionCase(
        name="tree of shared prefixes", rows=((600, 1), (513, 1), (530, 2), (300, 1), (40, 1)),
        num_q_heads=4, num_kv_heads=2, head_dim=16, block_size=16, sinks=True,
        parents={1: (0, 512), 2: (1, 512), 3: (0, 256)}, num_programs=(40, 40),
    ),
    AttentionCase(
        name="many queries share a prefix", rows=((300, 9), (256, 3)), num_q_heads=4,
        num_kv_heads=1, head_dim=20, block_size=64, parents={1: (0, 256)},
    ),
    AttentionCase(
        name="one kv head of 80", rows=((70, 1), (20, 3)), num_q_heads=20, num_kv_heads=1,
        head_dim=80, block_size=48,
    ),
    AttentionCase(
        name="fp8 keys and values", rows=((0, 1), (70, 1), (300, 5)), num_q_heads=4,
        num_kv_heads=2, head_dim=24, num_programs=(100, 100), cache="fp8",
    ),
    AttentionCase(
        name="int8 keys and values", rows=((0, 1), (70, 1), (300, 5)), num_q_heads=4,
        num_kv_heads=2, head_dim=24, block_size=48, window=200, num_programs=(100, 100),
        cache="int8",
    ),
    AttentionCase(
        name="heads of 256", rows=((70, 1), (20, 9)), num_q_heads=2, num_kv_heads=1, head_dim=256,
        block_size=64,
    ),
]  # fmt: skip

_LLAMA = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 64}
LARGE_ATTENTION = [
    AttentionCase(
        name="Llama-3-8B decode", num_programs=(1056, 264), **_LLAMA,
        rows=tuple((n, 1) for n in (0, 1, 62, 63, 64, 127, 128, 300, 1000, 1023, 2047, 4999)),
    ),
    AttentionCase(
        name="Llama-3-8B one long", rows=((16000, 1),), num_programs=(1056, 264), **_LLAMA
    ),
    AttentionCase(
        name="Llama-3-8B prefill", rows=((0, 300), (1000, 57), (0, 1), (63, 64), (0, 33)), **_LLAMA
    ),
    AttentionCase(
        name="Llama-3-8B chunk in pieces", rows=((6000, 70), (100, 5), (900, 1)),
        num_programs=(1056, 264), **_LLAMA,
    ),
    AttentionCase(
        name="Llama-3-8B shared prefixes", num_programs=(1056, 264), **_LLAMA,
        rows=((2100, 1), *((1024 + 37 * i, 1) for i in range(38)), (2048, 20)),
        parents={i: (0, 1024 if i % 3 else 960) for i in range(1, 39)} | {39: (0, 2048)},
    ),
    *(
        AttentionCase(
            name=f"Llama-3-8B, {cache} keys and values", num_programs=(1056, 264), cache=cache,
            rows=((0, 1), (62, 1), (1000, 1), (4999, 1), (1000, 57), (0, 300)), **_LLAMA,
        )
        for cache in ("fp8", "int8")
    ),
    AttentionCase(
        name="block 16", rows=((900, 1), (100, 77)), num_q_heads=32, num_kv_heads=8, head_dim=128,
        block_size=16, num_programs=(200, 200),
    ),
    AttentionCase(name="SmolLM2", rows=((900, 1), (100, 77), (0, 3)), num_programs=(200, 200)),
    AttentionCase(
        name="Gemma 2", rows=((900, 1), (100, 77)), num_q_heads=8, num_kv_heads=4, head_dim=256,
        window=512, soft_cap=50.0,
    ),
    AttentionCase(
        name="window 1000", rows=((5000, 1), (1500, 70)), window=1000, num_programs=(500, 500),
        **_LLAMA,
    ),
    AttentionCase(
        name="sinks, window 128", rows=((900, 1), (100, 77)), num_q_heads=64, num_kv_heads=8,
        head_dim=64, window=128, sinks=True,
    ),
    AttentionCase(
        name="48 heads on one", rows=((900, 1), (100, 37)), num_q_heads=48, num_kv_heads=1,
        head_dim=128,
    ),
    AttentionCase(
        name="heads of 80", rows=((300, 1), (100, 37)), num_q_heads=8, num_kv_heads=8, head_dim=80
    ),
    AttentionCase(
        name="heads of 96, block 128", rows=((300, 1), (100, 37)), num_q_heads=8, num_kv_heads=8,
        head_dim=96, block_size=128,
    ),
]  # fmt: skip


def all_checks() -> Iterator[Check]:
    """Every check, the small ones first."""
    for small, cases in ((True, SMALL_ATTENTION), (False, LARGE_ATTENTION)):
        for case in cases:
            yield Check(f"attention: {case.name}", _attention(case), small)
    for tokens, heads, size, small in ((5, 0, 37, True), (3, 2, 24, True), (77, 0, 4096, False),
                                       (300, 0, 576, False), (77, 40, 128, False),
                                       (9, 0, 8192, False), (65, 9, 64, False)):  # fmt: skip
        name = (
            f"rms_norm: {tokens} x {heads} heads x {size}"
            if heads
            else (f"rms_norm: {tokens} x {size}")
        )
        yield Check(name, _rms_norm(tokens, heads, size), small)
    for size, small in ((1030, True), (14336, False), (1536, False)):
        for kind in gated.KINDS:
            yield Check(f"{kind}: {size}", _gated(77 if not small else 3, size, kind), small)
    for head_dim, rotary_dim, interleaved, heads, small in (
        (24, 24, False, (3, 2), True),
        (20, 12, True, (3, 1), True),
        (8, 0, False, (2, 2), True),
        (128, 128, False, (32, 8), False),
        (64, 64, False, (9, 3), False),
        (80, 32, False, (32, 32), False),
        (128, 64, True, (64, 8), False),
        (256, 256, False, (8, 4), False),
    ):
        name = f"rotary_kv_write: {heads[0]}/{heads[1]} heads of {head_dim}, {rotary_dim} turned"
        run = _rotary(head_dim, rotary_dim, interleaved, heads, 7 if small else 77)
        yield Check(name + (", interleaved" if interleaved else ""), run, small)
    for cache in ("fp8", "int8"):
        for head_dim, rotary_dim, interleaved, heads, small in (
            (24, 24, False, (3, 2), True),
            (20, 12, True, (3, 1), True),
            (8, 0, False, (2, 2), True),
            (128, 128, False, (32, 8), False),
            (80, 32, False, (32, 32), False),
        ):
            name = f"rotary_kv_write to {cache}: {heads[0]}/{heads[1]} heads of {head_dim}"
            run = _rotary(head_dim, rotary_dim, interleaved, heads, 7 if small else 77, cache)
            yield Check(name, run, small)
    for tokens, num_experts, top_k, hidden, width, small in (
        (13, 5, 2, 24, 20, True),
        (1, 8, 2, 16, 33, True),
        (3, 8, 2, 2048, 896, False),
        (300, 8, 2, 1024, 1792, False),
        (2000, 8, 2, 576, 1536, False),
        (700, 64, 6, 512, 704, False),
    ):
        name = f"experts: {tokens} tokens to {top_k} of {num_experts}, {hidden} x {width}"
        yield Check(name, _experts((tokens, num_experts, top_k, hidden, width)), small)
    for rows, size, small in ((4, 37, True), (77, 4096, False), (9, 14336, False)):
        yield Check(f"fp8: {rows} rows of {size}", _quantize(rows, size), small)
    for shape in ((1, 4096, 6144), (7, 576, 192), (300, 14336, 4096)):
        yield Check(f"fp8: {shape[0]} rows, {shape[1]} x {shape[2]}", _fp8_linear(shape), False)
    for shape, small in (((13, 5, 64, 20), True), ((300, 8, 1024, 1792), False)):
        name = f"fp8: {shape[0]} tokens to 2 of {shape[1]}, {shape[2]} x {shape[3]}"
        yield Check(name, _fp8_experts(shape), small)
    for samples, vocab_size, small in (
        (7, 133, True), (48, 49152, False), (96, 32000, False), (24, 128256, False),
    ):  # fmt: skip
        yield Check(f"sample: {samples} rows of {vocab_size}", _sample(samples, vocab_size), small)


def _experts(shape: tuple[int, int, int, int, int]) -> Callable[[torch.dtype, str], Errors]:
    return lambda dtype, device: expert_errors(*shape, dtype, device)


def _quantize(rows: int, size: int) -> Callable[[torch.dtype, str], Errors]:
    return lambda dtype, device: fp8_case.quantize_errors(rows, size, dtype, device)


def _fp8_linear(shape: tuple[int, int, int]) -> Callable[[torch.dtype, str], Errors]:
    """In bf16 alone, and not before compute capability 8.9."""

    def run(dtype: torch.dtype, device: str) -> Errors:
        if dtype != torch.bfloat16 or architecture(device) < 89:
            return {}
        return fp8_case.linear_errors(*shape, device)

    return run


def _fp8_experts(shape: tuple[int, int, int, int]) -> Callable[[torch.dtype, str], Errors]:
    def run(dtype: torch.dtype, device: str) -> Errors:
        if architecture(device) < 89:
            return {}
        tile = ProductTile(16, 16, 32, 4, 2) if device == "cpu" else None
        # fp32 outputs of e4m3 products have the rounding of their sums
        out_dtype = torch.bfloat16 if device != "cpu" else dtype
        return fp8_case.expert_errors(*shape, out_dtype, device, tile=tile)

    return run


def _sample(num_samples: int, vocab_size: int) -> Callable[[torch.dtype, str], Errors]:
    def run(dtype: torch.dtype, device: str) -> Errors:
        errors: Errors = {}
        for filtered, adjusted in ((True, True), (True, False), (False, False)):
            problem = make_sample_problem(
                num_samples, vocab_size, dtype, filtered=filtered, adjusted=adjusted
            )
            found = problem.run(device, special=filtered)
            what = f"tokens that differ, filters {filtered}, adjusted {adjusted}"
            errors[what] = (float((found != problem.run_twin()).sum()), 0.0)
            if problem.scratch is not None:
                counts = float(problem.scratch.counts.any())
                errors[f"counts left, adjusted {adjusted}"] = (counts, 0.0)
        return errors | logprob_errors(num_samples, vocab_size, dtype, device, max_top=5)

    return run


def _attention(case: AttentionCase) -> Callable[[torch.dtype, str], Errors]:
    def run(dtype: torch.dtype, device: str) -> Errors:
        problem = make_problem(case, dtype, device)
        out, lse = problem.run()
        tokens = problem.some_tokens()
        right_out, right_lse = problem.run_twin(tokens)
        written = bool(out.isfinite().all() and lse.isfinite().all())
        return {
            "out": (relative_error(out[tokens], right_out), ATTENTION_TOLERANCE[dtype]),
            "lse": (largest_difference(lse[tokens], right_lse), LSE_TOLERANCE[dtype]),
            "everything is written": (0.0 if written else torch.inf, 0.0),
        }

    return run


def _rms_norm(tokens: int, heads: int, size: int) -> Callable[[torch.dtype, str], Errors]:
    def run(dtype: torch.dtype, device: str) -> Errors:
        generator = torch.Generator().manual_seed(0)
        shape = (tokens, heads, size) if heads else (tokens, size)
        wide = torch.randn((*shape[:-1], 3 * size), generator=generator).to(dtype)
        x, residual = wide[..., size : 2 * size], wide[..., 2 * size :]  # strided rows
        weight = torch.randn(size, generator=generator).to(dtype)
        there = wide.to(device, copy=True)
        x_there, residual_there = there[..., size : 2 * size], there[..., 2 * size :]
        out = torch.full(shape, torch.nan, dtype=dtype, device=device)
        errors = {}
        for unit_offset in (False, True):
            rms_norm(x_there, weight.to(device), 1e-5, out, unit_offset=unit_offset)
            right, _ = naive_rms_norm.rms_norm(
                x.double(), weight.double(), 1e-5, unit_offset=unit_offset
            )
            errors[f"out, offset {unit_offset}"] = (
                relative_error(out, right), ROW_TOLERANCE[dtype],
            )  # fmt: skip
        out.fill_(torch.nan)
        rms_norm(x_there, weight.to(device), 1e-5, out, residual=residual_there)
        total = (x.float() + residual.float()).to(dtype)
        right, _ = naive_rms_norm.rms_norm(total.double(), weight.double(), 1e-5)
        errors["with residual"] = (relative_error(out, right), ROW_TOLERANCE[dtype])
        errors["residual"] = (largest_difference(residual_there, total), 0.0)
        errors["x as it was"] = (largest_difference(x_there, x), 0.0)
        return errors

    return run


def _gated(tokens: int, size: int, kind: str) -> Callable[[torch.dtype, str], Errors]:
    def run(dtype: torch.dtype, device: str) -> Errors:
        generator = torch.Generator().manual_seed(0)
        x = (3 * torch.randn((tokens, 2 * size), generator=generator)).to(dtype)
        out = torch.full((tokens, size), torch.nan, dtype=dtype, device=device)
        gated.gated_activation(x.to(device), kind, out)
        right = naive_gated.gated_activation(x.double(), kind)
        errors = {"gated": (relative_error(out, right), ROW_TOLERANCE[dtype])}
        plain = x.to(device, copy=True)
        gated.activation(plain, kind, plain)
        right = naive_gated.activation(x.double(), kind)
        errors["plain, in place"] = (relative_error(plain, right), ROW_TOLERANCE[dtype])
        return errors

    return run


def _rotary(
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    heads: tuple[int, int],
    tokens: int,
    cache: str = "",
) -> Callable[[torch.dtype, str], Errors]:
    def run(dtype: torch.dtype, device: str) -> Errors:
        generator = torch.Generator().manual_seed(0)
        num_q, num_kv = heads
        merged = torch.randn((tokens, (num_q + 2 * num_kv) * head_dim), generator=generator)
        angles = 6 * torch.rand((300, rotary_dim // 2), generator=generator)
        kept = {"": dtype, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[cache]
        if cache == "fp8" and device == "cpu":
            # the interpreter rounds wrongly to fp8: numbers that need none, and quarter turns
            merged = (60 * merged).to(kept).float()
            angles = torch.pi / 2 * torch.round(angles)
        merged = merged.to(dtype)
        tables = (angles.cos(), angles.sin()) if rotary_dim else ()
        if cache == "fp8" and device == "cpu":
            tables = tuple(table.round() for table in tables)
        positions = torch.randint(0, 300, (tokens,), generator=generator, dtype=torch.int32)
        slots = torch.randperm(9 * 16, generator=generator)[:tokens].to(torch.int32)
        slots[1] = -1
        q_tolerance = ROW_TOLERANCE[dtype]

        def split(x: torch.Tensor) -> list[torch.Tensor]:
            parts = x.split([num_q * head_dim, num_kv * head_dim, num_kv * head_dim], dim=1)
            return [part.unflatten(1, (-1, head_dim)) for part in parts]

        there = merged.to(device, copy=True)
        shape = (9, num_kv, 16, head_dim)
        caches = [torch.full(shape, torch.nan).to(kept).to(device) for _ in range(2)]
        scales = None
        if cache == "int8":
            scales = tuple(torch.full(shape[:3], torch.nan, device=device) for _ in range(2))
        to_device = [x.to(device) for x in (positions, slots, *tables)]
        rotary_kv_write(*split(there), *caches, *to_device, interleaved=interleaved, scales=scales)

        right = merged.double()
        right_caches = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2)]
        naive_rotary.rotary_kv_write(
            *split(right),
            right_caches[0].transpose(2, 3),  # the twin's keys lie transposed
            right_caches[1],
            positions.long(),
            slots,
            *tables,
            interleaved=interleaved,
        )
        q_error = relative_error(split(there)[0], split(right)[0])
        errors = {"q": (q_error, q_tolerance)}
        for i, (name, wanted) in enumerate(zip("kv", right_caches, strict=True)):
            found = caches[i].cpu().double()
            if scales is not None:
                found *= scales[i].cpu()[..., None]
            untouched = wanted.isnan()
            same = bool((found.isnan() == untouched).all())
            found, wanted = found.nan_to_num(), wanted.nan_to_num()
            if cache == "int8":  # half a step, a 254th of the largest component, in each
                step = wanted.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
                error, tolerance = float(((found - wanted).abs() / step).max()), 0.501
            elif cache == "fp8":  # half of the last of four bits, and of the smallest step
                error = float(((found - wanted).abs() / (wanted.abs() + 2**-6)).max())
                tolerance = 2**-4 + q_tolerance
            else:
                error, tolerance = relative_error(found, wanted), q_tolerance
            errors[f"{name} cache"] = (error if same else torch.inf, tolerance)
        same = torch.equal(there.cpu()[:, num_q * head_dim :], merged[:, num_q * head_dim :])
        errors["k and v as they were"] = (0.0 if same else torch.inf, 0.0)
        return errors

    return run

"""Compiles the GPU kernels without a GPU: python -m tests.kernels.triton_compile SET.

Prints a JSON line per kernel: architecture, registers, bytes of stack (spilled registers), of
shared memory and the instructions of the tensor cores. A process of its own, because Triton reads
TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchwright.kernels.expert_product import triton as expert_product
from batchwright.kernels.fp8_linear import triton as fp8_linear
from batchwright.kernels.gated_activation import triton as gated_activation
from batchwright.kernels.paged_attention import triton as paged_attention
from batchwright.kernels.paged_attention.tiling import choose_tiling
from batchwright.kernels.rms_norm import triton as rms_norm
from batchwright.kernels.rotary_kv_write import triton as rotary_kv_write
from batchwright.kernels.sample import triton as sample
from batchwright.kernels.token_logprobs import triton as token_logprobs

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
VOCAB_SIZE = 128256


def attend(
    dtype: str, head_dim: int, wide: bool, architecture: int, cache: str = "", **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The attention kernel in a shape of Llama-3-8B or like it: 4 query heads per kv head."""
    tiling = choose_tiling(
        4,
        head_dim,
        ELEMENT_BYTES[dtype],
        architecture=architecture,
        kv_cache_dtype={"fp8e4nv": "fp8", "i8": "int8"}.get(cache, "auto"),
    )
    shape = tiling.wide if wide else tiling.narrow
    flags = {"WINDOWED": False, "SOFT_CAP": False, "SINKS": False, "BLOCK_SIZE": 64} | options
    x, i32, f32 = f"*{dtype}", "*i32", "*fp32"
    kept, scales = f"*{cache or dtype}", f32 if cache == "i8" else None
    return paged_attention._attend, {
        "q": x, "k_cache": kept, "v_cache": kept, "k_scales": scales, "v_scales": scales,
        "block_table": i32, "items": i32, "entry_tokens": i32,
        "key_start": i32, "key_end": i32, "partial_start": i32,
        "sinks": f32 if flags["SINKS"] else None, "out": x, "lse": f32, "partial_out": f32,
        "partial_lse": f32, "score_scale": "fp32", "cap": "fp32", "q_token_stride": "i32",
        "q_head_stride": "i32", "table_stride": "i32", "NUM_KV_HEADS": 8, "GROUP": 4,
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "ROWS": shape.num_rows, "KEYS": shape.num_keys, "SCALED": scales is not None, **flags,
        "num_warps": shape.num_warps, "num_stages": shape.num_stages,
    }  # fmt: skip


def merge(dtype: str, pieces: int) -> tuple[Any, dict[str, Any]]:
    """The merging kernel of paged attention."""
    return paged_attention._merge, {
        "merged_tokens": "*i32", "partial_start": "*i32", "num_partials": "*i32",
        "partial_out": "*fp32", "partial_lse": "*fp32", "sinks": None, "out": f"*{dtype}",
        "lse": "*fp32", "HEAD_DIM": 128, "BLOCK_D": 128, "PIECES": pieces,
        "SINKS": False, "num_warps": 1 if pieces <= 4 else 4, "num_stages": 3,
    }  # fmt: skip


def norm(dtype: str, size: int) -> tuple[Any, dict[str, Any]]:
    """RMS norm with a residual."""
    x, block = f"*{dtype}", triton.next_power_of_2(size)
    strides = [
        f"{name}_{of}_stride" for name in ("x", "residual", "out") for of in ("token", "head")
    ]
    return rms_norm._rms_norm, {
        "x": x, "residual": x, "weight": x, "out": x, "eps": "fp32", "num_rows": "i32",
        "num_heads": "i32", **dict.fromkeys(strides, "i32"), "SIZE": size, "BLOCK": block,
        "ROWS": 1, "RESIDUAL": True, "UNIT_OFFSET": False,
        "num_warps": min(16, max(4, block // 512)), "num_stages": 3,
    }  # fmt: skip


def rotary(dtype: str, interleaved: bool = False, cache: str = "") -> tuple[Any, dict[str, Any]]:
    """Rotary embedding and KV write."""
    x, kept, scales = f"*{dtype}", f"*{cache or dtype}", "*fp32" if cache == "i8" else None
    strides = [f"{name}_{of}_stride" for name in "qkv" for of in ("token", "head")]
    return rotary_kv_write._rotary_kv_write, {
        "q": x, "k": x, "v": x, "k_cache": kept, "v_cache": kept, "positions": "*i32",
        "k_scales": scales, "v_scales": scales, "SCALED": scales is not None,
        "slot_mapping": "*i32", "cos": "*fp32", "sin": "*fp32", **dict.fromkeys(strides, "i32"),
        "Q_HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 128, "HALF": 64, "BLOCK_SIZE": 64, "BLOCK_Q": 32,
        "BLOCK_KV": 8, "BLOCK_D": 128, "BLOCK_HALF": 64, "INTERLEAVED": interleaved,
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def gate(dtype: str, kind: str = "silu") -> tuple[Any, dict[str, Any]]:
    """A gated activation."""
    return gated_activation._activation, {
        "x": f"*{dtype}", "out": f"*{dtype}", "size": "i32", "x_stride": "i32",
        "out_stride": "i32", "KIND": kind, "GATED": True, "BLOCK": gated_activation.BLOCK,
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def draw(dtype: str, special: bool, masked: bool = True) -> tuple[Any, dict[str, Any]]:
    """The sampler: rows read once, or filtered and adjusted rows."""
    i32, f32 = "*i32", "*fp32"
    return sample._draw_special if special else sample._draw_plain, {
        "logits": f"*{dtype}", "row_of_sample": i32, "slot_of_sample": i32,
        "output_positions": i32, "slots_i64": "*i64", "slots_f64": "*fp64", "slots_i32": i32,
        "slots_f32": f32, "allowed": i32 if masked else None,
        "mask_of_sample": i32 if masked else None, "out": i32, "row_stride": "i32",
        "mask_stride": "i32", "num_samples": "i32", "bias_ids": i32, "bias_values": f32,
        "suppressed_ids": i32, "history": i32, "rows": f32, "counts": i32, "list_logits": f32,
        "list_tokens": i32, "bias_stride": "i32", "suppressed_stride": "i32",
        "history_stride": "i32", "VOCAB_SIZE": VOCAB_SIZE, "MASKED": masked, "SPECIAL": True,
        "BLOCK": sample.BLOCK, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": False,
    }  # fmt: skip


def logprobs(dtype: str) -> tuple[Any, dict[str, Any]]:
    """Log-probabilities with rivals."""
    i32, f32 = "*i32", "*fp32"
    return token_logprobs._logprobs, {
        "logits": f"*{dtype}", "row_of_token": i32, "token_ids": i32, "num_top": i32,
        "logprobs": f32, "ranks": i32, "top_ids": i32, "top_logprobs": f32, "list_logits": f32,
        "list_tokens": i32, "num": "i32", "row_stride": "i32", "scratch_stride": "i32",
        "VOCAB_SIZE": VOCAB_SIZE, "MAX_TOP": 20, "BLOCK": token_logprobs.BLOCK,
        "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def experts(
    dtype: str, num_pairs: int, down: bool, architecture: int = 90, *, fp8: bool = False
) -> tuple[Any, dict[str, Any]]:
    """A product of Mixtral-8x7B's experts."""
    element_bytes = 1 if fp8 else ELEMENT_BYTES[dtype]
    tile = expert_product.choose_tile(num_pairs, 8, element_bytes, architecture=architecture)
    x, scales = ("*fp8e4nv", "*fp32") if fp8 else (f"*{dtype}", None)
    return expert_product._product, {
        "x": x, "weight": x, "x_scales": scales, "w_scales": scales, "SCALED": fp8,
        "pairs": "*i32", "starts": "*i32", "out": f"*{dtype}", "x_stride": "i32",
        "NUM_EXPERTS": 8, "BLOCK_E": 8, "TOP_K": 0 if down else 2,
        "TO_PAIRS": down, "COLUMNS": 4096 if down else 28672, "DEPTH": 14336 if down else 4096,
        "ROWS": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def quantize_rows(dtype: str, size: int) -> tuple[Any, dict[str, Any]]:
    """Rows to e4m3."""
    block = triton.next_power_of_2(size)
    return fp8_linear._quantize_rows, {
        "x": f"*{dtype}", "values": "*fp8e4nv", "scales": "*fp32", "size": "i32",
        "x_stride": "i32", "BLOCK": block, "num_warps": min(16, max(1, block // 512)),
        "num_stages": 3,
    }  # fmt: skip


def sort_experts() -> tuple[Any, dict[str, Any]]:
    """The counting sort of pairs by expert."""
    return expert_product._sort, {
        "experts": "*i64", "pairs": "*i32", "starts": "*i32", "num_pairs": "i32", "BLOCK": 1024,
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def sum_ranks(dtype: str) -> tuple[Any, dict[str, Any]]:
    """The sum over a token's experts."""
    return expert_product._sum_ranks, {
        "outputs": f"*{dtype}", "weights": "*fp32", "out": f"*{dtype}", "TOP_K": 2, "SIZE": 4096,
        "BLOCK": 1024, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False,
    }  # fmt: skip


def everyday() -> Iterator[tuple[str, int, Any, dict[str, Any]]]:
    """What decoding and prefill of an 8B model run."""
    yield "narrow bf16 128", 90, *attend("bf16", 128, False, 90)
    yield "wide bf16 128", 90, *attend("bf16", 128, True, 90)
    yield "wide fp16 128", 80, *attend("fp16", 128, True, 80)
    yield "merge bf16", 90, *merge("bf16", 64)
    yield "norm bf16 4096", 90, *norm("bf16", 4096)
    yield "rotary bf16", 90, *rotary("bf16")
    yield "silu bf16", 80, *gate("bf16")
    yield "narrow bf16 128 fp8", 90, *attend("bf16", 128, False, 90, "fp8e4nv")
    yield "rotary bf16 fp8", 90, *rotary("bf16", cache="fp8e4nv")
    yield "draw plain bf16", 90, *draw("bf16", False)
    yield "draw special bf16", 90, *draw("bf16", True)
    yield "logprobs bf16", 90, *logprobs("bf16")
    yield "experts bf16 1024 up", 90, *experts("bf16", 1024, False)
    yield "experts bf16 64 down", 80, *experts("bf16", 64, True, 80)
    yield "experts bf16 1024 up fp8", 90, *experts("bf16", 1024, False, fp8=True)
    yield "rows to fp8 14336", 90, *quantize_rows("bf16", 14336)


def every() -> Iterator[tuple[str, int, Any, dict[str, Any]]]:
    """All tile shapes, dtypes and options, for both architectures."""
    options: dict[str, dict[str, Any]] = {
        "": {},
        " block 16": {"BLOCK_SIZE": 16},
        " window": {"WINDOWED": True},
        " cap and sinks": {"SOFT_CAP": True, "SINKS": True},
    }
    for architecture in (80, 89, 90):
        yield "sort of experts", architecture, *sort_experts()
        for dtype in ("bf16", "fp16", "fp32"):
            for head_dim in (64, 80, 128, 256):
                for wide in (False, True):
                    for name, option in options.items():
                        if dtype != "bf16" and name:
                            continue
                        label = f"{'wide' if wide else 'narrow'} {dtype} {head_dim}{name}"
                        yield (
                            label,
                            architecture,
                            *attend(dtype, head_dim, wide, architecture, **option),
                        )
            for cache in ("fp8e4nv", "i8") if architecture >= 89 else ("i8",):
                for head_dim in (64, 128, 256):
                    for wide in (False, True):
                        label = f"{'wide' if wide else 'narrow'} {dtype} {head_dim} {cache}"
                        case = attend(dtype, head_dim, wide, architecture, cache)
                        yield label, architecture, *case
                yield f"rotary {dtype} {cache}", architecture, *rotary(dtype, cache=cache)
            for special in (False, True):
                for masked in (False, True):
                    label = f"draw {'special' if special else 'plain'} {dtype} mask {masked}"
                    yield label, architecture, *draw(dtype, special, masked)
            yield f"logprobs {dtype}", architecture, *logprobs(dtype)
            for num_pairs in (64, 512, 4096):
                for down in (False, True):
                    label = f"experts {dtype} {num_pairs} {'down' if down else 'up'}"
                    yield label, architecture, *experts(dtype, num_pairs, down, architecture)
                    if architecture >= 89:
                        case = experts(dtype, num_pairs, down, architecture, fp8=True)
                        yield f"{label} fp8", architecture, *case
            if architecture >= 89:
                yield f"rows to fp8 {dtype}", architecture, *quantize_rows(dtype, 28672)
            yield f"sum of ranks {dtype}", architecture, *sum_ranks(dtype)
            yield f"merge {dtype} 2", architecture, *merge(dtype, 2)
            yield f"merge {dtype} 64", architecture, *merge(dtype, 64)
            yield f"norm {dtype} 576", architecture, *norm(dtype, 576)
            yield f"norm {dtype} 8192", architecture, *norm(dtype, 8192)
            yield f"rotary {dtype}", architecture, *rotary(dtype)
            yield f"rotary {dtype} interleaved", architecture, *rotary(dtype, True)
            for kind in gated_activation.KINDS:
                yield f"{kind} {dtype}", architecture, *gate(dtype, kind)


def compile_kernel(kernel: Any, arguments: dict[str, Any], architecture: int) -> Any:
    """Compile as a launch would: pointers and strides are multiples of 16, None is a constant."""
    options = {
        name: arguments[name]
        for name in ("num_warps", "num_stages", "enable_fp_fusion")
        if name in arguments
    }
    given = {name: arguments[name] for name in kernel.arg_names}
    types = {n: v if isinstance(v, str) and n != "KIND" else "constexpr" for n, v in given.items()}
    constants = {(i,): given[n] for i, n in enumerate(kernel.arg_names) if types[n] == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name.endswith("stride") or name == "size"
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers and bytes of stack and shared memory, read from the machine code."""
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [cuobjdump, "-res-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, text
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]) + int(found[3]),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", compiled.asm["ptx"])),
        "cp_async_16": len(
            re.findall(r"cp\.async\.cg\.\S+ \[[^\]]*\], \[[^\]]*\], 0x10", compiled.asm["ptx"])
        ),
    }


def main() -> None:
    """Compile one set and print what it takes."""
    kernels = {"everyday": everyday, "every": every}[sys.argv[1]]
    for name, architecture, kernel, arguments in kernels():
        found = resources(compile_kernel(kernel, arguments, architecture))
        print(json.dumps({"kernel": name, "architecture": architecture} | found), flush=True)


if __name__ == "__main__":
    main()

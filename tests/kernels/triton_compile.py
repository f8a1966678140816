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

from batchwright.kernels.gated_activation import triton as gated_activation
from batchwright.kernels.paged_attention import triton as paged_attention
from batchwright.kernels.paged_attention.tiling import choose_tiling
from batchwright.kernels.rms_norm import triton as rms_norm
from batchwright.kernels.rotary_kv_write import triton as rotary_kv_write

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def attend(
    dtype: str, head_dim: int, wide: bool, architecture: int, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The attention kernel in a shape of Llama-3-8B or like it: 4 query heads per kv head."""
    tiling = choose_tiling(4, head_dim, ELEMENT_BYTES[dtype], architecture=architecture)
    shape = tiling.wide if wide else tiling.narrow
    flags = {"WINDOWED": False, "SOFT_CAP": False, "SINKS": False, "BLOCK_SIZE": 64} | options
    x, i32, f32 = f"*{dtype}", "*i32", "*fp32"
    return paged_attention._attend, {
        "q": x, "k_cache": x, "v_cache": x, "block_table": i32, "items": i32, "entry_tokens": i32,
        "key_start": i32, "key_end": i32, "partial_start": i32,
        "sinks": f32 if flags["SINKS"] else None, "out": x, "lse": f32, "partial_out": f32,
        "partial_lse": f32, "score_scale": "fp32", "cap": "fp32", "q_token_stride": "i32",
        "q_head_stride": "i32", "table_stride": "i32", "NUM_KV_HEADS": 8, "GROUP": 4,
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "ROWS": shape.num_rows, "KEYS": shape.num_keys, **flags,
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


def rotary(dtype: str, interleaved: bool = False) -> tuple[Any, dict[str, Any]]:
    """Rotary embedding and KV write."""
    x = f"*{dtype}"
    strides = [f"{name}_{of}_stride" for name in "qkv" for of in ("token", "head")]
    return rotary_kv_write._rotary_kv_write, {
        "q": x, "k": x, "v": x, "k_cache": x, "v_cache": x, "positions": "*i32",
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


def everyday() -> Iterator[tuple[str, int, Any, dict[str, Any]]]:
    """What decoding and prefill of an 8B model run."""
    yield "narrow bf16 128", 90, *attend("bf16", 128, False, 90)
    yield "wide bf16 128", 90, *attend("bf16", 128, True, 90)
    yield "wide fp16 128", 80, *attend("fp16", 128, True, 80)
    yield "merge bf16", 90, *merge("bf16", 64)
    yield "norm bf16 4096", 90, *norm("bf16", 4096)
    yield "rotary bf16", 90, *rotary("bf16")
    yield "silu bf16", 80, *gate("bf16")


def every() -> Iterator[tuple[str, int, Any, dict[str, Any]]]:
    """All tile shapes, dtypes and options, for both architectures."""
    options: dict[str, dict[str, Any]] = {
        "": {},
        " block 16": {"BLOCK_SIZE": 16},
        " window": {"WINDOWED": True},
        " cap and sinks": {"SOFT_CAP": True, "SINKS": True},
    }
    for architecture in (80, 90):
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
    options = {name: arguments[name] for name in ("num_warps", "num_stages")}
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

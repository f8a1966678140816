"""EngineConfig: every setting of an engine, and `resolve`, which settles what was left open."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from batchwright.errors import ConfigError
from batchwright.kv.groups import BLOCK_SIZE, KVGroup, blocks_per_sequence, split_blocks
from batchwright.techniques import names

DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_MAX_NUM_BATCHED_TOKENS = 512
GPU_MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_MAX_MODEL_LEN = 8192
KV_SHARE_OF_FREE_MEMORY = 0.5
DEVICES = ("auto", "cpu", "cuda")
AUTO_ORDER = "auto"
KV_BACKENDS = {"bfloat16": "numba_bf16", "int8": "numba_int8"}
"""A CPU's attention backends that keep keys and values in fewer bits, by kv_cache_dtype."""
QUANTIZED = {"int8": ("cpu", "float32"), "fp8": ("cuda", "bfloat16")}
"""Number formats of products: the device that has them, and what they take and give there."""
KV_CACHE_DTYPES = ("auto", "bfloat16", "int8", "fp8")

_COUNTS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_bytes",
    "kv_tokens",
    "swap_space_bytes",
    "num_threads",
    "tensor_parallel_size",
    "data_parallel_size",
)
_WHOLE_NUMBERS = (*_COUNTS, "block_size", "seed", "look_ahead")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an engine. None means: choose for me (`resolve` does, and says why).

    Attributes:
        device: "auto", "cpu" or "cuda" (NVIDIA cards); auto is cuda where there is one.
        dtype: "auto", "float32" or "bfloat16"; auto is bfloat16 on a GPU, and float32 on a CPU,
            where bf16 products run at a tenth of the speed without AVX-512 or AMX.
        quantize: products with narrow weights and activations, lossy: "int8" on a CPU
            (docs/int8.md), "fp8" on a GPU (docs/gpu.md); None: they have the model's dtype.
        max_model_len: most tokens of a sequence, prompt and output.
        max_num_seqs: sequences that run at once, in each replica.
        max_num_batched_tokens: tokens computed per step, in each replica.
        kv_cache_bytes: memory for keys and values, of each process if there are several.
        kv_tokens: tokens whose keys and values are kept at once, if less than memory allows.
        swap_space_bytes: memory of the host for keys and values that a GPU has no room for, of each
            process with tensor parallelism; None: they are computed again when they are needed.
            Used where copying is sooner done (docs/gpu.md).
        block_size: tokens per KV block, a multiple of 32.
        kv_cache_dtype: format of keys and values, lossy: "int8", on a CPU also "bfloat16"
            (docs/int8.md), on a GPU "fp8" (docs/gpu.md); "auto": float32 on a CPU, the model's
            dtype on a GPU.
        prefix_sharing: prompts with a common beginning compute and store it once.
        order: in which order rows start, a file of `batchwright/plan/orders`, or "auto", which
            measures the machine and tries them on a sample of the rows, if there is enough to do.
        length_predictor: what output lengths are expected, a file of `batchwright/plan/lengths`;
            memory and order go by it.
        attention: backend of a CPU, a file of `batchwright/attention/backends`.
        seed: keys the randomness of rows that have no seed of their own.
        num_threads: threads of matrix products and kernels, at most the cores there are; with
            several processes, of each, which get the cores in equal parts by default.
        tensor_parallel_size: processes that have the model together, each a part of its heads and
            widths: one a GPU, or all on this machine's processor (docs/tensor_parallel.md).
        data_parallel_size: replicas of the whole engine on this machine's processor, each a
            process pinned to its part of the cores; they pull rows from one queue and share the
            weights (docs/scaling.md).
        look_ahead: steps handed out before the oldest result is read, 0 or 1; by default 1 on a
            GPU, which then never waits for the host.
    """

    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    kv_tokens: int | None = None
    swap_space_bytes: int | None = None
    block_size: int = BLOCK_SIZE
    kv_cache_dtype: str = "auto"
    prefix_sharing: bool = True
    order: str = AUTO_ORDER
    length_predictor: str = "subtree"
    attention: str = "numba"
    seed: int = 0
    num_threads: int | None = None
    look_ahead: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1

    def resolve(
        self, *, context_length: int, free_memory_bytes: int, num_gpus: int = 0
    ) -> ResolvedConfig:
        """Settle the open settings for a model.

        Args:
            context_length: positions the model was made for.
            free_memory_bytes: memory left once the weights are there, on the device that is used
                (see `uses_gpu`), one of the cards or the whole machine.
            num_gpus: cards that torch can use.
        Raises:
            ConfigError: with all problems at once.
        """
        problems = self._problems()
        has_gpu, size = num_gpus > 0, self.tensor_parallel_size
        num_processes = size * self.data_parallel_size
        if self.max_model_len is not None and self.max_model_len > context_length:
            problems.append(
                f"max_model_len is {self.max_model_len}, the model's context is {context_length}; "
                "lower it or leave it out"
            )
        if self.kv_cache_bytes is not None and self.kv_cache_bytes > free_memory_bytes:
            problems.append(
                f"kv_cache_bytes is {self.kv_cache_bytes}, but only {free_memory_bytes} bytes are "
                "free; lower it or leave it out"
            )
        if self.device == "cuda" and not has_gpu:
            problems.append(
                "device is cuda, but torch finds no NVIDIA card; install torch with CUDA and a "
                "driver, or leave device out"
            )
        if self.quantize == "int8" and self.device == "auto" and has_gpu:
            problems.append(
                "quantize is int8, which is for the CPU, and there is a GPU; set device to cpu "
                "(--device cpu), or quantize to fp8"
            )
        if self.quantize == "fp8" and self.device == "auto" and not has_gpu:
            problems.append(
                "quantize is fp8, which is for GPUs, and torch finds none; use int8 on the CPU, or "
                "leave it out"
            )
        if problem := self._wrong_kv_cache_dtype(self.uses_gpu(has_gpu)):
            problems.append(problem)
        if self.swap_space_bytes is not None and not self.uses_gpu(has_gpu):
            problems.append(
                f"swap_space_bytes is {self.swap_space_bytes}, which is for a GPU: on the CPU keys "
                "and values are in the machine's memory already; leave it out, or give them more "
                "(--kv-cache-memory)"
            )
        if self.uses_gpu(has_gpu) and not problems and size > num_gpus:
            problems.append(
                f"tensor_parallel_size is {size}, but torch finds {num_gpus} NVIDIA "
                f"{'card' if num_gpus == 1 else 'cards'}, and each process needs its own; lower it "
                "(--tensor-parallel-size), or set device to cpu"
            )
        if self.uses_gpu(has_gpu) and self.data_parallel_size > 1:
            problems.append(
                f"data_parallel_size is {self.data_parallel_size}, replicas are for the CPU; leave "
                "it out, or set device to cpu (--device cpu)"
            )
        if problems:
            raise ConfigError("; ".join(problems))
        num_cores = len(os.sched_getaffinity(0))
        on_gpu = self.uses_gpu(has_gpu)
        own_dtype = "bfloat16" if on_gpu else "float32"
        kv_share = 1.0 if on_gpu else KV_SHARE_OF_FREE_MEMORY / num_processes
        look_ahead = int(on_gpu) if self.look_ahead is None else self.look_ahead
        return ResolvedConfig(
            device="cuda" if on_gpu else "cpu",
            dtype=own_dtype if self.dtype == "auto" else self.dtype,
            quantize=self.quantize,
            max_model_len=self.max_model_len or min(context_length, DEFAULT_MAX_MODEL_LEN),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self._token_budget(on_gpu),
            kv_cache_bytes=self.kv_cache_bytes or int(free_memory_bytes * kv_share),
            kv_tokens=self.kv_tokens,
            swap_space_bytes=self.swap_space_bytes or 0,
            block_size=self.block_size,
            prefix_sharing=self.prefix_sharing,
            order=self.order,
            length_predictor=self.length_predictor,
            kv_cache_dtype=self.kv_cache_dtype,
            attention=KV_BACKENDS.get(self.kv_cache_dtype, self.attention),
            seed=self.seed,
            num_threads=min(self.num_threads or max(num_cores // num_processes, 1), num_cores),
            look_ahead=look_ahead,
            tensor_parallel_size=size,
            data_parallel_size=self.data_parallel_size,
        )

    def uses_gpu(self, has_gpu: bool) -> bool:
        """Whether the engine will run on a card, if there is one."""
        return has_gpu and self.device != "cpu"

    def check(self) -> None:
        """Refuse what no model could make right; takes no time.

        Raises:
            ConfigError: with all problems at once.
        """
        if problems := self._problems():
            raise ConfigError("; ".join(problems))

    def _wrong_kv_cache_dtype(self, on_gpu: bool) -> str | None:
        """What is wrong with the format of keys and values on this device."""
        dtype = self.kv_cache_dtype
        if not on_gpu:
            if dtype != "fp8":
                return None
            return "kv_cache_dtype is fp8, which is for GPUs; use int8 on the CPU, or leave it out"
        own_dtype = "bfloat16" if self.dtype == "auto" else self.dtype
        if dtype != "bfloat16" or own_dtype == "bfloat16":
            return None
        return (
            f"kv_cache_dtype is bfloat16 and dtype {own_dtype}; on a GPU keys and values are in "
            "the model's dtype, int8 or fp8: leave one of them out"
        )

    def _token_budget(self, on_gpu: bool) -> int:
        usual = GPU_MAX_NUM_BATCHED_TOKENS if on_gpu else DEFAULT_MAX_NUM_BATCHED_TOKENS
        return self.max_num_batched_tokens or max(usual, self.max_num_seqs)

    def _problems(self) -> list[str]:
        """What is wrong whatever the model is."""
        problems: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "prefix_sharing" and not isinstance(value, bool):
                problems.append(f"prefix_sharing is {value!r:.60}, must be True or False")
            if field.name not in _WHOLE_NUMBERS or (value is None and field.default is None):
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                problems.append(f"{field.name} is {value!r:.60}, must be a whole number")
        if problems:
            return problems
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} is {value}, must be at least 1")
        if self.block_size < 32 or self.block_size % 32:
            problems.append(f"block_size is {self.block_size}, must be a multiple of 32")
        if self.device not in DEVICES:
            problems.append(f"device is {self.device!r}, must be one of {', '.join(DEVICES)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            problems.append(f"dtype is {self.dtype!r}, must be auto, float32 or bfloat16")
        if self.quantize not in (None, *QUANTIZED):
            problems.append(
                f"quantize is {self.quantize!r:.60}, must be {' or '.join(QUANTIZED)}, or None"
            )
        elif self.quantize:
            device, dtype = QUANTIZED[self.quantize]
            if self.dtype not in ("auto", dtype):
                problems.append(
                    f"quantize is {self.quantize} and dtype {self.dtype}; {self.quantize} products "
                    f"take and give {dtype}, so leave dtype out"
                )
            if self.device not in ("auto", device):
                problems.append(
                    f"quantize is {self.quantize}, which is for {device}, and device is "
                    f"{self.device}; leave one of them out"
                )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            problems.append(
                f"kv_cache_dtype is {self.kv_cache_dtype!r:.60}, must be one of "
                f"{', '.join(KV_CACHE_DTYPES)}"
            )
        elif self.kv_cache_dtype != "auto" and self.attention != "numba":
            problems.append(
                f"kv_cache_dtype is {self.kv_cache_dtype} and attention {self.attention}; leave "
                "one of them out"
            )
        if self.data_parallel_size > 1 and self.tensor_parallel_size > 1:
            problems.append(
                f"data_parallel_size is {self.data_parallel_size} and tensor_parallel_size "
                f"{self.tensor_parallel_size}; leave one of them out"
            )
        if self.order not in (orders := [AUTO_ORDER, *names("plan.orders")]):
            problems.append(f"order is {self.order!r}, must be one of {', '.join(orders)}")
        if self.length_predictor not in (known := names("plan.lengths")):
            problems.append(
                f"length_predictor is {self.length_predictor!r}, must be one of {', '.join(known)}"
            )
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed is {self.seed}, must be between 0 and 2^63 - 1")
        if self.look_ahead not in (None, 0, 1):
            problems.append(f"look_ahead is {self.look_ahead}, must be 0 or 1")
        if self._token_budget(on_gpu=False) < self.max_num_seqs:
            problems.append(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, below max_num_seqs "
                f"{self.max_num_seqs}; every running sequence needs one token per step, so raise "
                "it or lower the other"
            )
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """An EngineConfig without open settings; see there for the meaning of each."""

    device: str
    dtype: str
    quantize: str | None
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    kv_tokens: int | None
    swap_space_bytes: int
    block_size: int
    prefix_sharing: bool
    order: str
    length_predictor: str
    kv_cache_dtype: str
    attention: str
    seed: int
    num_threads: int
    look_ahead: int
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1

    def kv_groups(self, windows: Sequence[int | None], block_bytes: Sequence[int]) -> list[KVGroup]:
        """Pool sizes of the KV groups within kv_cache_bytes and kv_tokens, never more than of use.

        Args:
            windows, block_bytes: per group: its window, and the bytes of a block in all its layers.
        Raises:
            ConfigError: the memory or kv_tokens does not hold two blocks of every group.
        """
        if self.kv_tokens is not None and self.kv_tokens < 2 * self.block_size:
            raise ConfigError(
                f"kv_tokens is {self.kv_tokens}, must hold two blocks of {self.block_size} tokens; "
                "raise it (--kv-tokens)"
            )
        groups = split_blocks(
            self.kv_cache_bytes,
            windows,
            block_bytes,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_chunk=self.max_num_batched_tokens,
        )
        if min(group.num_blocks for group in groups) < 2:
            raise ConfigError(
                f"KV memory of {self.kv_cache_bytes} bytes does not hold two blocks of "
                f"{self.block_size} tokens ({sum(block_bytes)} bytes each); raise kv_cache_bytes "
                "(--kv-cache-memory)"
            )
        num_host_blocks = self.num_host_blocks(windows, block_bytes)
        return [KVGroup(group.window, self._useful(group), num_host_blocks) for group in groups]

    def num_host_blocks(self, windows: Sequence[int | None], block_bytes: Sequence[int]) -> int:
        """Blocks that the host keeps; arguments as those of `kv_groups`.

        Raises:
            ConfigError: the model has layers with a window, whose blocks do not go to the host.
        """
        if self.swap_space_bytes and any(window is not None for window in windows):
            raise ConfigError(
                f"swap_space_bytes is {self.swap_space_bytes}, which is not supported for models "
                "with a sliding window; leave it out (--swap-space)"
            )
        return self.swap_space_bytes // block_bytes[0]

    def _useful(self, group: KVGroup) -> int:
        """No more blocks than kv_tokens, or than max_num_seqs sequences of full length can hold."""
        most = self.max_num_seqs * blocks_per_sequence(
            group.window, self.max_model_len, self.block_size, self.max_num_batched_tokens
        )
        if self.kv_tokens is not None:
            most = min(most, self.kv_tokens // self.block_size)
        return min(group.num_blocks, max(most, 2))

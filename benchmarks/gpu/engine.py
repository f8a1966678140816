"""Section `engine`: whole jobs through the engine, on random weights in the shapes of real models.

Models: Llama-3-8B (all workloads), Qwen3-4B and as much of Mixtral-8x7B as fits beside its keys
and values, in bf16; the first and the last with products in fp8 too, and the first with keys and
values in 8 bits. Tokens greedy, end tokens ignored; `--models` and `--workloads` take some.
Workloads: fixed lengths of input / output (128/128, 1000/1000, 2048/128, 128/2048) that share
nothing, and W1 to W4 of batchwright.bench.workloads with GPU_SCALE times the rows. transformers'
`generate` runs 128/128 and 2048/128 of Llama-3-8B in static batches, in the same process, on
weights of the same shape, unless models are named.

A line has: output and total tokens a second by the clock, the share of two bounds, what the card
did. The bounds follow from what the steps had to compute and to read and from the copy bandwidth
and matrix rate of this card (card.py): `serial` is the sum of each kernel's own bound, `overlapped`
lets reading of keys hide behind products. Two profiles are of PROFILED_STEPS steps of runs of their
own, one of steps that only decode, one of prompts: time per kernel family beside its bound, and the
share of time in which the card computed nothing, which is the host's gap.
"""

from __future__ import annotations

import gc
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from batchwright.bench.workloads import build_workloads
from batchwright.engine import Engine
from batchwright.exec.device.executor import DeviceExecutor, Pending
from batchwright.exec.device.kv_memory import element_bytes
from batchwright.exec.device.sampler import HostSampler
from batchwright.models.shape import shape_of
from batchwright.plan.cost import CostModel
from batchwright.plan.hardware import DeviceProfile, device_hardware
from batchwright.plan.shape import ModelShape
from batchwright.plan.shared_keys import StepCosts
from batchwright.request import Request, SamplingParams
from batchwright.step import Step
from benchmarks.gpu.card import Budget, Timer, ceilings
from benchmarks.gpu.fp8 import fp8_rate
from benchmarks.gpu.parity import compare_draws
from benchmarks.gpu.under_test import make_engine, random_model

GPU_SCALE = 4
NUM_ROWS = {"128/128": 1536, "2048/128": 224, "1000/1000": 256, "128/2048": 256}
PROFILED_STEPS = 12
PROFILED_ROWS = {
    "decoding": ("128/128", 512, 60),
    "prompts": ("2048/128", 64, 6),
    "shared prefix": ("W1", 1024, 6),
}
"""Workload, rows, and first step that is profiled: 128/128 decodes by then, the others do not."""
ROWS_PER_LOAD = 16
"""Tokens of a wide tile of the attention kernel, for four query heads per kv head."""

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
MIXTRAL_LAYER_BYTES = 2 * 8 * 3 * 4096 * 14336
"""Of the experts of one layer in bf16, which are nearly all there is."""

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
"""What a dry run puts in place of the sizes."""

Row = tuple[list[int], int]  # prompt, number of output tokens


@dataclass(frozen=True)
class Trial:
    """A model, how its numbers are kept, and the workloads that it runs."""

    name: str
    config: dict[str, Any]
    workloads: tuple[str, ...]
    quantize: str | None = None
    kv_cache_dtype: str = "auto"


def run(
    timer: Timer, budget: Budget, models: Sequence[str] = (), workloads: Sequence[str] = ()
) -> dict[str, Any]:
    """All lines; `left_out` names what the budget did not reach, most important last.

    Args:
        models, workloads: names of those to run; none: all.
    """
    dry = timer.device == "cpu"
    limits = ceilings(timer)
    if not dry and torch.cuda.get_device_capability() >= (8, 9):
        limits["fp8_flops_per_s"] = fp8_rate(timer)
    found: dict[str, Any] = {"ceilings": limits, "models": {}, "lines": [], "left_out": []}
    if not dry:
        found["draws"], found["sampler"] = _usable_sampler(timer.device)
    for trial in _trials(dry):
        if models and trial.name not in models:
            continue
        if workloads:
            wanted = tuple(name for name in trial.workloads if name in workloads)
            trial = replace(trial, workloads=wanted)
        if budget.is_spent():
            found["left_out"].append(trial.name)
            continue
        _run_model(trial, timer.device, budget, limits, found)
        if not dry and not models and "transformers" not in found:  # on the shape of the first
            found["transformers"] = _transformers(budget, found)
            _free()
    return found


def _free() -> None:
    """Give back what models that are gone have left; some are parts of cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _usable_sampler(device: str) -> tuple[dict[str, Any], str]:
    """Draws compared with the CPU's, and `device`, or `host` if the sampling kernel is wrong on
    this card: the rest is measured."""
    try:
        found = compare_draws(device)
    except Exception as error:  # noqa: BLE001  told, and the rest goes on
        print(f"the sampling kernel fails: {type(error).__name__}: {error}"[:500], flush=True)
        return {}, "host"
    print(f"draws, against the CPU's sampler: {found}", flush=True)
    return found, "device" if found["different_rows"] <= 1 else "host"


def _trials(dry: bool) -> list[Trial]:
    """Most important first."""
    mixtral = dict(MIXTRAL)
    fp8, int8 = {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "int8"}
    all_workloads = "128/128", "2048/128", "W1", "W2", "1000/1000", "W3", "W4", "128/2048"
    if not dry:
        memory = torch.cuda.get_device_properties(0).total_memory
        mixtral["num_hidden_layers"] = min(32, int(0.7 * memory) // MIXTRAL_LAYER_BYTES)
    mixture, num_layers = "Mixtral-8x7B", mixtral["num_hidden_layers"]
    if num_layers < 32:
        mixture += f", {num_layers} of 32 layers"
    trials = [
        Trial("Llama-3-8B", dict(LLAMA_8B), all_workloads),
        Trial("Qwen3-4B", dict(QWEN3_4B), ("128/128", "2048/128")),
        Trial(mixture, mixtral, ("128/128", "2048/128")),
    ]
    if dry:
        trials = [replace(one, config=one.config | TINY) for one in trials]
        trials.append(replace(trials[0], name="Llama-3-8B, int8 keys", kv_cache_dtype="int8"))
        return [replace(one, workloads=one.workloads[:2]) for one in trials]
    some = "128/128", "2048/128", "1000/1000", "W1"
    return [
        *trials,
        Trial("Llama-3-8B, fp8", dict(LLAMA_8B), some, "fp8"),
        Trial("Llama-3-8B, fp8, fp8 keys", dict(LLAMA_8B), some, "fp8", **fp8),
        Trial(f"{mixture}, fp8", mixtral, ("128/128", "2048/128"), "fp8"),
        Trial("Llama-3-8B, fp8 keys", dict(LLAMA_8B), ("1000/1000",), **fp8),
        Trial("Llama-3-8B, int8 keys", dict(LLAMA_8B), ("1000/1000",), **int8),
    ]


def workload(name: str, vocab_size: int, *, dry: bool) -> list[Row]:
    """The rows of a workload. Tokens are random; those of W1 to W4 share what texts would."""
    rng = np.random.default_rng(0)

    def draw(length: int) -> list[int]:
        return rng.integers(3, vocab_size, length).tolist()

    if name.startswith("W"):
        source = random.Random(0)

        def encode(text: str) -> list[int]:
            return [source.randrange(3, vocab_size) for _ in range(max(1, len(text) // 5))]

        requests = build_workloads(encode, scale=0.02 if dry else GPU_SCALE)[name]
        return [(one.prompt_token_ids, one.num_output_tokens) for one in requests]
    num_in, num_out = map(int, name.split("/"))
    num_rows = NUM_ROWS[name]
    if dry:
        num_in, num_out, num_rows = num_in // 32, 3, 3
    return [(draw(num_in), num_out) for _ in range(num_rows)]


def _run_model(
    trial: Trial,
    device: str,
    budget: Budget,
    limits: dict[str, float],
    found: dict[str, Any],
) -> None:
    name, config = trial.name, trial.config
    dry = device == "cpu"
    start = time.monotonic()
    dtype = torch.float32 if dry else torch.bfloat16
    length = 512 if dry else 4352
    model = random_model(config, dtype, device, length, quantize=trial.quantize)
    shape = shape_of(model)
    made_s = time.monotonic() - start
    sizes: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 32}
    if not dry:
        sizes = {"max_num_seqs": 512, "max_num_batched_tokens": 4096, "block_size": 64}
    sizes["kv_cache_dtype"] = trial.kv_cache_dtype
    engine, executor, about = make_engine(model, device, max_model_len=length, **sizes)
    if found.get("sampler") == "host":
        sizes_of_slots = about["max_num_seqs"], length, config["vocab_size"]
        executor._sampler = HostSampler(*sizes_of_slots)
    recorder = Recorder(engine, executor)
    ready_s = time.monotonic() - start - made_s
    recorder.play(_requests(workload("128/128", config["vocab_size"], dry=True), "warm"))
    about |= {"quantize": trial.quantize, "kv_cache_dtype": trial.kv_cache_dtype}
    found["models"][name] = about | {
        "num_layers": config["num_hidden_layers"],
        "num_params": shape.num_params,
        "weights_made_s": round(made_s, 1),
        "executor_ready_s": round(ready_s, 1),
        "first_steps_s": round(time.monotonic() - start - made_s - ready_s, 1),
        "captures_graphs": executor._graphs is not None,
    }
    for which in trial.workloads:
        if budget.is_spent():
            found["left_out"].append(f"{name} {which}")
            continue
        rows = workload(which, config["vocab_size"], dry=dry)
        line = recorder.measure(rows, which)
        line |= {"model": name, "workload": which}
        line |= _bounds(recorder.steps, shape, about, limits, line["seconds"])
        if not dry:
            line["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            for what, (of, num_rows, first) in PROFILED_ROWS.items():
                if of == which and not budget.is_spent():
                    profile, steps = recorder.profile(rows[:num_rows], what, first)
                    line["profile"] = profile | _part_bounds(steps, shape, about, limits, profile)
        found["lines"].append(line)
        print(_line(line), flush=True)
    engine.close()
    del recorder, engine, executor, model
    _free()


def _requests(rows: Sequence[Row], run_name: str) -> list[Request]:
    return [
        Request(
            id=f"{run_name}-{index}",
            prompt_token_ids=np.array(prompt, np.int32),
            params=SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True),
            namespace=run_name,  # nothing is shared with, or answered by, an earlier run
        )
        for index, (prompt, num_output) in enumerate(rows)
    ]


class Recorder:
    """Runs jobs on one engine; remembers the steps, and the host's time in handing them out."""

    def __init__(self, engine: Engine, executor: DeviceExecutor) -> None:
        self._engine, self._executor = engine, executor
        self._execute = executor.execute
        executor.execute = self._record  # type: ignore[method-assign]
        self._num_runs = 0
        self.steps: list[Step] = []
        self.host_s = 0.0
        self._profiler: Any = None
        self._profile_from = 0

    def _record(self, step: Step) -> Pending:
        if self._profiler is not None:
            self._control_profiler()
        start = time.perf_counter()
        pending = self._execute(step)
        self.host_s += time.perf_counter() - start
        self.steps.append(step)
        return pending

    def play(self, requests: list[Request]) -> float:
        """Seconds by the clock of a whole job."""
        self.steps, self.host_s = [], 0.0
        start = time.perf_counter()
        for result in self._engine.run(requests):
            if result.error is not None:
                raise result.error
        return time.perf_counter() - start

    def measure(self, rows: Sequence[Row], name: str) -> dict[str, Any]:
        """Rates of a workload."""
        self._num_runs += 1
        requests = _requests(rows, f"{name}-{self._num_runs}")
        replayed, computed = self._executor.num_replayed, self._engine.stats.num_computed_tokens
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.play(requests)
        num_output = sum(num_output for _, num_output in rows)
        num_prompt = sum(len(prompt) for prompt, _ in rows)
        return {
            "rows": len(rows),
            "seconds": seconds,
            "output_tokens_per_s": num_output / seconds,
            "total_tokens_per_s": (num_prompt + num_output) / seconds,
            "steps": len(self.steps),
            "graph_steps": self._executor.num_replayed - replayed,
            "computed_tokens": self._engine.stats.num_computed_tokens - computed,
            "host_ms_per_step": 1e3 * self.host_s / max(len(self.steps), 1),
        }

    @property
    def _on_gpu(self) -> bool:
        return torch.cuda.is_available()

    def profile(
        self, rows: Sequence[Row], name: str, first: int
    ) -> tuple[dict[str, Any], list[Step]]:
        """Run some rows; profile PROFILED_STEPS steps from the `first` on: (the profile, they)."""
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as torch_profile

        self._num_runs += 1
        requests = _requests(rows, f"{name}-{self._num_runs}")
        self._profile_from = first
        self._profiler = torch_profile(activities=[ProfilerActivity.CUDA], acc_events=True)
        self._control = 0
        self.play(requests)
        if self._control == 1:
            self._stop_profiler()
        profiler, self._profiler = self._profiler, None
        if self._control == 0:
            return {"what": name, "note": f"the run had only {len(self.steps)} steps"}, []
        profiled = self.steps[self._started : self._started + self._profiled]
        return {
            "what": name,
            "tokens_per_step": sum(step.num_tokens for step in profiled) / self._profiled,
            "rows_per_step": sum(step.num_rows for step in profiled) / self._profiled,
        } | _families(profiler, self._profiled), profiled

    def _control_profiler(self) -> None:
        at = len(self.steps)
        if self._control == 0 and at >= self._profile_from:
            torch.cuda.synchronize()
            self._profiler.start()
            self._control, self._started = 1, at
        elif self._control == 1 and at >= self._started + PROFILED_STEPS:
            self._stop_profiler()

    def _stop_profiler(self) -> None:
        torch.cuda.synchronize()
        self._profiler.stop()
        self._control = 2
        self._profiled = len(self.steps) - self._started


FAMILIES = (
    ("attention", ("_attend", "_merge")),
    ("rotary and KV write", ("_rotary_kv_write",)),
    ("norms", ("_rms_norm",)),
    ("activation", ("_activation",)),
    ("quantising", ("_quantize_rows",)),
    ("products", ("_product", "nvjet", "gemm", "cutlass", "cublas", "splitk", "xmma", "wgmma")),
    ("copies", ("memcpy", "memset")),
)
"""Families of kernels by parts of their names, the first that fits; the rest are `other`."""


def _families(profiler: Any, num_steps: int) -> dict[str, Any]:
    """Milliseconds a step by family, and the share of time without any kernel."""
    times: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    spans = []
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        first, last = event.time_range.start, event.time_range.end
        name = event.name.lower()
        family = next(
            (family for family, parts in FAMILIES if any(part in name for part in parts)), "other"
        )
        times[family] += last - first
        if family == "other":
            others[event.name[:60]] += last - first
        spans.append((first, last))
    if not spans:
        return {"steps": num_steps, "note": "the profiler saw no kernel"}
    spans.sort()
    busy, end = 0.0, spans[0][0]
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    span = end - spans[0][0]
    largest = sorted(others.items(), key=lambda item: -item[1])[:6]
    return {
        "steps": num_steps,
        "ms_per_step": span / 1e3 / num_steps,
        "gap_share": 1 - busy / span,
        "gap_ms_per_step": (span - busy) / 1e3 / num_steps,
        "ms_per_step_by_family": {
            family: time_us / 1e3 / num_steps for family, time_us in sorted(times.items())
        },
        "largest_others_ms_per_step": {name: us / 1e3 / num_steps for name, us in largest},
    }


def _part_bounds(
    steps: Sequence[Step],
    shape: ModelShape,
    about: dict[str, Any],
    limits: dict[str, float],
    profile: dict[str, Any],
) -> dict[str, Any]:
    """Bounds of profiled steps by part, milliseconds a step, and the shares that were reached."""
    if "ms_per_step" not in profile:
        return {}
    cost = _card_cost(shape, about, limits, overlap=0.0)
    parts = [cost.parts(step) for step in steps]
    seconds = 1e-3 * profile["ms_per_step"] * len(steps)
    return {
        "bound_ms_per_step": {
            part: 1e3 * sum(getattr(one, part) for one in parts) / len(steps)
            for part in ("layers", "head", "attention")
        },
    } | _bounds(steps, shape, about, limits, seconds)


def _bounds(
    steps: Sequence[Step],
    shape: ModelShape,
    about: dict[str, Any],
    limits: dict[str, float],
    seconds: float,
) -> dict[str, float]:
    """Shares of the bounds: these steps where every kernel reaches the card's own rates."""
    shares = {}
    for bound, overlap in (("serial", 0.0), ("overlapped", 1.0)):
        cost = _card_cost(shape, about, limits, overlap=overlap)
        costs = StepCosts(cost, about["block_size"])
        bound_s = sum(costs.seconds(step) for step in steps)
        shares[f"{bound}_bound_s"] = bound_s
        shares[f"share_of_{bound}_bound"] = bound_s / seconds
    flops = shape.layer_flops_per_token * sum(step.num_tokens for step in steps)
    flops += shape.head_flops_per_token * sum(len(step.sample_tokens) for step in steps)
    shares["share_of_matrix_rate"] = flops / seconds / limits["matrix_flops_per_s"]
    return shares


def _card_cost(
    shape: ModelShape, about: dict[str, Any], limits: dict[str, float], *, overlap: float
) -> CostModel:
    """What steps cost where products and attention reach the rates that were measured."""
    dtype, is_fp8 = getattr(torch, about["dtype"]), about["quantize"] == "fp8"
    itemsize = dtype.itemsize
    kv_bytes = element_bytes(about["kv_cache_dtype"], dtype, shape.attention[0].head_dim)
    card = DeviceProfile(
        name="this card",
        bf16_flops_per_s=limits["matrix_flops_per_s"],
        fp32_flops_per_s=limits["matrix_flops_per_s"],
        memory_bytes_per_s=limits["copy_bytes_per_s"],
        memory_bytes=1e15,
        fp8_flops_per_s=limits.get("fp8_flops_per_s"),
        product_share=1.0,
        attention_share=1.0,
        memory_share=1.0,
        kv_share=1.0,
        step_s=0.0,
        tile_rows=1,
    )
    hardware = device_hardware(card, shape, itemsize, overlap=overlap, fp8=is_fp8)
    return CostModel(shape, hardware, 1 if is_fp8 else itemsize, kv_bytes, ROWS_PER_LOAD)


def _transformers(budget: Budget, found: dict[str, Any]) -> list[dict[str, Any]]:
    """`generate` of transformers on the 8B shape, one static batch for each of two workloads."""
    lines = []
    try:
        import transformers
    except ImportError:
        return [{"skipped": "transformers is not installed"}]
    if budget.is_spent():
        found["left_out"].append("transformers")
        return []
    config = transformers.LlamaConfig(**LLAMA_8B)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    for which, batch in (("128/128", 128), ("2048/128", 32)):
        if budget.is_spent():
            found["left_out"].append(f"transformers {which}")
            continue
        num_in, num_out = map(int, which.split("/"))
        ids = torch.randint(3, 128256, (batch, num_in), device="cuda")
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            model.generate(ids[:2, :16], attention_mask=mask[:2, :16], max_new_tokens=4,
                           do_sample=False)  # fmt: skip
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, attention_mask=mask, max_new_tokens=num_out, do_sample=False)
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        line = {
            "workload": which,
            "batch": batch,
            "seconds": seconds,
            "output_tokens_per_s": batch * num_out / seconds,
            "total_tokens_per_s": batch * (num_in + num_out) / seconds,
        }
        lines.append(line)
        print(
            f"transformers {which}: {line['output_tokens_per_s']:.0f} output tokens/s", flush=True
        )
    return lines


def table(found: dict[str, Any]) -> str:
    """One line per model and workload, and the profiles."""
    lines = [_line(line) for line in found["lines"]]
    for line in found["lines"]:
        if "ms_per_step" in line.get("profile", {}):
            profile = line["profile"]
            parts = profile["ms_per_step_by_family"].items()
            lines.append(
                f"{line['model']} {profile['what']} ({profile['rows_per_step']:.0f} rows, "
                f"{profile['tokens_per_step']:.0f} tokens): {profile['ms_per_step']:.2f} ms, gap "
                f"{profile['gap_share']:.1%}, serial {profile['share_of_serial_bound']:.1%}, "
                f"matrix {profile['share_of_matrix_rate']:.1%}; "
                + ", ".join(f"{family} {ms:.2f}" for family, ms in parts)
                + "; bounds: "
                + ", ".join(f"{p} {ms:.2f}" for p, ms in profile["bound_ms_per_step"].items())
            )
    for other in found.get("transformers", []):
        lines.append(f"transformers: {other}")
    if found["left_out"]:
        lines.append(f"left out: {', '.join(found['left_out'])}")
    return "\n".join(lines)


def _line(line: dict[str, Any]) -> str:
    return (
        f"{line['model']:34} {line['workload']:10} {line['output_tokens_per_s']:9.0f} output/s "
        f"{line['total_tokens_per_s']:9.0f} total/s  serial {line['share_of_serial_bound']:.1%} "
        f"overlapped {line['share_of_overlapped_bound']:.1%} matrix "
        f"{line['share_of_matrix_rate']:.1%}  {line['steps']} steps, {line['graph_steps']} graphs, "
        f"host {line['host_ms_per_step']:.2f} ms, {line['seconds']:.1f} s"
    )

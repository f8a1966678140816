"""Section `parity`: SmolLM2 on the card against transformers' model of the same weights there.

48 prompts, 64 tokens each, greedy, through the whole engine.

- fp32: every token must be transformers' greedy choice, given the tokens before it, wherever its
  two best logits are further apart than TIE. One forward pass over prompt and output says so.
- bf16: log-probabilities of the tokens that were drawn, as the engine reports them while it
  decodes, against transformers in fp32. The largest error may be ERROR_FACTOR times that of
  transformers in bf16, which rounds as often.

Where the model's file is too large for one transfer, `--model` is a folder of its parts, which are
put together in order of their names. Before it, and in a dry run instead, the same in fp32 with a
tiny random model, and on a card all kinds of draws with it, against the same engine on the CPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchwright.errors import ModelNotFoundError
from batchwright.models.causal_lm import CausalLM
from batchwright.models.loader import load_model
from batchwright.request import Request, Result, SamplingParams
from batchwright.text.tokenizer import load_tokenizer
from batchwright.weights.checkpoint import open_checkpoint
from batchwright.weights.locate import locate_model
from benchmarks.gpu.card import Budget, Timer
from benchmarks.gpu.under_test import make_engine, random_model
from benchmarks.smollm2_prompts import prompt_ids

MAX_TOKENS = 64
TIE = 1e-3
ERROR_FACTOR = 2.0
TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
TINY_MIXTURE = TINY | {
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


def run(timer: Timer, budget: Budget, model_name: str) -> dict[str, Any]:
    """All comparisons; `failed` counts those that do not hold."""
    if importlib.util.find_spec("transformers") is None:
        return {"skipped": "transformers is not installed", "failed": 0}
    device = timer.device
    rng = np.random.default_rng(0)
    lengths = (1, 5, 37) if device == "cpu" else (1, 5, 37, 130, 20, 64, 65, 3)
    tiny_prompts = [rng.integers(3, 97, length).tolist() for length in lengths]
    tiny = random_model(dict(TINY), torch.float32, device, 256)
    found: dict[str, Any] = {"tiny": _in_fp32(dict(TINY), tiny, device, tiny_prompts)[1]}
    found["failed"] = int(found["tiny"]["mismatches"] > 0)
    if device != "cpu":
        found["draws"] = compare_draws(device)
        found["failed"] += int(found["draws"]["different_rows"] > 1)
        found["mixture"] = compare_draws(device, TINY_MIXTURE)
        found["failed"] += int(found["mixture"]["different_rows"] > 1)
        found["int8_kv"] = compare_draws(device, kv_cache_dtype="int8")
        found["failed"] += int(found["int8_kv"]["different_rows"] > 1)
    if device == "cpu" or budget.is_spent():
        return found
    start = time.monotonic()
    try:
        path = _joined(model_name)
    except ModelNotFoundError as error:
        return found | {"left_out": str(error)}
    checkpoint = open_checkpoint(path)
    prompts = prompt_ids(load_tokenizer(path))

    def ours(dtype: torch.dtype) -> CausalLM:
        return load_model(checkpoint, dtype=dtype, max_positions=2048, device=device)

    model = ours(torch.float32)
    found["load_s"] = round(time.monotonic() - start, 1)
    reference, found["fp32"] = _in_fp32(dict(checkpoint.config), model, device, prompts)
    found["failed"] += int(found["fp32"]["mismatches"] > 0)
    outputs, seconds = _generate(ours(torch.bfloat16), device, prompts, logprobs=0)
    found["bf16"] = _compare_logprobs(reference, prompts, outputs) | {"seconds": seconds}
    allowed = ERROR_FACTOR * found["bf16"]["largest_error_of_transformers"]
    found["failed"] += int(not found["bf16"]["largest_error"] <= allowed)
    return found


DRAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7, "n": 2},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "n": 2},
    {"temperature": 0.0, "logit_bias": {5: 30.0, 7: -100.0}},
    {"temperature": 0.5, "min_tokens": 4, "stop_token_ids": (5, 6, 7, 8, 9)},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.9, "logprobs": 0, "top_k": 20},
)
"""Every kind of draw."""


def compare_draws(
    device: str, config: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Rows whose tokens differ from those that the same engine draws on the CPU, by its sampler.

    fp32 logits differ in the last bits, which may decide a draw: one row may differ.
    """
    rng = np.random.default_rng(1)
    requests = [
        Request(
            id=str(index),
            prompt_token_ids=rng.integers(3, 97, 5 + 9 * index).astype(np.int32),
            params=SamplingParams(max_tokens=12, seed=0, **kind),
        )
        for index, kind in enumerate(DRAWS)
    ]
    drawn, logprobs = [], []
    for where in ("cpu", device):
        model = random_model(dict(config or TINY), torch.float32, "cpu", 256).to(where)
        engine, _, _ = make_engine(
            model, where, max_num_seqs=8, max_num_batched_tokens=64, seed=0, **settings
        )
        results = {result.request_id: result for result in engine.run(requests)}
        engine.close()
        drawn.append({id: [o.token_ids for o in result.outputs] for id, result in results.items()})
        logprobs.append([one.logprob for one in results["8"].outputs[0].logprobs or ()])
    different = [id for id in drawn[0] if drawn[0][id] != drawn[1][id]]
    return {
        "rows": len(requests),
        "different_rows": len(different),
        "which": different,
        "largest_logprob_difference": max(
            (abs(a - b) for a, b in zip(*logprobs, strict=True)), default=0.0
        ),
    }


def _in_fp32(
    config: dict[str, Any], model: CausalLM, device: str, prompts: list[list[int]]
) -> tuple[Any, dict[str, Any]]:
    """(transformers' model, what came of the comparison)."""
    reference = _reference(config, model, device)
    outputs, seconds = _generate(model, device, prompts, logprobs=None)
    return reference, _compare_tokens(reference, prompts, outputs) | {"seconds": seconds}


def _joined(model_name: str) -> Path:
    """The model's file or folder; parts of a file are put together in the temporary folder."""
    folder = Path(model_name)
    parts = sorted(folder.glob("part-*")) if folder.is_dir() else []
    if not parts:
        return locate_model(model_name)
    whole = Path(tempfile.gettempdir()) / "batchwright-parity.gguf"
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
    return whole


def _generate(
    model: CausalLM, device: str, prompts: list[list[int]], *, logprobs: int | None
) -> tuple[list[Result], float]:
    """Results in order, and the seconds of the run (kernels are compiled in it)."""
    max_tokens = MAX_TOKENS if device != "cpu" else 4
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs
    )
    requests = [
        Request(id=str(i), prompt_token_ids=np.array(ids, np.int32), params=params)
        for i, ids in enumerate(prompts)
    ]
    sizes = {"max_num_seqs": 48, "max_num_batched_tokens": 512} if device != "cpu" else {}
    engine, executor, _ = make_engine(model, device, **sizes)
    start = time.monotonic()
    results = sorted(engine.run(requests), key=lambda result: int(result.request_id))
    seconds = time.monotonic() - start
    print(f"{executor.num_replayed} of {engine.stats.num_steps} steps were graphs")
    engine.close()
    for result in results:
        if result.error is not None:
            raise result.error
    return results, round(seconds, 2)


def _reference(config: dict[str, Any], weights: CausalLM, device: str) -> Any:
    """transformers' Llama in fp32 with these weights."""
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(device).eval()
    state = {}
    for name, value in weights.state_dict().items():
        for merged, parts in (
            ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("gate_up_proj", ("gate_proj", "up_proj")),
        ):
            if f".{merged}." in name:
                owner = weights.get_submodule(name.rpartition(".")[0])
                widths = [owner.parts[part] for part in parts]
                for part, rows in zip(parts, value.split(widths), strict=True):
                    state[name.replace(merged, part)] = rows
                break
        else:
            state[name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.float()


@torch.inference_mode()
def _rows(reference: Any, prompt: list[int], output: list[int], device: str) -> torch.Tensor:
    """[num_output, vocab_size] fp32 logits that each output token was chosen from."""
    ids = torch.tensor([prompt + output], device=device)
    return reference(ids).logits[0, len(prompt) - 1 : -1].float()


def _compare_tokens(
    reference: Any, prompts: list[list[int]], results: list[Result]
) -> dict[str, Any]:
    device = str(next(reference.parameters()).device)
    mismatches, ties, num_tokens, smallest = [], 0, 0, float("inf")
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        output = result.outputs[0].token_ids
        rows = _rows(reference, prompt, output, device)
        best = rows.topk(2)
        margin = best.values[:, 0] - best.values[:, 1]
        wrong = best.indices[:, 0] != torch.tensor(output, device=device)
        num_tokens += len(output)
        ties += int((margin <= TIE).sum())
        smallest = min(smallest, float(margin.min()))
        mismatches += [
            [index, at, float(margin[at])]
            for at in (wrong & (margin > TIE)).nonzero()[:, 0].tolist()
        ]
    return {
        "num_tokens": num_tokens,
        "mismatches": len(mismatches),
        "first_mismatches": mismatches[:8],
        "ties": ties,
        "smallest_margin": smallest,
    }


def _compare_logprobs(
    reference: Any, prompts: list[list[int]], results: list[Result]
) -> dict[str, Any]:
    """Ours in bf16, and transformers' in bf16, against transformers in fp32."""
    device = str(next(reference.parameters()).device)
    right, mine, chosen = [], [], []
    for prompt, result in zip(prompts, results, strict=True):
        output = result.outputs[0]
        assert output.logprobs is not None
        rows = _rows(reference, prompt, output.token_ids, device)
        ids = torch.tensor(output.token_ids, device=device)
        right.append(rows.log_softmax(-1).gather(1, ids[:, None])[:, 0].cpu())
        chosen.append((rows.argmax(-1) == ids).cpu())
        mine.append(torch.tensor([one.logprob for one in output.logprobs]))
    reference.bfloat16()
    theirs = []
    for prompt, result in zip(prompts, results, strict=True):
        output_ids = result.outputs[0].token_ids
        rows = _rows(reference, prompt, output_ids, device)
        ids = torch.tensor(output_ids, device=device)
        theirs.append(rows.log_softmax(-1).gather(1, ids[:, None])[:, 0].cpu())
    truth = torch.cat(right)
    own, other = ((torch.cat(x) - truth).abs() for x in (mine, theirs))
    return {
        "num_tokens": len(truth),
        "largest_error": float(own.max()),
        "mean_error": float(own.mean()),
        "largest_error_of_transformers": float(other.max()),
        "mean_error_of_transformers": float(other.mean()),
        "share_of_fp32_choices": float(torch.cat(chosen).float().mean()),
    }


def table(found: dict[str, Any]) -> str:
    """What was compared."""
    if "skipped" in found:
        return f"left out: {found['skipped']}"
    lines = [
        f"{name}: {fp32['mismatches']} of {fp32['num_tokens']} tokens are not transformers' choice "
        f"({fp32['ties']} ties, smallest margin {fp32['smallest_margin']:.2g})"
        for name in ("tiny", "fp32")
        if (fp32 := found.get(name)) is not None
    ]
    if "draws" in found:
        lines.append(f"draws, against the CPU's sampler: {found['draws']}")
        lines.append(f"draws of a mixture of experts: {found['mixture']}")
        lines.append(f"draws with keys and values in int8: {found['int8_kv']}")
    if "left_out" in found:
        lines.append(f"left out: {found['left_out']}")
    if "bf16" in found:
        bf16 = found["bf16"]
        lines.append(
            f"bf16: log-probabilities off by at most {bf16['largest_error']:.3g}, on average "
            f"{bf16['mean_error']:.2g} (transformers: {bf16['largest_error_of_transformers']:.3g}, "
            f"{bf16['mean_error_of_transformers']:.2g}); {bf16['share_of_fp32_choices']:.1%} of "
            "tokens are the choice in fp32"
        )
    return "\n".join(lines) + f"\nfailed: {found['failed']}"

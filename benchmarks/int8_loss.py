"""What do `--quantize` and `--kv-cache-dtype` lose?

Loss on SmolLM2, each variant against fp32: int8 as the engine makes it, with the 8-bit activations
of processors that have VNNI and with the 7-bit ones of those that have only AVX2, and both with the
output head left in fp32; fp32 with keys and values in bf16 and in int8; and the fp8 products of a
GPU, computed by their twin (all else is fp32 then, which is bf16 on a GPU).

- Perplexity of the Python reference (`pydoc_data.topics`, part of every Python) and of this
  repository's own docs/*.md, in windows of 512 tokens.
- Greedy tokens of the 48 prompts of tests/engine/smollm2.py, 64 each: how many rows are the same to
  the end, how far they are the same, and, given fp32's own text, how often its next token is the
  variant's first choice.
- Accuracy on a synthetic classification set: a review is one of 12 sentences with one of 20 words
  in it; its label is the word's. Four examples in the prompt; the likelier label is the answer.

Needs what the tests need (`make setup`).

    python -m benchmarks.int8_loss --windows 48 [--only "keys and values"]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import torch

from batchwright.kernels.int8_linear import dot_tile
from batchwright.kernels.int8_linear import numba as int8_kernel
from batchwright.kernels.linear.packing import pack
from batchwright.llm import LLM
from batchwright.models.layers import Linear
from batchwright.request import Request, SamplingParams, Task
from benchmarks.machine import describe_commit, describe_machine, describe_versions

WINDOW = 512
NUM_OUTPUT = 64
SENTENCES = (
    "The food was {}.",
    "I found the film {}.",
    "What a {} book!",
    "My new phone is {}.",
    "The hotel was {}, and so was the pool.",
    "Everyone said the concert was {}.",
    "The service here is {}.",
    "This jacket is {}.",
    "Our guide was {} from start to end.",
    "The second season is {}.",
    "Honestly, the coffee tastes {}.",
    "The battery life is {}.",
)
GOOD = "wonderful excellent superb delightful fantastic amazing perfect brilliant great lovely"
BAD = "terrible awful horrible dreadful disappointing poor useless appalling bad disgusting"
EXAMPLES = (
    "Review: I loved every minute of it.\nLabel: positive\n\n"
    "Review: The screen cracked on the first day.\nLabel: negative\n\n"
    "Review: It stopped working after a week.\nLabel: negative\n\n"
    "Review: Best purchase of the year.\nLabel: positive\n\n"
)


class Variant(NamedTuple):
    """How a model computes.

    Attributes:
        way: of int8 products, None for fp32.
        exact_head: whether the output head stays fp32.
        kv_cache_dtype: as in EngineConfig.
        fp8: whether products of the layers are in fp8.
    """

    way: int | None
    exact_head: bool = False
    kv_cache_dtype: str = "auto"
    fp8: bool = False


VARIANTS = {
    "fp32": Variant(None),
    "keys and values in bf16": Variant(None, kv_cache_dtype="bfloat16"),
    "keys and values in int8": Variant(None, kv_cache_dtype="int8"),
    "int8, keys, values in int8": Variant(dot_tile.VNNI_512, kv_cache_dtype="int8"),
    "int8, 8-bit activations": Variant(dot_tile.VNNI_512),
    "int8, 7-bit activations": Variant(dot_tile.PAIRS_256),
    "int8, 8-bit, head in fp32": Variant(dot_tile.VNNI_512, exact_head=True),
    "int8, 7-bit, head in fp32": Variant(dot_tile.PAIRS_256, exact_head=True),
    "fp8": Variant(None, fp8=True),
}


def load(variant: Variant) -> LLM:
    """SmolLM2 as the variant says."""
    settings: dict[str, Any] = {
        "order": "fcfs",
        "max_model_len": 2048,
        "kv_cache_dtype": variant.kv_cache_dtype,
    }
    if variant.way is None:
        llm = LLM("smollm2", **settings)
        if variant.fp8:
            _make_fp8(llm)
        return llm
    way = variant.way
    int8_kernel.best_way_here = functools.cache(lambda: way)
    llm = LLM("smollm2", quantize="int8", **settings)
    if variant.exact_head:
        model = llm.engine._executor._model  # type: ignore[attr-defined]
        table = model.model.embed_tokens.weight.float()
        model.lm_head.hold(pack(table))
    return llm


def _make_fp8(llm: LLM) -> None:
    """What `quantize="fp8"` does on a GPU."""
    model = llm.engine._executor._model  # type: ignore[attr-defined]
    for module in model.modules():
        if isinstance(module, Linear) and module is not model.lm_head:
            values = module.rows(torch.arange(module.out_features))
            module.weight = torch.nn.Parameter(values, requires_grad=False)
            module.quantize_fp8()


def windows(text: str, llm: LLM, count: int) -> list[np.ndarray]:
    """The first tokens of a text, cut."""
    ids = np.array(llm.tokenizer.encode(text), np.int32)
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW, WINDOW)][:count]


def perplexity(llm: LLM, text: str, count: int) -> tuple[float, int]:
    """(perplexity, tokens scored)."""
    requests = [
        Request(id=str(i), prompt_token_ids=ids, task=Task.SCORE, score_start=1)
        for i, ids in enumerate(windows(text, llm, count))
    ]
    logprobs = np.concatenate([result.score.token_logprobs for result in run(llm, requests)])
    return math.exp(-logprobs.mean(dtype=np.float64)), len(logprobs)


def run(llm: LLM, requests: list[Request]) -> Iterator[Any]:
    """Results in order; none may fail."""
    results = {result.request_id: result for result in llm.engine.run(requests)}
    assert all(result.error is None for result in results.values())
    return (results[request.id] for request in requests)


def greedy(llm: LLM) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, outputs) as token ids."""
    from tests.engine.smollm2 import varied_requests

    requests = varied_requests(llm, NUM_OUTPUT)
    outputs = [list(result.outputs[0].token_ids) for result in run(llm, requests)]
    return [request.prompt_token_ids.tolist() for request in requests], outputs


def first_choices(llm: LLM, prompts: list[list[int]], outputs: list[list[int]]) -> float:
    """Share of the output tokens that are the model's first choice where they stand."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    requests = [
        Request(id=str(i), prompt_token_ids=np.array(p + o, np.int32), params=params)
        for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))
    ]
    ranks = [
        one.rank
        for result, output in zip(run(llm, requests), outputs, strict=True)
        for one in result.prompt_logprobs[-len(output) :]
    ]
    return sum(rank == 1 for rank in ranks) / len(ranks)


def classify(llm: LLM) -> tuple[float, list[bool]]:
    """(accuracy, the answers: is it positive) on the synthetic set."""
    words = [(word, True) for word in GOOD.split()] + [(word, False) for word in BAD.split()]
    rows = [(sentence.format(word), label) for sentence in SENTENCES for word, label in words]
    pairs = [
        (f"{EXAMPLES}Review: {review}\nLabel:", label)
        for review, _ in rows
        for label in (" positive", " negative")
    ]
    scores = [result.score.logprob for result in llm.score(pairs)]  # type: ignore[union-attr]
    answers = [a > b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    right = [answer == label for answer, (_, label) in zip(answers, rows, strict=True)]
    return sum(right) / len(right), answers


def texts() -> dict[str, Callable[[], str]]:
    """Name to text."""
    docs = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    return {
        "python": lambda: "\n\n".join(topics[name] for name in sorted(topics)),
        "docs": lambda: "\n\n".join(path.read_text(encoding="utf-8") for path in docs),
    }


def measure(count: int, names: list[str]) -> list[dict[str, Any]]:
    """A line for each variant, printed as it comes; the first is what others are compared with."""
    lines: list[dict[str, Any]] = []
    prompts: list[list[int]] = []
    plain: list[list[int]] = []
    labels: list[bool] = []
    for name in names:
        llm = load(VARIANTS[name])
        line: dict[str, Any] = {"variant": name}
        for text_name, text in texts().items():
            line[f"{text_name}_perplexity"], line[f"{text_name}_tokens"] = perplexity(
                llm, text(), count
            )
        own_prompts, outputs = greedy(llm)
        line["accuracy"], answers = classify(llm)
        if not lines:
            prompts, plain, labels = own_prompts, outputs, answers
        same = [_common(a, b) for a, b in zip(plain, outputs, strict=True)]
        line["rows_same"] = sum(n == NUM_OUTPUT for n in same)
        line["mean_same_tokens"] = sum(same) / len(same)
        line["first_choices"] = first_choices(llm, prompts, plain)
        pairs = zip(answers, labels, strict=True)
        line["labels_same"] = sum(a == b for a, b in pairs) / len(labels)
        llm.engine.close()
        lines.append(line)
        print(
            f"{name:26} perplexity {line['python_perplexity']:.3f} {line['docs_perplexity']:.3f}  "
            f"rows same {line['rows_same']}/48, tokens {line['mean_same_tokens']:.1f}/{NUM_OUTPUT},"
            f" first choices {line['first_choices']:.2%}  accuracy {line['accuracy']:.2%}, "
            f"labels same {line['labels_same']:.2%}",
            flush=True,
        )
    return lines


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=48, help="of 512 tokens, of each text")
    parser.add_argument("--only", default="", help="variants whose names have this, and fp32")
    arguments = parser.parse_args()
    names = [name for name in VARIANTS if name == "fp32" or arguments.only in name]
    lines = measure(arguments.windows, names)
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.int8_loss",
                "windows": arguments.windows,
                "lines": lines,
                "machine": describe_machine(),
                "versions": describe_versions("torch", "numpy", "numba"),
                "commit": describe_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()

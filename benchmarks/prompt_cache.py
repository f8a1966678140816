"""What does Prompt Cache lose on real text, and what does it save where prefix sharing fails?

Loss, on SmolLM2: texts of the Python reference (`pydoc_data.topics`, part of every Python). 480
tokens of a text are cut into modules; the 64 tokens after them are scored, and 32 are generated.
Lines: `plain`, one prompt; `modules`, each encoded by itself; `scaffold`, all encoded together,
which must be the plain run bit for bit; `text alone`, without the 480 tokens. Perplexity says how
much of what the context tells is kept; agreement says how many greedy tokens equal the plain ones.
`other order` has the same modules as the plain run in another order: what a plain run loses by
that.

Saving: 12 modules of about 150 tokens; each row takes 4 of them and asks a question. `plain` with
prefix sharing, in the order read and in the order of prefixes, against `modules`, in turns. What
must be computed follows from the job: without sharing every row computes all its tokens; with
modules each of them is computed once, and of a row only the question and the answer.

    python -m benchmarks.prompt_cache --texts 16 --rows 48 --repeat 3
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from batchwright.llm import LLM
from batchwright.prompt_cache.call import PromptCall
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.prompt_cache.schema import parse_schema
from batchwright.prompt_layout import PromptLayout
from batchwright.request import Request, Result, SamplingParams, Task
from benchmarks.machine import describe_commit, describe_machine, describe_versions

NUM_CONTEXT, NUM_SCORED, NUM_GREEDY = 480, 64, 32
MODULE_COUNTS = (2, 4, 8)
SCAFFOLDED = 4
"""With so many modules the scaffold is run too."""
LINES = ("plain", "scaffold", "modules", "other order", "text alone")
NUM_MODULES, MODULE_TOKENS, MODULES_PER_ROW, NUM_OUTPUT = 12, 150, 4, 8
SEED = 20260


def schema_of(modules: Sequence[str], scaffold: bool, tokenizer: Any) -> PromptSchemas:
    """A schema of modules m0, m1, ..."""
    names = [f"m{i}" for i in range(len(modules))]
    value = {
        "name": "text",
        "content": [
            {"module": name, "content": text} for name, text in zip(names, modules, strict=True)
        ],
        "scaffolds": [names] if scaffold else [],
    }
    return PromptSchemas([parse_schema(json.dumps(value).encode())], tokenizer)


def call(count: int) -> PromptCall:
    """A row's call of the first `count` modules."""
    return PromptCall(None, tuple(f"m{i}" for i in range(count)), ())


def cut(text: str, tokenizer: Any, num_parts: int, num_tokens: int) -> list[str]:
    """Consecutive parts of a text of about num_tokens / num_parts tokens, cut before a space."""
    parts, rest = [], text
    for _ in range(num_parts):
        end = 4 * num_tokens // num_parts  # about four characters a token
        for _ in range(8):
            end = rest.rfind(" ", 0, end)
            size = len(tokenizer.encode(rest[:end]))
            if abs(size - num_tokens / num_parts) <= 3:
                break
            end = int(end * num_tokens / num_parts / size) + 2
        parts.append(rest[:end])
        rest = rest[end:]
    return [*parts, rest]


def texts(tokenizer: Any, count: int) -> list[str]:
    """Texts of the Python reference that are long enough, in alphabetical order of their names."""
    found = []
    for name in sorted(topics):
        text = " ".join(topics[name].split())  # one space between words
        if len(tokenizer.encode(text)) >= NUM_CONTEXT + NUM_SCORED + 40:
            found.append(text)
    return found[:count]


def request(
    id: str, ids: Sequence[int], layout: PromptLayout | None, after: Sequence[int] | None
) -> Request:
    """Score `after` if given; else generate greedily."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_GREEDY, ignore_eos=True)
    if after is None:
        return Request(
            id=id, prompt_token_ids=np.array(ids, np.int32), params=params, layout=layout
        )
    if layout is not None:  # the scored tokens belong to the last run
        position, length = layout.runs[-1]
        runs = (*layout.runs[:-1], (position, length + len(after)))
        layout = dataclasses.replace(layout, runs=runs)
    whole = np.array([*ids, *after], np.int32)
    return Request(
        id=id, prompt_token_ids=whole, task=Task.SCORE, score_start=len(ids), layout=layout
    )


def run(llm: LLM, requests: list[Request]) -> dict[str, Result]:
    """Results by id; none may fail."""
    results = {result.request_id: result for result in llm.engine.run(requests)}
    assert all(result.error is None for result in results.values())
    return results


def measure_loss(llm: LLM, num_texts: int) -> list[dict[str, Any]]:
    """A line for each number of modules and way of computing."""
    tokenizer, rng = llm.tokenizer, random.Random(SEED)
    found = texts(tokenizer, num_texts)
    lines = []
    for num_modules in MODULE_COUNTS:
        jobs: dict[str, list[Request]] = {}
        for index, text in enumerate(found):
            *modules, rest = cut(text, tokenizer, num_modules, NUM_CONTEXT)
            ids = tokenizer.encode(rest)
            first, after = ids[:1], ids[1 : 1 + NUM_SCORED]  # a prompt ends in a text
            prompts: dict[str, tuple[list[int], PromptLayout | None]] = {}
            schemas = schema_of(modules, False, tokenizer)
            prompts["modules"] = schemas.compose(call(num_modules), first)
            if num_modules == SCAFFOLDED:
                schemas = schema_of(modules, True, tokenizer)
                prompts["scaffold"] = schemas.compose(call(num_modules), first)
            prompts["plain"] = (prompts["modules"][0], None)
            prompts["text alone"] = (first, None)
            order = list(range(num_modules))
            while order == sorted(order):
                rng.shuffle(order)
            moved = [i for m in order for i in tokenizer.encode(modules[m])]
            prompts["other order"] = ([*moved, *first], None)
            for name, (prompt, layout) in prompts.items():
                for kind, scored in (("score", after), ("greedy", None)):
                    id = f"{kind} {name} {index}"
                    jobs.setdefault(name, []).append(request(id, prompt, layout, scored))
        results = {name: run(llm, requests) for name, requests in jobs.items()}
        for name in LINES:
            if name in results:
                line = _loss(name, results, len(found))
                lines.append({"modules": num_modules, "line": name, **line})
                _show(lines[-1])
        if num_modules == SCAFFOLDED:
            assert _equal("scaffold", "plain", results, len(found)), "a scaffold changed a bit"
    return lines


def _show(line: dict[str, Any]) -> None:
    print(
        f"{line['modules']:7}  {line['line']:12} {line['perplexity']:10.3f}"
        f"  {line['first_token_equal']:17.1%}"
        f"  {line['greedy_tokens_before_first_difference']:24.1f}",
        flush=True,
    )


def _loss(name: str, results: dict[str, dict[str, Result]], count: int) -> dict[str, float]:
    """Perplexity of the scored tokens, and agreement with the plain run."""
    logprobs, agreed, first = [], [], []
    for index in range(count):
        score = results[name][f"score {name} {index}"].score
        assert score is not None
        logprobs += score.token_logprobs.tolist()
        ours = results[name][f"greedy {name} {index}"].outputs[0].token_ids
        plain = results["plain"][f"greedy plain {index}"].outputs[0].token_ids
        same = [a == b for a, b in zip(ours, plain, strict=True)]
        first.append(same[0])
        agreed.append([*same, False].index(False))
    return {
        "perplexity": math.exp(-statistics.fmean(logprobs)),
        "first_token_equal": statistics.fmean(first),
        "greedy_tokens_before_first_difference": statistics.fmean(agreed),
    }


def _equal(a: str, b: str, results: dict[str, dict[str, Result]], count: int) -> bool:
    """Whether all scores have the same bits and all outputs the same tokens."""
    for index in range(count):
        scores = [results[name][f"score {name} {index}"].score for name in (a, b)]
        outputs = [results[name][f"greedy {name} {index}"].outputs[0] for name in (a, b)]
        assert scores[0] is not None and scores[1] is not None
        if not np.array_equal(scores[0].token_logprobs, scores[1].token_logprobs):
            return False
        if outputs[0].token_ids != outputs[1].token_ids:
            return False
    return True


def selection_job(tokenizer: Any, num_rows: int) -> dict[str, list[Request]]:
    """The same rows as plain prompts and with modules."""
    rng = random.Random(SEED)
    sources = texts(tokenizer, NUM_MODULES)
    modules = [cut(text, tokenizer, 1, MODULE_TOKENS)[0] for text in sources]
    schemas = schema_of(modules, False, tokenizer)
    jobs: dict[str, list[Request]] = {"plain": [], "modules": []}
    params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT, ignore_eos=True)
    for row in range(num_rows):
        chosen = sorted(rng.sample(range(NUM_MODULES), MODULES_PER_ROW))
        question = tokenizer.encode(
            f"\n\nQuestion {row}: what do the parts above have in common?\n"
        )
        names = PromptCall(None, tuple(f"m{i}" for i in chosen), ())
        ids, layout = schemas.compose(names, question)
        for name, given in (("plain", None), ("modules", layout)):
            jobs[name].append(
                Request(
                    id=str(row),
                    prompt_token_ids=np.array(ids, np.int32),
                    params=params,
                    layout=given,
                )
            )
    return jobs


def measure_saving(num_rows: int, repeat: int) -> list[dict[str, Any]]:
    """Runs of each line in turns, each on an engine of its own, which begins with nothing."""
    lines: list[dict[str, Any]] = []
    for _ in range(repeat):
        for name, order in (("plain", "fcfs"), ("plain", "prefix_dfs"), ("modules", "fcfs")):
            llm = LLM("smollm2", order=order, max_model_len=2048)
            requests = selection_job(llm.tokenizer, num_rows)[name]
            llm.generate([[5] * 40], SamplingParams(max_tokens=2))
            before = llm.engine.stats.num_computed_tokens
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            run(llm, requests)
            lines.append(
                {
                    "line": f"{name}, {order}",
                    "seconds": time.perf_counter() - start_s,
                    "cpu_s": time.process_time() - start_cpu_s,
                    "computed_tokens": llm.engine.stats.num_computed_tokens - before,
                    "prompt_tokens": sum(len(r.prompt_token_ids) for r in requests),
                }
            )
            llm.engine.close()
    return lines


def measure_copy(num_tokens: int = 600, repeat: int = 5) -> dict[str, float]:
    """CPU seconds of copying so many tokens' KV in all layers, and of computing them; the least."""
    llm = LLM("smollm2", max_model_len=2048)
    layers = llm.engine._executor._kv_layers  # type: ignore[attr-defined]
    tokens = np.arange(num_tokens, dtype=np.int32)
    pairs = np.stack((tokens, tokens + 10 * num_tokens + 5), axis=1)
    copy_s, compute_s = [], []
    for turn in range(repeat):
        start_s = time.process_time()
        for layer in layers:
            layer.copy_tokens(pairs)
        copy_s.append(time.process_time() - start_s)
        prompt = np.full(num_tokens, 50 + turn, np.int32)
        params = SamplingParams(temperature=0.0, max_tokens=1)
        start_s = time.process_time()
        run(llm, [Request(id="0", prompt_token_ids=prompt, params=params)])
        compute_s.append(time.process_time() - start_s)
    llm.engine.close()
    return {"tokens": num_tokens, "copy_cpu_s": min(copy_s), "compute_cpu_s": min(compute_s)}


def main() -> None:
    """Measure, print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    loss = []
    if arguments.texts:
        print("modules  line         perplexity  first token equal  greedy tokens equal of 32")
        loss = measure_loss(LLM("smollm2", max_model_len=2048), arguments.texts)
    saving = measure_saving(arguments.rows, arguments.repeat) if arguments.repeat else []
    for name in dict.fromkeys(line["line"] for line in saving):
        own = [line for line in saving if line["line"] == name]
        seconds = [line["seconds"] for line in own]
        print(
            f"{name:18} {own[0]['computed_tokens']:7,} of {own[0]['prompt_tokens']:,} prompt tokens"
            f" and outputs computed, median {statistics.median(seconds):6.1f} s"
            f" ({min(seconds):.1f} to {max(seconds):.1f}), of CPU"
            f" {statistics.median([line['cpu_s'] for line in own]):.1f} s"
        )
    copy = measure_copy() if arguments.repeat else None
    if copy is not None:
        print(
            f"copying {copy['tokens']} tokens takes {copy['copy_cpu_s']:.4f} s of CPU, computing "
            f"them {copy['compute_cpu_s']:.2f} s"
        )
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.prompt_cache",
                "texts": arguments.texts,
                "rows": arguments.rows,
                "loss": loss,
                "saving": saving,
                "copy": copy,
                "machine": describe_machine(),
                "versions": describe_versions("torch", "numpy", "numba"),
                "commit": describe_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()

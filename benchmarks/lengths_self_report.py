"""Does SmolLM2 know how long its answers will be? It is asked, and compared with what it wrote.

The 120 recorded rows (`benchmarks.length_rows`); the question is what `--lengths self_report` asks.
Beside its error stands that of the one number that fits all rows best, their median: a predictor
that is not better than that knows nothing about rows.

    python -m benchmarks.lengths_self_report
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from batchwright.llm import LLM
from batchwright.plan.length_predictor import Rows
from batchwright.plan.lengths.self_report import INSTRUCTION, MAX_ANSWER_TOKENS, Predictor
from batchwright.request import SamplingParams
from benchmarks.lengths import Job, real_job
from benchmarks.machine import describe_commit, describe_machine, describe_versions


def main() -> None:
    """Ask, print, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=120, help="how many are asked about")
    num_rows = parser.parse_args().rows
    llm = LLM("smollm2", max_model_len=1024)
    job = real_job(llm.tokenizer)
    job = Job(job.name, *(column[:num_rows] for column in job[1:]))
    instruction = llm.tokenizer.encode(INSTRUCTION, add_special_tokens=False)
    questions = [[*prompt.tolist(), *instruction] for prompt in job.prompts]
    start_s = time.process_time()
    params = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    results = llm.generate(questions, params)
    cpu_s = time.process_time() - start_s
    predictor = Predictor()
    texts = [result.outputs[0].text for result in results]
    has_number = [
        predictor.tell(prompt, text) for prompt, text in zip(job.prompts, texts, strict=True)
    ]
    guess = predictor.predict(Rows(job.prompts, job.most), np.zeros_like(job.most)).mean
    guess = np.clip(guess, 1, job.most)
    wrong = np.abs(guess - job.output)
    found = {
        "rows": len(questions),
        "with_a_number": sum(has_number),
        "mean_absolute_error": float(wrong.mean()),
        "within_50": float((wrong <= 50).mean()),
        "within_100": float((wrong <= 100).mean()),
        "correlation": float(np.corrcoef(guess, job.output)[0, 1]) if guess.std() else 0.0,
        "error_of_declared": float(np.abs(job.most - job.output).mean()),
        "error_of_median": float(np.abs(np.median(job.output) - job.output).mean()),
        "tokens_asked": sum(len(question) for question in questions),
        "tokens_computed": llm.engine.stats.num_computed_tokens,
        "tokens_drawn": llm.engine.stats.num_generated_tokens,
        "cpu_s": cpu_s,
    }
    for text in texts[:8]:
        print(repr(text))
    print(found)
    print(
        json.dumps(
            {
                "benchmark": "benchmarks.lengths_self_report",
                "results": found,
                "machine": describe_machine(),
                "versions": describe_versions("torch", "numpy", "numba"),
                "commit": describe_commit(),
            }
        )
    )


if __name__ == "__main__":
    main()

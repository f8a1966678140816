"""vLLM on a CPU: prefix caching, all rows at once, which is all it needs.

Its guide asks for tcmalloc and Intel's OpenMP to be loaded before everything else; they are, where
they are installed.
"""

from __future__ import annotations

import glob
import os
import sys
import time

from peer_job import Row, read_job

KV_CACHE_GB = 4
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2048


def main() -> None:
    """Load, warm up, run, answer."""
    _preload()
    job = read_job()
    cores = sorted(os.sched_getaffinity(0))[: job.num_threads]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_CACHE_GB))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    settings = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "enable_prefix_caching": True,
        "max_model_len": max(2048, job.longest),
    }
    llm = vllm.LLM(model=job.model, dtype=job.dtype, disable_log_stats=True, **settings)

    def run(rows: list[Row]) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": row.prompt_token_ids} for row in rows],
            [
                vllm.SamplingParams(
                    temperature=0,
                    max_tokens=row.num_output_tokens,
                    ignore_eos=True,
                    detokenize=False,
                )
                for row in rows
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    run([Row(0, [1, 2, 3, 4], 2)])
    more = {
        "dtype": job.dtype,
        "kv_cache_gb": os.environ["VLLM_CPU_KVCACHE_SPACE"],
        "preloaded": [
            os.path.basename(path) for path in os.environ["LD_PRELOAD"].split(":") if path
        ],
    }
    job.loaded(vllm.__version__, {**settings, **more})
    start = time.perf_counter()
    token_ids = run(job.rows)
    job.finished(time.perf_counter() - start, token_ids)


def _preload() -> None:
    """Start this process again with the libraries, unless the user has said what to load."""
    if "LD_PRELOAD" in os.environ:
        return
    patterns = (
        os.path.join(sys.prefix, "lib", "libiomp5.so"),
        "/usr/lib/*-linux-gnu/libtcmalloc_minimal.so.4",
    )
    found = [path for pattern in patterns for path in sorted(glob.glob(pattern))[:1]]
    environment = {**os.environ, "LD_PRELOAD": ":".join(found)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


if __name__ == "__main__":  # it starts processes that import this file
    main()

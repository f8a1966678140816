"""Our side of a comparison, in a process of its own like every other engine's.

    python -m batchwright.bench.own FOLDER

FOLDER is as for the runners of other engines (`peers/peer_job.py`); job.json also has `settings`,
fields of EngineConfig.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

from batchwright.bench.peers.peer_job import Job, Row, read_job


def main() -> None:
    """Load, warm up, run, answer."""
    job = read_job()
    values = json.loads((job.folder / "job.json").read_text(encoding="utf-8"))
    began = time.perf_counter()
    from batchwright.llm import LLM

    imported = time.perf_counter()
    from batchwright.bench.profile import Profile

    llm = LLM(job.model, **values["settings"])
    loaded = time.perf_counter()
    profile = Profile(llm)
    _generate(llm, [Row(0, [1], 1)])
    first_step_s = time.perf_counter() - loaded
    _generate(llm, _warm_up(job))  # what a machine compiles once, and caches
    profile.clear()
    compile_s, before = llm.compile_s(), dataclasses.asdict(llm.engine.stats)
    job.loaded(_version(), llm.settings())
    start = time.perf_counter()
    token_ids = _generate(llm, job.rows)
    seconds = time.perf_counter() - start
    after = dataclasses.asdict(llm.engine.stats)
    job.finished(
        seconds,
        token_ids,
        startup={
            "import_s": imported - began,
            "load_s": loaded - imported,
            "first_step_s": first_step_s,
        },
        parts_s=profile.of(seconds),
        compile_s=llm.compile_s() - compile_s,
        stats={
            name: after[name] - before[name]
            for name in ("num_steps", "num_computed_tokens", "num_cached_tokens", "num_preemptions")
        },
    )


def _warm_up(job: Job) -> list[Row]:
    """Two rows with a common beginning, which nothing of the job shares."""
    beginning = job.rows[0].prompt_token_ids[1:65]
    return [Row(0, [*beginning, 1], 3), Row(1, [*beginning, 2], 3)]


def _generate(llm: Any, rows: list[Row]) -> list[list[int]]:
    from batchwright.request import SamplingParams

    results = llm.generate(
        [row.prompt_token_ids for row in rows],
        [
            SamplingParams(temperature=0.0, max_tokens=row.num_output_tokens, ignore_eos=True)
            for row in rows
        ],
    )
    for result in results:
        if result.error is not None:
            raise result.error
    return [result.outputs[0].token_ids for result in results]


def _version() -> str:
    import batchwright

    return batchwright.__version__


if __name__ == "__main__":
    main()

"""Job directories made by hand, and by a job whose model is faked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from batchwright.errors import RequestError
from batchwright.job.directory import JobDirectory
from batchwright.job.formats.result_line import error_line
from batchwright.job.journal import Journal, RowState
from batchwright.job.machine import Machine
from batchwright.job.metrics import RunStart, Sample
from batchwright.plan.shape import AttentionShape, ModelShape, Product

SHAPE = ModelShape(
    hidden_size=10,
    vocab_size=50,
    num_layers=1,
    products=(Product(10, 5),),  # 100 FLOPs a token
    head=Product(10, 50),  # 1,000 FLOPs a line of logits
    attention=(AttentionShape(None, 1, 1, 1, 1),),  # 4 FLOPs a key
    num_params=0,
)
MACHINE = Machine(processor="abacus", num_cpus=2, memory_bytes=10**9, system="none")

KILLED_RUN = [
    RunStart(time=1000.0, model="m", engine="0", load_s=2.0, pid=7, machine=MACHINE, shape=SHAPE),
    Sample(t_s=1.0, time=1001.0, prefill_s=0.75, step_s=0.75, idle_s=0.25, num_running_seqs=4),
    Sample(
        t_s=3.0,
        time=1003.0,
        rows_succeeded=2,
        rows_failed=1,
        computed_tokens=100,
        computed_prompt_tokens=90,
        cached_tokens=30,
        generated_tokens=20,
        prompt_tokens=60,
        output_tokens=12,
        prompt_lengths=[0, 0, 2],
        output_lengths=[0, 1, 1],
        steps=5,
        step_rows=20,
        logits=20,
        keys=[1000],
        step_s=2.5,
        prefill_s=1.5,
        decode_s=1.0,
        idle_s=0.25,
        write_s=0.125,
        num_running_seqs=4,
        num_waiting_seqs=3,
        kv_used_fraction=0.5,
        peak_memory_bytes=500,
    ),
]
WHOLE_RUN = [
    RunStart(
        time=2000.0,
        model="m",
        engine="0",
        load_s=1.0,
        pid=8,
        machine=MACHINE,
        shape=SHAPE,
        settings={"dtype": "float32", "num_threads": 2, "max_num_seqs": 8},
    ),
    Sample(
        t_s=8.0,
        time=2008.0,
        event="end",
        input_ended=True,
        rows_read=10,
        rows_estimated=10,
        rows_skipped=2,
        rows_succeeded=7,
        rows_failed=1,
        rows_folded=1,
        rows_length_limited=3,
        computed_tokens=300,
        computed_prompt_tokens=210,
        recomputed_tokens=50,
        preemptions=2,
        cached_tokens=70,
        generated_tokens=140,
        prompt_tokens=270,
        output_tokens=130,
        prompt_lengths=[0, 0, 1, 6],
        output_lengths=[0, 7],
        steps=15,
        step_rows=80,
        logits=140,
        keys=[4000],
        recomputed_keys=[500],
        step_s=7.0,
        prefill_s=3.0,
        decode_s=4.0,
        compile_s=0.25,
        write_s=0.25,
        tail_since_s=6.0,
        tail_prefill_s=0.5,
        tail_decode_s=1.25,
        num_running_seqs=0,
        kv_used_fraction=0.0,
        peak_memory_bytes=400,
    ),
]


def write_metrics(folder: Path, lines: Iterable[RunStart | Sample | bytes]) -> None:
    """metrics.jsonl of these lines; bytes are written as they are, without a line end."""
    data = (
        line if isinstance(line, bytes) else msgspec.json.encode(line) + b"\n" for line in lines
    )
    (folder / "metrics.jsonl").write_bytes(b"".join(data))


def make_job(
    folder: Path,
    lines: Iterable[RunStart | Sample | bytes],
    *,
    num_succeeded: int = 0,
    errors: Iterable[str] = (),
) -> Path:
    """A job directory with such metrics and such a journal."""
    directory = folder / "results.jsonl.job"
    with JobDirectory(directory):
        journal = Journal(directory)
        for row in range(num_succeeded):
            journal.append(f"row{row}", row, RowState.SUCCEEDED, b"", b"{}\n")
        for row, code in enumerate(errors):
            line: Any = error_line("who", row, RequestError("what", code=code), None)
            data = msgspec.json.encode(line) + b"\n"
            journal.append(f"bad{row}", row, RowState.FAILED, b"", data)
        journal.commit()
        journal.close()
    write_metrics(directory, lines)
    return directory

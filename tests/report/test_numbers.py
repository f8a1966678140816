"""The numbers of a report, computed by hand from hand-made lines."""

from pathlib import Path

import msgspec
import pytest

from batchwright.job.machine import Machine
from batchwright.job.metrics import RunStart, Sample
from batchwright.report.ceiling import Ceiling
from batchwright.report.intervals import MAX_INTERVALS
from batchwright.report.make_report import make_report
from batchwright.report.numbers import PARTS, Report
from batchwright.report.read import read_job
from tests.report.made import KILLED_RUN, WHOLE_RUN, make_job

CEILING = Ceiling(layers=10_000.0, head=50_000.0)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    directory = make_job(tmp_path, [*KILLED_RUN, *WHOLE_RUN], num_succeeded=9, errors=["b"])
    return make_report(read_job(directory), CEILING)


def test_time_by_part(report: Report) -> None:
    times = report.times
    assert times.load_s == 3.0
    assert times.compile_s == 0.25
    assert times.prefill_s == 1.5 + 2.5
    assert times.decode_s == 1.0 + 2.75
    assert times.tail_s == 1.75
    assert times.idle_s == 0.25
    assert times.write_s == 0.375
    assert times.step_s == 9.5
    assert times.total_s == 2.0 + 3.0 + 1.0 + 8.0
    assert sum(getattr(times, f"{part}_s") for part in PARTS) == pytest.approx(times.total_s)


def test_tokens(report: Report) -> None:
    tokens = report.tokens
    assert (tokens.prompt, tokens.output, tokens.generated) == (330, 142, 160)
    assert (tokens.computed, tokens.computed_prompt, tokens.recomputed) == (400, 300, 50)
    assert tokens.cached == 100
    assert tokens.saved_fraction == 0.25
    assert tokens.prompt_lengths == [0, 0, 3, 6]
    assert tokens.output_lengths == [0, 8, 1]


def test_rates_leave_loading_out(report: Report) -> None:
    assert report.output_tokens_per_s == 160 / 11
    assert report.total_tokens_per_s == (160 + 300 + 100) / 11
    assert report.rows_per_s == 9 / 11
    assert report.mean_rows_per_step == 100 / 20


def test_the_ceiling(report: Report) -> None:
    roofline = report.roofline
    assert roofline is not None
    assert roofline.computed_flops == 400 * 100 + 5000 * 4 + 160 * 1000
    layers = 350 * 100 + 4500 * 4
    assert roofline.necessary_flops == layers + 160 * 1000
    assert roofline.least_s == layers / 10_000 + 160_000 / 50_000
    assert roofline.fraction == roofline.least_s / 9.5
    assert roofline.fraction_of_total == roofline.least_s / 14.0
    assert roofline.num_runs == 2


def test_runs_on_other_machines_do_not_count_for_the_ceiling(tmp_path: Path) -> None:
    start = msgspec.structs.replace(KILLED_RUN[0], machine=Machine(processor="other"))
    record = read_job(make_job(tmp_path, [start, *KILLED_RUN[1:], *WHOLE_RUN]))
    roofline = make_report(record, CEILING).roofline
    assert roofline is not None
    assert (roofline.num_runs, roofline.step_s, roofline.total_s) == (1, 7.0, 9.0)


def test_runs(report: Report) -> None:
    killed, whole = report.runs
    assert (killed.start_time, killed.outcome, killed.rows_succeeded) == (1000.0, None, 2)
    assert (whole.start_time, whole.outcome, whole.rows_failed) == (2000.0, "end", 1)
    assert (report.max_running, report.kv_used_max, report.peak_memory_bytes) == (4, 0.5, 500)


def test_the_job_over_time(report: Report) -> None:
    load, first, second, reload, last = report.intervals
    assert (load.start_s, load.end_s, load.seconds) == (0.0, 2.0, {"load": 2.0})
    assert (first.start_s, first.end_s, second.end_s) == (2.0, 3.0, 5.0)
    assert (reload.start_s, reload.end_s, reload.run) == (5.0, 6.0, 1)
    assert (last.start_s, last.end_s) == (6.0, 14.0)
    assert second.output_tokens_per_s == 20 / 2
    assert second.prompt_tokens_per_s == 90 / 2
    assert second.seconds["prefill"] == 0.75
    assert second.seconds["other"] == pytest.approx(2.0 - 0.75 - 1.0 - 0.125)
    assert (second.running, second.waiting, second.kv_used_fraction) == (4, 3, 0.5)
    assert report.tails == [(12.0, 14.0)]


def test_a_long_job_has_a_bounded_number_of_intervals(tmp_path: Path) -> None:
    samples = [Sample(t_s=float(t), generated_tokens=3 * t) for t in range(5000)]
    report = make_report(read_job(make_job(tmp_path, [RunStart(), *samples])))
    assert 0.8 * MAX_INTERVALS <= len(report.intervals) <= MAX_INTERVALS + 2
    assert report.intervals[-1].end_s == 4999
    assert all(i.output_tokens_per_s == pytest.approx(3) for i in report.intervals)


def test_nothing_has_run(tmp_path: Path) -> None:
    report = make_report(read_job(make_job(tmp_path, [])), CEILING)
    assert report.times.total_s == 0
    assert report.intervals == []
    assert report.roofline is None
    assert "nothing to explain" in report.findings[0]


def findings(tmp_path: Path, settings: dict[str, int] | None = None, **fields: float) -> str:
    values = {"steps": 10, "step_rows": 40, "rows_succeeded": 1} | fields
    end = Sample(t_s=10.0, event="end", **values)  # type: ignore[arg-type]
    before = Sample(
        t_s=9.0,
        prefill_s=end.prefill_s,
        decode_s=end.decode_s,
        num_running_seqs=4,
        num_waiting_seqs=end.num_waiting_seqs,
        kv_used_fraction=end.kv_used_fraction,
    )
    start = RunStart(settings=settings or {})
    return " ".join(make_report(read_job(make_job(tmp_path, [start, before, end]))).findings)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prefill_s": 9.0, "step_s": 9.0}, "Prefill, computing prompts: 90%"),
        ({"idle_s": 8.0}, "The model waited for input"),
        ({"write_s": 8.0}, "look at the disk"),
        ({"compile_s": 8.0}, "Compiling kernels: 80%"),
        ({"decode_s": 9.0, "step_s": 9.0, "tail_decode_s": 8.0}, "The tail: 80%"),
        ({"decode_s": 9.0, "step_s": 9.0}, "too few rows left"),
        (
            {"decode_s": 9.0, "step_s": 9.0, "num_waiting_seqs": 5, "kv_used_fraction": 0.95},
            "--kv-cache-memory",
        ),
        ({"decode_s": 9.0, "step_s": 9.0, "num_waiting_seqs": 5}, "--max-num-seqs"),
        (
            {"decode_s": 9.0, "step_s": 9.0, "computed_tokens": 100, "recomputed_tokens": 30},
            "30% of the computed tokens were computed again",
        ),
        ({}, "Everything else: 100%"),
    ],
)
def test_what_the_speed_was_limited_by(
    tmp_path: Path, fields: dict[str, float], words: str
) -> None:
    assert words in findings(tmp_path, {"max_num_seqs": 4}, **fields)

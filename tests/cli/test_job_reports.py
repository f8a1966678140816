"""status, report and --metrics-port around jobs whose model is faked."""

import json
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from prometheus_client.parser import text_string_to_metric_families

from batchwright.cli import main as cli
from batchwright.cli import run as run_command
from batchwright.cli.report import page_path_for
from batchwright.job import metrics
from batchwright.job.directory import JobDirectory
from batchwright.job.metrics import RunStart, Sample
from tests.job.fakes import ByteTokenizer, FakeEngine, FakeModel, chat_row, write_lines
from tests.report.made import KILLED_RUN, WHOLE_RUN, make_job, write_metrics

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process; returns (exit status, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["batchwright", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    monkeypatch.setenv("COLUMNS", "120")
    return run


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def use_engine(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> list[str]:
    """Let `run` have this engine; returns a list that gets the models that are loaded."""
    loaded: list[str] = []

    def load(model: str, settings: dict[str, Any]) -> FakeModel:
        loaded.append(model)
        tokenizer = ByteTokenizer()
        tokenizer.backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        return FakeModel(engine, tokenizer)

    monkeypatch.setattr(run_command, "load", load)
    monkeypatch.setattr("batchwright.weights.locate.locate_model", Path)
    return loaded


# status -------------------------------------------------------------------------------------------


def test_status_of_a_finished_job(call: Call, tmp_path: Path) -> None:
    make_job(tmp_path, [*KILLED_RUN, *WHOLE_RUN], num_succeeded=9)
    status, out, err = call("status", tmp_path / "results.jsonl")
    assert (status, err) == (0, "")
    assert out.startswith("results.jsonl: finished, run 2, since ")
    assert "9 of 10 done: 9 succeeded" in out


def test_status_of_a_job_with_failures(call: Call, tmp_path: Path) -> None:
    make_job(tmp_path, WHOLE_RUN, num_succeeded=9, errors=["b", "\x1b[31mred", "b"])
    status, out, _ = call("status", tmp_path / "results.jsonl.job")
    assert status == 1
    assert "errors  b: 2, \\x1b[31mred: 1" in out
    assert "tries the rows again" in out


def test_status_of_a_running_job(call: Call, tmp_path: Path) -> None:
    directory = make_job(tmp_path, [], num_succeeded=3)
    with JobDirectory(directory):
        assert call("status", tmp_path / "results.jsonl")[0] == 3
        pid = int((directory / "lock").read_text().removeprefix("pid "))
        samples = [
            Sample(t_s=float(t), time=1000.0 + t, generated_tokens=40 * t, rows_succeeded=2 * t)
            for t in range(30)
        ]
        samples[-1].rows_estimated, samples[-1].eta_s = 500, 4000.0
        samples[-1].rows_running, samples[-1].rows_waiting = 4, 60
        write_metrics(directory, [RunStart(pid=pid, time=1000.0), *samples])
        status, out, _ = call("status", tmp_path / "results.jsonl")
        assert status == 3
        assert f"results.jsonl: running (pid {pid}), since " in out
        assert "3 of about 500 done: 3 succeeded; 4 running, 60 waiting" in out
        assert "40 tokens/s, 2.00 rows/s" in out
        assert "these numbers are" in out  # 1970 is long ago
        found = json.loads(call("status", directory, "--json")[1])
    assert (found["state"], found["tokens_per_s"], found["rows_waiting"]) == ("running", 40.0, 60)
    assert found["eta_s"] == 0.0


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (Sample(t_s=1.0, event="end", stopped=True), "It was stopped."),
        (Sample(t_s=1.0), "It was killed or broke off."),
        (Sample(t_s=1.0, event="error"), "It was killed or broke off."),
    ],
)
def test_status_of_a_job_that_can_go_on(
    call: Call, tmp_path: Path, last: Sample, words: str
) -> None:
    make_job(tmp_path, [RunStart(), last])
    status, out, _ = call("status", tmp_path / "results.jsonl")
    assert status == 75
    assert words in out
    assert "The same `batchwright run` command goes on" in out


@pytest.mark.parametrize("command", ["status", "report"])
def test_no_job(call: Call, tmp_path: Path, command: str) -> None:
    status, _, err = call(command, tmp_path / "nothing.jsonl")
    assert status == 2
    assert err.startswith("batchwright: there is no job at")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_text(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    engine = FakeEngine(on_step=lambda _: seen.append(urllib.request.urlopen(urls[0]).read()))
    urls: list[str] = []
    use_engine(monkeypatch, engine)
    from batchwright.report.prometheus import MetricsPort

    def enter(port: MetricsPort) -> MetricsPort:
        urls.append(port.url)
        return port

    monkeypatch.setattr(MetricsPort, "__enter__", enter)
    name = tmp_path / os.fsdecode(b"o\xff\n.jsonl")
    source = write_lines(tmp_path / os.fsdecode(b"in\xff.jsonl"), [chat_row("a")])
    assert call("run", source, "-o", name, "--model", "m", "--metrics-port", 0)[0] == 0
    assert 'batch="o\ufffd\\n.jsonl"'.encode() in seen[0]
    assert call("status", name)[0] == 0
    assert json.loads(call("status", name, "--json")[1])["name"] == "o\ufffd\n.jsonl"
    assert json.loads(call("report", name, "--json")[1])["name"] == "o\ufffd\n.jsonl"
    assert call("report", name)[0] == 0
    assert "o\ufffd" in name.with_name(os.fsdecode(b"o\xff\n.report.html")).read_text("utf-8")


# report -------------------------------------------------------------------------------------------


def test_report_writes_a_page(call: Call, tmp_path: Path) -> None:
    make_job(tmp_path, [*KILLED_RUN, *WHOLE_RUN], num_succeeded=9)
    status, out, _ = call("report", tmp_path / "results.jsonl")
    page = tmp_path / "results.report.html"
    assert (status, out) == (0, f"Report: {page}\n")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert page.stat().st_mode & 0o777 == 0o600
    other = tmp_path / "other.html"
    assert call("report", tmp_path / "results.jsonl.job", "-o", other)[0] == 0
    assert other.exists()
    status, _, err = call("report", tmp_path / "results.jsonl", "-o", tmp_path / "no" / "x.html")
    assert status == 2
    assert "cannot write" in err


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_report_replaces_no_file_of_the_job(
    call: Call, tmp_path: Path, options: tuple[str, ...]
) -> None:
    directory = make_job(tmp_path, WHOLE_RUN, num_succeeded=9)
    with JobDirectory(directory) as job:
        job.note_error_file(str(tmp_path / "bad.jsonl"))
    kept = [tmp_path / "results.jsonl", tmp_path / "bad.jsonl", directory / "metrics.jsonl"]
    (tmp_path / "link.html").symlink_to(kept[0])
    for path in kept[:2]:
        path.write_text("rows")
    for path in (*kept, tmp_path / "link.html", directory / "report.html"):
        status, _, err = call("report", tmp_path / "results.jsonl", "-o", path, *options)
        assert status == 2
        assert "belongs to the job itself; name another file" in err
    assert [path.read_text() for path in kept[:2]] == ["rows", "rows"]
    assert not (directory / "report.html").exists()
    other = tmp_path / "other.html"
    for _ in range(2):  # an older report is replaced
        assert call("report", tmp_path / "results.jsonl", "-o", other, *options)[0] == 0


def test_report_from_within_the_directory(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_job(tmp_path, WHOLE_RUN, num_succeeded=9)
    monkeypatch.chdir(directory)
    assert call("status", ".")[1].startswith("results.jsonl: finished")
    page = tmp_path / "results.report.html"
    assert call("report", ".")[:2] == (0, f"Report: {page}\n")
    assert page.exists()


def test_report_as_json(call: Call, tmp_path: Path) -> None:
    make_job(tmp_path, [*KILLED_RUN, *WHOLE_RUN], num_succeeded=9)
    status, out, _ = call("report", tmp_path / "results.jsonl", "--json")
    assert status == 0
    assert json.loads(out)["times"]["total_s"] == 14.0
    assert not (tmp_path / "results.report.html").exists()


def test_a_missing_matplotlib_is_named(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(tmp_path, WHOLE_RUN)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = call("report", tmp_path / "results.jsonl")
    assert status == 2
    assert "pip install 'batchwright[report]'" in err
    assert call("report", tmp_path / "results.jsonl", "--json")[0] == 0


@pytest.mark.parametrize(
    ("output", "page"),
    [
        ("results.jsonl", "results.report.html"),
        ("results.csv.gz", "results.report.html"),
        ("results", "results.report.html"),
        ("a.b.jsonl", "a.b.report.html"),
    ],
)
def test_where_the_page_goes(output: str, page: str) -> None:
    assert page_path_for(Path("out") / f"{output}.job") == f"out/{page}"


def test_no_text_of_rows_leaves_the_results(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marker words in prompts, ids, templates' columns and failing rows, then a look everywhere."""
    rows = [
        chat_row("id-zebra-1", "prompt-zebra", max_tokens=3),
        chat_row("id-zebra-2", "prompt-zebra " * 40, n=2, user="user-zebra"),
        chat_row("id-zebra-3", "prompt-zebra", temperature="hot-zebra"),
        {"custom_id": "id-zebra-4", "zebra-field": 1, "prompt": "prompt-zebra"},
        {"id": "id-zebra-5", "prompt": "prompt-zebra", "stop": ["stop-zebra"]},
        b'{"zebra',
        chat_row("id-zebra-6", "prompt-zebra"),
    ]
    use_engine(monkeypatch, FakeEngine(refuse=["id-zebra-6"], break_rows=["id-zebra-5"]))
    source = write_lines(tmp_path / "in.jsonl", rows)
    output = tmp_path / "results.jsonl"
    assert call("run", source, "-o", output, "--model", "m")[0] == 1
    assert b"zebra" in output.read_bytes()
    job = tmp_path / "results.jsonl.job"
    assert call("report", output)[0] == 0
    told = [
        call("report", output, "--json")[1],
        *call("status", output)[1:],
        call("status", output, "--json")[1],
        (tmp_path / "results.report.html").read_text(encoding="utf-8"),
        *((job / name).read_text() for name in ("metrics.jsonl", "summary.json", "lock")),
    ]
    assert all(told[:2])
    for text in told:
        assert "zebra" not in text


# --metrics-port -----------------------------------------------------------------------------------


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Samples by name and labels, `batch` left out."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type != "untyped"
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("batch") == "results.jsonl"
            found[sample.name, *labels.values()] = sample.value
    return found


def test_prometheus_scrapes_a_running_job(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scraped: list[dict[tuple[str, ...], float]] = []
    urls: list[str] = []

    def on_step(number: int) -> None:
        if number in (1, 5):
            scraped.append(scrape(urls[0]))

    def start(self: Any, name: str, port: int) -> None:
        begin(self, name, port)
        urls.append(self.url)

    from batchwright.report.prometheus import MetricsPort

    begin = MetricsPort.__init__
    monkeypatch.setattr(MetricsPort, "__init__", start)
    monkeypatch.setattr(metrics, "INTERVAL_S", 0.0)
    use_engine(monkeypatch, FakeEngine(max_running=2, on_step=on_step))
    rows = [chat_row(str(i), max_tokens=2) for i in range(6)] + [b"{"]
    source = write_lines(tmp_path / "in.jsonl", rows)
    output = tmp_path / "results.jsonl"
    status, _, err = call("run", source, "-o", output, "--model", "m", "--metrics-port", 0)
    assert status == 1
    assert f"Metrics: {urls[0]}" in err
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", urls[0])
    first, later = scraped
    assert first["batchwright_rows_total", "succeeded"] == 0
    assert later["batchwright_rows_total", "succeeded"] == 4
    assert later["batchwright_rows_total", "failed"] == 1
    assert later["batchwright_row_errors_total", "invalid_json_line"] == 1
    assert later["batchwright_rows_in_engine", "waiting"] == 2
    assert later["batchwright_generated_tokens_total",] == 8
    assert later["batchwright_output_length_tokens_bucket", "3.0"] == 4
    assert later["batchwright_output_length_tokens_count",] == 4
    assert later["batchwright_expected_rows",] == 7
    assert later["batchwright_time_seconds_total", "idle"] >= 0
    with pytest.raises(OSError):
        urllib.request.urlopen(urls[0], timeout=5)


def test_a_port_that_is_taken_is_told_before_loading(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = use_engine(monkeypatch, FakeEngine())
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        output = tmp_path / "results.jsonl"
        status, _, err = call("run", source, "-o", output, "--model", "m", "--metrics-port", port)
    assert status == 2
    assert f"port {port} cannot be used for metrics" in err
    assert loaded == []
    assert not output.exists()


def test_a_missing_prometheus_client_is_named(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    output = tmp_path / "results.jsonl"
    status, _, err = call("run", source, "-o", output, "--model", "m", "--metrics-port", 0)
    assert status == 2
    assert "pip install 'batchwright[metrics]'" in err

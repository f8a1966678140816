"""The run command with a model that is faked: exit codes, messages, files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from rich.console import Console

from batchwright.cli import main as cli
from batchwright.cli import run as run_command
from batchwright.cli.numbers import parse_count
from batchwright.cli.progress import ProgressReport, duration
from batchwright.errors import BatchwrightError, OutputError, RequestError, ResourceError
from batchwright.job import output_files
from batchwright.job.directory import job_directory_for
from batchwright.job.events import Progressed, RowFailed
from batchwright.job.preflight import error_path_for
from batchwright.job.summary import JobSummary
from batchwright.weights.locate import locate_model
from tests.job.fakes import ByteTokenizer, FakeEngine, FakeModel, chat_row, read_lines, write_lines

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _wide_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


class Command:
    """Runs `batchwright run` in this process; `engine` and `settings` are those of the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd
        self.engine = FakeEngine()
        self.settings: dict[str, Any] | None = None
        self.identity: dict[str, Any] = {}
        monkeypatch.setattr(run_command, "load", self._load)
        monkeypatch.setattr("batchwright.weights.locate.locate_model", self._locate)

    @staticmethod
    def _locate(model: str) -> Path:
        return Path(model) if model == "m" else locate_model(model)

    def _load(self, model: str, settings: dict[str, Any]) -> FakeModel:
        self.settings = settings
        tokenizer = ByteTokenizer()
        tokenizer.backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        return FakeModel(self.engine, tokenizer, name=model, more_identity=self.identity)

    def __call__(self, *args: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["batchwright", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self._capfd.readouterr()
        return int(caught.value.code or 0), out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capfd)


def test_all_rows_succeed(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a"), chat_row("b")])
    status, out, err = command("run", source, "-o", tmp_path / "out.jsonl", "--model", "m")
    assert status == 0
    assert sorted(line["custom_id"] for line in read_lines(tmp_path / "out.jsonl")) == ["a", "b"]
    assert not (tmp_path / "out.errors.jsonl").exists()
    assert "succeeded" in out
    assert str(tmp_path / "out.jsonl") in out
    assert "Traceback" not in err


def test_a_bad_row_fails_alone_and_is_told(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a"), chat_row("b", temperature="hot")])
    status, out, err = command("run", "-i", source, "-o", tmp_path / "out.jsonl", "--model", "m")
    assert status == 1
    (failure,) = read_lines(tmp_path / "out.errors.jsonl")
    assert failure["custom_id"] == "b"
    assert "Failed: line 2 (b): temperature must be a number, not 'hot'" in err
    assert "invalid_request: 1" in out
    assert "out.errors.jsonl" in out


def test_settings_reach_the_model(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    status, _, _ = command(
        *("run", source, "-o", tmp_path / "out.jsonl", "--model", "m", "--max-model-len", "2K"),
        *("--max-num-seqs", "32", "--max-num-batched-tokens", "1k", "--kv-cache-memory", "1.5G"),
        *("--dtype", "float32", "--seed", "7", "--threads", "2", "--no-prefix-sharing"),
        *("--order", "groups", "--kv-tokens", "4K", "--quantize", "int8"),
    )
    assert status == 0
    assert command.settings == {
        "device": "auto",
        "dtype": "float32",
        "kv_cache_dtype": "auto",
        "quantize": "int8",
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 1000,
        "kv_cache_bytes": 3 * 2**29,
        "kv_tokens": 4096,
        "order": "groups",
        "num_threads": 2,
        "seed": 7,
        "prefix_sharing": False,
    }


def test_an_unknown_order_is_an_error_that_names_the_known_ones(
    command: Command, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    status, _, err = command(
        "run", source, "-o", tmp_path / "out.jsonl", "--model", "m", "--order", "best"
    )
    assert status == 2
    assert "order is 'best', must be one of auto, density, fcfs, groups" in err.replace("\n", " ")


def test_settings_not_given_are_left_to_the_model(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    command("run", source, "-o", tmp_path / "out.jsonl", "--model", "m")
    assert command.settings == {
        "device": "auto",
        "dtype": "auto",
        "kv_cache_dtype": "auto",
        "seed": 0,
        "prefix_sharing": True,
    }


def test_results_may_go_to_stdout(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a"), b"{"])
    status, out, err = command("run", source, "-o", "-", "--model", "m")
    assert status == 1
    (tmp_path / "seen.jsonl").write_text(out)
    lines = read_lines(tmp_path / "seen.jsonl")
    assert [line["custom_id"] for line in lines] == [None, "a"]
    assert "succeeded" in err


def test_errors_on_stdout_are_not_mixed_with_the_summary(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a"), b"{"])
    output = tmp_path / "out.jsonl"
    _, out, err = command("run", source, "-o", output, "--error-file", "-", "--model", "m")
    assert [json.loads(line)["custom_id"] for line in out.splitlines()] == [None]
    assert "succeeded" in err


Mess = Callable[[Path], list[object]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda t: [t / "no.jsonl", "-o", t / "out.jsonl"], "No such file"),
        (lambda t: [t, "-o", t / "out.jsonl"], "is a directory"),
        (lambda t: [t / "empty.jsonl", "-o", t / "out.jsonl"], "empty_file"),
        (lambda t: [t / "blank.jsonl", "-o", t / "out.jsonl"], "empty_file"),
        (lambda t: [t / "in.jsonl", "-o", t / "none" / "out.jsonl"], "mkdir -p"),
        (lambda t: [t / "in.jsonl", "-o", t], "is a directory"),
        (lambda t: [t / "in.jsonl", "-o", t / "old.jsonl"], "--force"),
        (lambda t: [t / "in.jsonl", "-o", t / "o", "--error-file", t / "old.jsonl"], "--force"),
        (lambda t: [t / "no.jsonl", "-o", t / "old.jsonl"], "--force"),
        (lambda t: [t / "in.jsonl", "-o", ""], "is empty"),
        (lambda t: [t / "in.jsonl", "-o", t / "in.jsonl", "--force"], "is the input"),
        (lambda t: [t / "in.jsonl", "-o", t / "o", "--error-file", t / "in.jsonl"], "is the input"),
        (lambda t: [t / "in.jsonl", "-o", t / "o", "--error-file", f"{t}/./o"], "same file"),
        (lambda t: [t / "in.jsonl", "-o", t / "out.jsonl", "--threads", 0], "--threads"),
        (lambda t: [t / "in.jsonl", "-o", t / "out.jsonl", "--max-num-seqs", "0"], "at least 1"),
        (lambda t: [t / "in.jsonl", "-o", t / "out.jsonl", "--dtype", "int3"], "bfloat16"),
        (lambda t: [t / "in.jsonl", "-o", t / "out.jsonl", "--quantize", "int3"], "int8"),
        (
            lambda t: [
                *(t / "in.jsonl", "-o", t / "out.jsonl"),
                *("--quantize", "int8", "--dtype", "bfloat16"),
            ],
            "leave dtype out",
        ),
        (
            lambda t: [t / "in.jsonl", "-o", t / "out.jsonl", "--max-num-batched-tokens", "9"],
            "below max_num_seqs",
        ),
        (lambda t: [t / "in.jsonl", "-i", t / "in.jsonl", "-o", t / "out.jsonl"], "once"),
        (lambda t: ["-o", t / "out.jsonl"], "once"),
        (lambda t: [t / "in.jsonl"], "--output"),
        (lambda t: [t / "in.jsonl", "-o", t / "out.jsonl", "--shard", "0/2"], "'--shard'"),
    ],
)
def test_what_cannot_work_is_told_before_loading(
    command: Command, tmp_path: Path, arguments: Mess, words: str
) -> None:
    write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    before = (tmp_path / "in.jsonl").read_bytes()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "old.jsonl").write_text("precious\n")
    status, _, err = command("run", *arguments(tmp_path), "--model", "m")
    assert status == 2
    assert words in err
    assert "Traceback" not in err
    assert command.settings is None
    assert not list(tmp_path.glob("*.job"))
    assert (tmp_path / "old.jsonl").read_text() == "precious\n"
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_failed_rows_that_are_kept_count_as_failed(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a"), chat_row("b", temperature="hot")])
    arguments = ("run", source, "-o", tmp_path / "out.jsonl", "--model", "m", "--keep-failed")
    assert [command(*arguments)[0] for _ in range(2)] == [1, 1]


def test_expired_rows_are_told_apart_from_failed_ones(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a"), chat_row("b", temperature="hot")])
    arguments = ("--model", "m", "--deadline", "0.000000001")
    status, out, _ = command("run", source, "-o", tmp_path / "out.jsonl", *arguments)
    assert status == 1
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert {"failed 1 invalid_request: 1", "expired 1 batch_expired: 1"} <= set(lines)


def test_a_closed_standard_output_does_not_promise_to_go_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(fd: int, data: bytes) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(output_files, "write_all", closed)
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    _, _, err = command("run", source, "-o", "-", "--model", "m")
    assert "cannot write standard output: Broken pipe; a job that writes there cannot" in err


def test_a_job_goes_on_whose_input_is_in_an_object_store(command: Command, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    arguments = ("run", f"file://{tmp_path}/in.jsonl", "-o", tmp_path / "out.jsonl", "--model", "m")
    assert [command(*arguments)[0] for _ in range(2)] == [0, 0]
    assert len(read_lines(tmp_path / "out.jsonl")) == 1


def test_results_may_go_to_an_object_store(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    results, errors = tmp_path / "store" / "out.jsonl", tmp_path / "store" / "out.errors.jsonl"
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a"), chat_row("b")])
    arguments = ("run", source, "-o", f"file://{results}", "--model", "m")
    command.engine = FakeEngine(refuse=["b"])
    assert command(*arguments)[0] == 1
    assert [len(read_lines(path)) for path in (results, errors)] == [1, 1]
    assert [path.suffix for path in tmp_path.glob("out.jsonl.*")] == [".job"]
    command.engine = FakeEngine()
    assert command(*arguments)[0] == 0
    assert len(read_lines(results)) == 2
    assert not errors.exists()
    other = job_directory_for(f"file://{tmp_path}/elsewhere/out.jsonl")
    assert not other.exists()
    shutil.rmtree(next(tmp_path.glob("out.jsonl.*")))
    status, _, err = command(*arguments)
    assert status == 2
    assert "--force" in err


def test_force_replaces_old_results(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    (tmp_path / "out.jsonl").write_text("old\n")
    (tmp_path / "out.errors.jsonl").write_text("old\n")
    status, _, _ = command("run", source, "-o", tmp_path / "out.jsonl", "--model", "m", "--force")
    assert status == 0
    assert len(read_lines(tmp_path / "out.jsonl")) == 1
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_a_missing_model_is_one_line(command: Command, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    status, _, err = command("run", source, "-o", tmp_path / "out.jsonl", "--model", "missing")
    assert status == 2
    assert err.splitlines()[-1].startswith("batchwright: missing: there is no such file")
    assert command.settings is None
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    status, _, err = command("run", source, "-o", tmp_path / "out.jsonl", "--model", "")
    assert status == 2 and "the model's name is empty" in err


def test_what_fails_before_the_job_runs_costs_no_finished_row(
    command: Command, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    arguments = ("run", source, "-o", tmp_path / "out.jsonl", "--model")
    command(*arguments, "m")
    assert command(*arguments, "missing", "--force")[0] == 2
    assert command("run", tmp_path / "no", *arguments[2:], "m", "--force")[0] == 2
    status, out, _ = command(*arguments, "m")
    assert status == 0 and "done before" in out


def test_another_setting_is_told_before_loading(command: Command, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"text": "a", "max_tokens": 1}])
    arguments = ("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--model", "m")
    command.identity = {"seed": 0, "max_model_len": 100, "dtype": "float32"}
    assert command(*arguments, "--template", "A {text}")[0] == 0
    for option in ("--seed=1", "--max-model-len=99", "--dtype=bfloat16", "--column=stop=text"):
        command.settings = None
        status, _, err = command(*arguments, "--template", "A {text}", option)
        assert status == 2 and "begun differently" in err
        assert command.settings is None
    assert command(*arguments, "--template", "A {text}", "--max-model-len=100")[0] == 0


def test_another_file_is_not_taken_for_the_jobs_error_file(
    command: Command, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a", temperature="hot")])
    (tmp_path / "mine").write_text("precious\n")
    arguments = ("run", source, "-o", tmp_path / "out.jsonl", "--model", "m", "--error-file")
    for name, expected in [("e1", 1), ("e1", 1), ("mine", 2), ("e2", 1), ("e1", 2), ("e2", 1)]:
        status, _, err = command(*arguments, tmp_path / name)
        assert status == expected
        assert ("is not this job's" in err) == (status == 2)
    assert (tmp_path / "mine").read_text() == "precious\n"


def test_ctrl_c_finishes_what_runs(command: Command, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    rows = [chat_row(str(i), max_tokens=3) for i in range(6)]
    source = write_lines(tmp_path / "in.jsonl", rows)

    def on_step(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    command.engine = FakeEngine(max_running=2, on_step=on_step)
    status, out, err = command("run", source, "-o", tmp_path / "out.jsonl", "--model", "m")
    assert status == 75
    assert len(read_lines(tmp_path / "out.jsonl")) == 2
    assert "2 running rows are finished first" in err
    assert "2 rows are done, 4 that were read are not" in out
    assert "Give the same command to go on" in out
    assert "Traceback" not in err
    command.engine = FakeEngine(max_running=2, on_step=on_step)
    _, _, err = command("run", source, "-o", "-", "--model", "m")
    assert "4 that were read are not" in err and "go on" not in err
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_loading(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_command, "load", interrupted)
    source = write_lines(tmp_path / "in.jsonl", [chat_row("a")])
    status, _, err = command("run", source, "-o", tmp_path / "out.jsonl", "--model", "m")
    assert status == 75
    assert "nothing was written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("error", [OutputError("the disk is full"), ResourceError("no memory")])
def test_a_job_that_breaks_off_says_so_and_can_go_on(
    command: Command, tmp_path: Path, error: BatchwrightError
) -> None:
    def on_step(number: int) -> None:
        if number == 3:
            raise error

    rows = [chat_row(str(i), max_tokens=2) for i in range(6)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    arguments = ("run", source, "-o", tmp_path / "out.jsonl", "--model", "m")
    command.engine = FakeEngine(max_running=2, on_step=on_step)
    status, _, err = command(*arguments)
    assert status == 75
    assert err.splitlines()[-1] == f"batchwright: {error}"
    command.engine = FakeEngine(max_running=2)
    status, _, _ = command(*arguments)
    assert status == 0
    lines = read_lines(tmp_path / "out.jsonl")
    assert sorted(line["custom_id"] for line in lines) == list("012345")


def test_help_is_quick_because_it_imports_little() -> None:
    code = (
        "import sys, batchwright.cli.main\n"
        "heavy = {'torch', 'numba', 'msgspec', 'tokenizers'} & sys.modules.keys()\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("4096", 4096), ("4k", 4000), ("4K", 4096), ("1.5G", 1610612736), ("1.005k", 1005)],
)
def test_human_numbers(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "k", "1.0001k5", "1e3", "0.5", "4KB", "1.00001k", "9" * 400, "9" * 18 + "T"],
)
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(Exception, match="whole number"):
        parse_count(text)


def test_error_files_lie_beside_the_results() -> None:
    assert error_path_for("out/results.jsonl") == "out/results.errors.jsonl"
    assert error_path_for("results") == "results.errors.jsonl"
    assert error_path_for("out.d/results.csv") == "out.d/results.errors.csv"
    assert error_path_for("results.csv.gz") == "results.errors.csv.gz"
    assert error_path_for("results.gz") == "results.errors.jsonl.gz"
    assert error_path_for("s3://bucket/results.jsonl") == "s3://bucket/results.errors.jsonl"
    assert error_path_for("-") == "-"


def live_summary() -> JobSummary:
    engine = SimpleNamespace(num_generated_tokens=1500)
    return JobSummary(
        engine=engine,
        num_rows_read=70,
        num_succeeded=12,
        num_failed=1,
        num_output_tokens=600,
        num_allowed_tokens=7000,
        num_allowed_tokens_done=1200,
        input_ended=True,
        run_s=10.0,
    )


def test_a_log_gets_a_line_now_and_then() -> None:
    now_s, screen = 0.0, StringIO()
    with ProgressReport(Console(file=screen), now=lambda: now_s) as report:
        for step in range(100):
            now_s = step * 0.1
            report.on_event(Progressed(live_summary()))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == "13/70 rows, 1,500 tokens, 13 s left, 1 failed"
    assert "\x1b" not in screen.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with ProgressReport(console) as report:
        report.on_event(Progressed(live_summary()))
        report.on_event(RowFailed(3, "x[red]y", RequestError("bad [bold] value")))
    assert "13/70 rows" in screen.getvalue()
    assert "Failed: line 3 (x[red]y): bad [bold] value" in screen.getvalue()


def test_many_failures_do_not_flood() -> None:
    screen = StringIO()
    with ProgressReport(Console(file=screen)) as report:
        for line in range(1000):
            report.on_event(RowFailed(line, None, RequestError("bad")))
    assert len(screen.getvalue().splitlines()) == 11


def test_a_row_cannot_steer_the_terminal() -> None:
    screen = StringIO()
    with ProgressReport(Console(file=screen)) as report:
        report.on_event(RowFailed(1, "a\x1b[2J", RequestError("has \x1b]0;x\x07")))
    assert screen.getvalue() == "Failed: line 1 (a\\x1b[2J): has \\x1b]0;x\\x07\n"


@pytest.mark.parametrize(("seconds", "text"), [(8.2, "8 s"), (125, "2:05 min"), (11040, "3:04 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_prompt_schemas(command: Command, tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "?", "prompt_cache": {"modules": ["m"]}, "temperature": 0}
    source = write_lines(tmp_path / "in.jsonl", [row])
    schema, output = tmp_path / "schema.json", tmp_path / "out.jsonl"
    arguments = ("run", source, "-o", output, "--model", "m", "--prompt-schema", schema)
    status, _, err = command(*arguments)
    assert status == 2 and f"{schema} cannot be read" in err.replace("\n", "")
    assert command.settings is None, "told before the model is loaded"
    schema.write_text('{"name": "s", "content": [{"module": "m", "content": "Text."}]}')
    status, _, err = command(*arguments)
    assert status == 0
    assert "schema s, 1 modules, 6 positions; lossy: a module does not see" in err
    (line,) = read_lines(output)
    assert line["response"]["body"]["usage"]["prompt_tokens"] == len("^Text.?")

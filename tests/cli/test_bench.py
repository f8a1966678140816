"""`batchwright bench`: the whole text and JSON with made-up engines, a real run, errors."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from batchwright.bench import compare as compare_module
from batchwright.bench.bounds import Rates
from batchwright.cli import main as cli
from batchwright.plan.cost import RateCurve
from tests.bench.fake_engine import fake_engine
from tests.job.fakes import write_lines

CURVE = RateCurve((1, 1000), (1e9, 1e12))
ROWS = [
    {"id": "a", "prompt": "one two three", "max_tokens": 4},
    {"id": "b", "prompt": "one two four", "max_tokens": 2},
    {"id": "c", "prompt": "nothing to generate", "max_tokens": 0},
    {"id": "d", "prompt": "what?", "max_tokens": -1},
]


class Command:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setattr(logging.getLogger("batchwright"), "handlers", [])
        monkeypatch.setattr(
            "batchwright.bench.rates.measure_rates", lambda *_, **__: Rates(CURVE, CURVE, CURVE)
        )
        monkeypatch.setenv("COLUMNS", "200")

    def __call__(self, *args: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["batchwright", "bench", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return int(caught.value.code or 0), out, err


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def _columns(line: str) -> list[str]:
    return [cell for cell in line.split("  ") if cell.strip()]


def test_text_and_json(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = fake_engine(tmp_path / "own")
    monkeypatch.setattr(compare_module, "OWN_COMMAND", (own,))
    slow = fake_engine(
        tmp_path / "slow", "answers[0][0] = 0; loaded(); finished(answers, seconds=3.0)"
    )
    missing = fake_engine(tmp_path / "missing", "sys.exit('No module named vllm')")
    source = write_lines(tmp_path / "in.jsonl", ROWS)
    arguments = ["--model", "smollm2", "--threads", 1, "-o", "out.json"]
    arguments += ["--against", "openvino", "--python", f"openvino={slow}"]
    arguments += ["--against", "vllm", "--python", f"vllm={missing}"]
    arguments += ["--peer-model", f"vllm={tmp_path}"]
    status, out, err = command(source, *arguments)
    assert status == 1  # one is missing
    assert "2 rows of the file generate nothing and are left out" in err
    assert "round 1/1 file vllm: ended with status 1: No module named vllm" in err
    lines = out.splitlines()
    assert lines[1] == "products reach 1,000 GFLOP/s in the layers, 1,000 at the output head"
    assert lines[3].startswith("file: 2 rows, ") and lines[3].endswith(", 6 generated")
    assert lines[5].startswith("engine ")
    assert [_columns(line)[0] for line in lines[6:8]] == ["batchwright", "openvino"]
    assert _columns(lines[7])[1].strip() == "3.00"
    assert _columns(lines[7])[3].strip() == "1.50"  # times ours
    assert lines[8] == "time: products 50%, head 25%, other 25%"
    assert lines[9] == "openvino: of 2 rows 1 have our first token, 1 our first 8, 1 all"
    assert lines[10] == "vllm: ended with status 1: No module named vllm"
    values = json.loads(Path("out.json").read_text())
    (workload,) = values["workloads"]
    ours, openvino, vllm = workload["engines"]
    assert workload["longest_output"] == 4
    assert ours["seconds_all"] == [2.0] and ours["of_bound"] == workload["bounds"]["plain_s"] / 2
    assert openvino["times_ours"] == 1.5 and openvino["version"] == "1.2"
    assert vllm["failure"] == "ended with status 1: No module named vllm"
    assert values["rates"]["layers"]["rows"] == [1, 1000]


@pytest.mark.cpu
def test_our_own_engine(command: Command, tmp_path: Path) -> None:
    """Parts of the time are found by their names inside the engine, and add up."""
    source = write_lines(tmp_path / "in.jsonl", ROWS)
    status, out, err = command(
        source, "--model", "smollm2", "--threads", 1, "-o", "out.json", "--order", "fcfs"
    )
    assert status == 0, err
    assert "time: products " in out
    (workload,) = json.loads(Path("out.json").read_text())["workloads"]
    (ours,) = workload["engines"]
    more = ours["more_all"][0]
    assert more["stats"]["num_steps"] == 4
    parts = more["parts_s"]
    assert all(parts[name] > 0 for name in parts), parts
    assert sum(parts.values()) == pytest.approx(ours["seconds"])
    assert parts["products"] > parts["scheduling"]
    assert ours["peak_bytes_all"][0] > 100e6
    startup = more["startup"]
    assert 0 < sum(startup.values()) < ours["startup_s_all"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "W1,W5"], "'W5' is none of W1, W2, W3, W4"),
        (["--scale", "0"], "0.0 is not above 0"),
        (["--scale", "nan"], "nan is not above 0"),
        (["--repeat", "0"], "should be greater than or equal to 1"),
        (["--against", "sglang"], "unknown engine 'sglang'"),
        (["--against", "vllm"], "vllm reads a Hugging Face directory"),
        (["--max-num-seqs", "4096", "--max-num-batched-tokens", "64"], "below max_num_seqs"),
        (["-o", "none/out.json"], "cannot write none/out.json"),
        (["none.jsonl"], "none.jsonl"),
        (["in.jsonl", "-i", "in.jsonl"], "give the input file once"),
        (["scores.jsonl"], "no row of the input generates text"),
    ],
)
def test_errors_are_one_message(
    command: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    write_lines(tmp_path / "scores.jsonl", [{"id": "a", "prompt": "one", "max_tokens": 0}])
    status, out, err = command("--model", "smollm2", *arguments)
    assert status == 2 and not out
    assert message in " ".join(err.split()), err


def test_rows_longer_than_the_context(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchwright.opened_model import open_model

    def short(model: str, settings: dict[str, object]) -> object:
        return open_model(model, {**settings, "max_model_len": 512})

    monkeypatch.setattr("batchwright.cli.plan.open_model", short)
    status, _, err = command("--model", "smollm2", "--workloads", "W1", "--scale", "0.01")
    assert status == 2
    assert "rows of W1 have 1096 tokens, the model's context is 512" in " ".join(err.split())

"""`batchwright sim`: table, JSON and page of synthetic workloads and of a file; what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from batchwright.cli import main as cli
from tests.cli.test_plan import HARDWARE
from tests.job.fakes import write_lines

SMALL = ["--shape", "Llama-3-8B", "--rows", "40", "--prompt-tokens", "30-60"]
SMALL += ["--output-tokens", "20~0.5", "--shared-prefix", "4x100"]


def sim(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["batchwright", "sim", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as exited:
        cli.main()
    captured = capsys.readouterr()
    return int(exited.value.code or 0), captured.out, captured.err


def test_a_table_of_all_orders(capsys, monkeypatch) -> None:
    status, out, _ = sim(capsys, monkeypatch, *SMALL)
    assert status == 0
    names = [line.split()[0] for line in out.splitlines()[6:]]
    assert names == ["fcfs", "density", "groups", "longest_first", "prefix_dfs", "auto"]
    assert "machine  H100" in out and "40 rows" in out


def test_json_has_the_numbers_and_the_course(capsys, monkeypatch) -> None:
    _, out, _ = sim(capsys, monkeypatch, *SMALL, "--order", "fcfs", "--order", "groups", "--json")
    found = json.loads(out)
    assert [run["order"] for run in found["orders"]] == ["fcfs", "groups"]
    assert found["rows"] == 40 and found["machine"] == "H100"
    run = found["orders"][0]
    assert run["prefill_tokens"] == run["unique_tokens"]
    assert len(run["course"]["kv_use"]) == len(run["course"]["compute_use"]) > 10


def test_the_page_stands_alone(capsys, monkeypatch, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["--workload", "mixed", "--rows", "40", "--shape", "Qwen2.5-7B", "--order", "fcfs"]
    status, _, err = sim(capsys, monkeypatch, *arguments, "-o", str(page))
    assert status == 0 and str(page) in err
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 3 and "Qwen2.5-7B" in text and "fcfs" in text
    assert not re.search(r"(src|href)=\"(?!#)", text), "it loads nothing"
    assert "#00" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL), "page's colours"


@pytest.mark.cpu
@pytest.mark.parametrize("device", ["L40S", "this", "this --cores 8"])
def test_a_file_on_a_device_and_on_this_machine(
    device: str, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("batchwright.exec.calibrate.calibrate", lambda *_, **__: HARDWARE)
    monkeypatch.setattr("batchwright.opened_model.available_memory_bytes", lambda: 10**10)
    rows = [{"id": f"r{i}", "prompt": f"{'word ' * 8}{i % 7}", "max_tokens": 8} for i in range(20)]
    write_lines(tmp_path / "in.jsonl", rows)
    source = str(tmp_path / "in.jsonl")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    arguments = ["--model", "smollm2", "--order", "fcfs", "--json", "--device", *device.split()]
    status, out, err = sim(capsys, monkeypatch, source, *arguments)
    assert status == 0, err
    found = json.loads(out)
    assert found["rows"] == 20
    made_up = {"this": "made-up processor", "this --cores 8": "made-up processor with 8 cores"}
    assert found["machine"] == made_up.get(device, device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "Llama-3-8B"], "give a file, or a synthetic workload"),
        (["in.jsonl", *SMALL], "give a file, or a synthetic workload"),
        (["in.jsonl"], "a file needs --model"),
        (["--workload", "chat"], "give the model"),
        (["--workload", "chat", "--output-tokens", "9"], "not both"),
        (["--prompt-tokens", "9"], "needs --prompt-tokens and --output-tokens"),
        ([*SMALL, "--device", "this"], "measured with --model"),
        ([*SMALL, "--cores", "8"], "--cores is for --device this"),
        ([*SMALL, "--memory-bandwidth", "9G"], "goes with --cores"),
        ([*SMALL, "--device", "TPU"], "must be one of A100-80G"),
        ([*SMALL, "--shape", "GPT-9"], "must be one of Llama-3-8B"),
        ([*SMALL, "--order", "best"], "best"),
        ([*SMALL, "--kv-tokens", "64"], "room for 64"),
        (
            ["--device", "this", "--model", "smollm2", *SMALL[2:], "--swap-space", "1G"],
            "data sheet",
        ),
        (["--workload", "chess", "--shape", "Llama-3-8B"], "chat, documents"),
        (["--shape", "Llama-3-70B", "--workload", "chat"], "use more devices"),
    ],
)
def test_what_cannot_be_simulated_is_one_message(
    arguments: list[str], message: str, capsys, monkeypatch
) -> None:
    status, out, err = sim(capsys, monkeypatch, *arguments)
    assert status == 2 and not out
    assert message in " ".join(err.split()), err
    assert "Traceback" not in err

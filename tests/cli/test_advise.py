"""`batchwright advise`: text, JSON and page; what is asked of it; what fails early.

The model is opened for real; how fast the machine is and how much memory is free are given.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from batchwright.cli import main as cli
from batchwright.plan.cost import Hardware, RateCurve
from tests.job.fakes import FakeEngine, FakeModel, write_lines

FLAT = RateCurve((1, 1000), (1e10, 1e11))
HARDWARE = Hardware(
    name="made-up processor",
    num_threads=1,
    layers=FLAT,
    head=FLAT,
    ceiling_flops_per_s=1e11,
    attention_flops_per_s=1e11,
    kv_bytes_per_s=1e10,
    memory_bytes_per_s=1e10,
    step_s=0.01,
)
# Short rows first, a long one last: starting that one first shortens the end.
ROWS: list[dict[str, Any]] = [
    {"id": f"r{i}", "prompt": f"Row {i}", "max_tokens": 8, "ignore_eos": True} for i in range(30)
]
ROWS += [{"id": "long", "prompt": "Tell", "max_tokens": 60, "ignore_eos": True}]
FIXED = ["--max-num-seqs", "4", "--threads", "1"]


class Command:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setattr(logging.getLogger("batchwright"), "handlers", [])
        monkeypatch.setattr("batchwright.exec.calibrate.calibrate", lambda *_, **__: HARDWARE)
        monkeypatch.setattr("batchwright.opened_model.available_memory_bytes", lambda: 10**10)

    def __call__(self, *args: object) -> tuple[int, str, str]:
        words = ["batchwright", "advise", "in.jsonl", "--model", "smollm2", *map(str, args)]
        self._monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return int(caught.value.code or 0), out, err

    def json(self, *args: object) -> dict[str, Any]:
        status, out, err = self("--json", *args)
        assert status in (0, 1), err
        found: dict[str, Any] = json.loads(out)
        return found


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("in.jsonl"), ROWS)
    return Command(monkeypatch, capsys)


def test_text_and_page(command: Command) -> None:
    status, out, _ = command(*FIXED, "--confirm-seconds", 0)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "Advice on in.jsonl for smollm2, made-up processor"
    assert lines[2].startswith("set       --order ")
    assert "--max-num-seqs" not in lines[2]  # it was given, so it is kept
    assert "not confirmed in a real run: --confirm-seconds is 0" in out
    assert "requests per second" not in out
    assert lines[-1] == "Page: in.advice.html"
    page = Path("in.advice.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert lines[2].removeprefix("set       ") in page
    assert "Tell" not in page and "http" not in page.replace("http-equiv", "")


def test_json_is_the_argmax_and_the_same_each_time(command: Command) -> None:
    found = command.json("--confirm-seconds", 0, *FIXED)
    assert found == command.json("--confirm-seconds", 0, *FIXED)
    assert not Path("in.advice.html").exists()
    own, pick, trials = found["own"], found["predicted"], found["trials"]
    assert trials[0] == own
    assert own["knobs"] == {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "order": "auto",
        "num_threads": 1,
        "block_size": 32,
    }
    assert pick["seconds"] == min(trial["seconds"] for trial in trials)
    assert pick["seconds"] < 0.95 * own["seconds"]
    assert pick["knobs"] == found["settings"]
    assert found["options"] == f"--order {pick['knobs']['order']}"
    assert {trial["knobs"]["max_num_seqs"] for trial in trials} == {4}
    assert [point["batch_size"] for point in found["profile"]] == [1, 2, 4, 8, 16, 32]
    assert found["measured"] is None and found["queue"] is None and found["devices"] is None
    memory = found["memory"]
    assert memory["kv_tokens"] >= memory["best"]["kv_tokens"]
    assert memory["kv_bytes"] == memory["kv_tokens"] * 46080  # 30 layers, 2 x 3 heads of 64, fp32
    assert 1 <= memory["gain_serial"] <= memory["gain_overlapped"] <= memory["replicas"]


def test_all_settings_given_leave_nothing_to_search(command: Command) -> None:
    all_given = ["--order", "fcfs", "--max-num-batched-tokens", 64, "--block-size", 64]
    found = command.json(*FIXED, *all_given)
    assert found["own"]["knobs"]["block_size"] == 64
    assert len(found["trials"]) == 1
    assert found["options"] == ""
    assert "none is predicted to be" in found["reasons"][0]


def test_what_other_block_sizes_cost(command: Command) -> None:
    """A beginning of some 50 tokens is shared in blocks of 32, and not in larger ones."""
    beginning = " ".join(f"word{i}" for i in range(16))
    write_lines(
        Path("in.jsonl"),
        [
            {"id": f"r{i}", "prompt": f"{beginning} {i}", "max_tokens": 2, "ignore_eos": True}
            for i in range(20)
        ],
    )
    found = command.json("--confirm-seconds", 0, *FIXED)
    assert found["predicted"]["knobs"]["block_size"] == 32
    told = next(reason for reason in found["reasons"] if "--block-size" in reason)
    assert re.fullmatch(r"Blocks of other sizes, --block-size 64: \S+% more, 128: .*", told)
    larger = command.json("--confirm-seconds", 0, *FIXED, "--block-size", 64)
    assert larger["predicted"]["seconds"] > found["predicted"]["seconds"]
    text = command("--confirm-seconds", 0, *FIXED)[1]
    assert text.count("--block-size") == 1, "only there, not in the list of settings"


def test_keys_and_values_in_bfloat16_take_half_the_memory(command: Command) -> None:
    whole = command.json("--confirm-seconds", 0, *FIXED, "--order", "fcfs")
    half = command.json(
        "--confirm-seconds", 0, *FIXED, "--order", "fcfs", "--kv-cache-dtype", "bfloat16"
    )
    assert half["memory"]["kv_tokens"] == whole["memory"]["kv_tokens"]
    assert half["memory"]["kv_bytes"] == whole["memory"]["kv_bytes"] / 2


def test_no_more_memory_is_advised_than_there_is(command: Command) -> None:
    found = command.json("--confirm-seconds", 0, *FIXED, "--kv-tokens", 96)
    assert found["memory"]["kv_tokens"] == 96


def test_a_server_starts_rows_as_they_come(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is that of the order a server has, not of the best one for a job."""
    from batchwright.job import advise_job

    orders: list[Any] = []
    simulate = advise_job.simulate_arrivals

    def noting(prompts: Any, num_output: Any, arrival_s: Any, engine: Any, cost: Any) -> Any:
        orders.append(engine.order.__name__)
        return simulate(prompts, num_output, arrival_s, engine, cost)

    monkeypatch.setattr(advise_job, "simulate_arrivals", noting)
    found = command.json(*FIXED, "--arrivals", 2, "--confirm-seconds", 0)
    assert found["settings"]["order"] not in ("auto", "fcfs")
    command.json(*FIXED, "--arrivals", 2, "--confirm-seconds", 0, "--order", "groups")
    assert orders == ["fcfs", "groups"]


@pytest.mark.parametrize("faster", [True, False])
def test_real_runs_decide(command: Command, monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    """What is advised is what won; if nothing did, it says so."""
    import time

    def load(model: str, settings: dict[str, Any]) -> FakeModel:
        is_own = settings["order"] == "auto"
        wait_s = 2e-3 if is_own == faster else 2e-4
        return FakeModel(FakeEngine(on_step=lambda number: time.sleep(wait_s)))

    monkeypatch.setattr("batchwright.cli.run.load", load)
    found = command.json("--confirm-seconds", 2, *FIXED)
    measured = found["measured"]
    assert measured["rows"] <= 31
    assert 2 <= len(measured["rounds_s"]) <= 7
    assert measured["settings"][0] == found["own"]["knobs"]
    text = " ".join(found["reasons"])
    if faster:
        assert measured["winner"] > 0
        assert found["settings"] == measured["settings"][measured["winner"]]
        assert found["options"].startswith("--order ")
        assert "it beats the settings you have" in text
    else:
        assert measured["winner"] == 0
        assert found["options"] == ""
        assert "it does not beat the settings you have" in text
        assert "keep the settings you have" in text


def test_latency_limits_what_runs_at_once(command: Command) -> None:
    free = command.json("--threads", 1, "--confirm-seconds", 0)
    slo_s = free["profile"][2]["token_s"]  # of 4 at once
    found = command.json("--threads", 1, "--latency-slo", f"{slo_s * 1.001:.6f}s")
    assert found["memory"]["best"]["batch_size"] <= 4
    assert found["settings"]["max_num_seqs"] <= 4
    assert found["predicted"]["token_s"] <= slo_s * 1.001
    assert found["predicted"]["seconds"] > free["predicted"]["seconds"]
    status, _, err = command("--threads", 1, "--latency-slo", "0.000001s")
    assert status == 2
    assert "out of reach" in err and "raise --latency-slo" in err


def test_a_load_of_requests(command: Command) -> None:
    found = command.json(*FIXED, "--arrivals", 2, "--confirm-seconds", 0)["queue"]
    assert found["arrivals_per_s"] == 2
    assert 0 < found["simulated_s"] <= found["elastic_s"] <= found["dynamic_s"]
    assert found["simulated_p95_s"] > 0  # may be below the mean: 1 row of 31 is long
    waits = [one["wait_s"] for one in found["limits"] if one["wait_s"] is not None]
    assert waits == sorted(waits)
    busy = command.json(*FIXED, "--arrivals", 5000, "--confirm-seconds", 0)["queue"]
    assert busy["limit"] is None and busy["elastic_s"] is None
    status, out, _ = command(*FIXED, "--arrivals", 5000, "--confirm-seconds", 0)
    assert status == 0
    assert "the queue grows" in out
    assert Path("in.advice.html").read_text(encoding="utf-8").count("<svg") == 3


def test_how_many_devices(command: Command) -> None:
    one = command.json(*FIXED, "--confirm-seconds", 0, "--deadline", "1h")
    assert one["devices"]["found"]["layout"] == {"replica_size": 1, "num_replicas": 1}
    own_s = one["predicted"]["seconds"]
    assert one["devices"]["found"]["seconds"] == own_s
    more = command.json(*FIXED, "--confirm-seconds", 0, "--deadline", f"{0.7 * own_s:.4f}s")
    layout = more["devices"]["found"]["layout"]
    assert layout["replica_size"] == 1 and layout["num_replicas"] > 1  # a machine is not divided
    assert more["devices"]["found"]["seconds"] <= 0.7 * own_s
    status, out, _ = command(*FIXED, "--confirm-seconds", 0, "--tokens-per-s", "1G")
    assert status == 0
    assert "is out of reach with made-up processor" in out


def test_other_hardware(command: Command) -> None:
    found = command.json("--device", "h100", "--shape", "llama-3-70b", "--deadline", "1h")
    assert found["hardware"] == "2 x H100"  # one does not hold the weights
    assert found["devices"]["found"]["layout"] == {"replica_size": 2, "num_replicas": 1}
    assert found["measured"] is None
    assert "other hardware" in " ".join(found["reasons"]) or found["options"] == ""


def test_an_engine_may_need_eight_devices(command: Command) -> None:
    """282 GB of fp32 weights: four L40S hold 173 GB, eight 346."""
    shape = ["--shape", "llama-3-70b"]
    found = command.json("--device", "L40S", *shape, "--dtype", "float32", "--order", "fcfs")
    assert found["hardware"] == "8 x L40S"


def test_an_engine_on_so_many_devices(command: Command) -> None:
    device = ["--device", "H100", "--shape", "llama-3-70b", "--order", "fcfs"]
    found = command.json(*device, "--tensor-parallel-size", 4, "--deadline", "1h")
    assert found["hardware"] == "4 x H100"
    assert found["devices"]["found"]["layout"] == {"replica_size": 4, "num_replicas": 1}
    assert {one["layout"]["replica_size"] for one in found["devices"]["tried"]} == {4}
    status, _, err = command(*device, "--tensor-parallel-size", 1)
    assert status == 2
    assert "weights" in err


def test_rows_that_name_modules(command: Command) -> None:
    schema = {"name": "s", "content": [{"module": "m", "content": "Goods go back.\n"}]}
    Path("s.json").write_text(json.dumps(schema))
    row = {"id": "a", "prompt": "Why?", "max_tokens": 4, "prompt_cache": {"modules": ["m"]}}
    write_lines(Path("in.jsonl"), [row])
    status, _, err = command(*FIXED, "--confirm-seconds", 0)
    assert status == 2 and "no row of the input can run" in err
    found = command.json(*FIXED, "--confirm-seconds", 0, "--prompt-schema", "s.json")
    assert found["bad_rows"] == 0
    assert found["tokens"] > 6


@pytest.mark.parametrize(
    "args, message",
    [
        (["--device", "abacus"], "device is 'abacus', must be one of A100-80G"),
        (["--device", "H100", "--shape", "x"], "model shape is 'x', must be one of"),
        (["--shape", "llama-3-8b"], "--shape is for --device"),
        (["--device", "L40S", "--quantize", "int8"], "leave it out with --device"),
        (["--device", "L40S", "--kv-cache-dtype", "bfloat16"], "leave it out with --device"),
        (["--device", "L40S", "--tensor-parallel-size", "3"], "must be one of 1, 2, 4, 8"),
        (["--tensor-parallel-size", "2"], "advice on this machine is for one process"),
        (["--block-size", "48"], "must be a multiple of 32"),
        (["--lengths", "x"], "length_predictor is 'x', must be one of buckets"),
        (["--arrivals", "0"], "--arrivals is 0.0, must be above 0"),
        (["--arrivals", "nan"], "must be above 0"),
        (["--max-num-seqs", "0"], "max-num-seqs"),
        (["-o", "no/such/folder.html", "--confirm-seconds", "0"], "there is no directory no/such"),
    ],
)
def test_clear_errors(command: Command, args: list[str], message: str) -> None:
    status, _, err = command(*args)
    assert status == 2
    assert message in " ".join(err.split())


def test_nothing_to_advise_on(command: Command) -> None:
    write_lines(Path("in.jsonl"), [{"id": "a", "prompt": "x", "max_tokens": -1}])
    status, _, err = command("--confirm-seconds", 0)
    assert status == 2
    assert "no row of the input can run" in err


def test_a_row_that_no_engine_holds(command: Command) -> None:
    """A GiB holds 3,276 tokens of Llama-3-70B in bf16."""
    write_lines(
        Path("in.jsonl"),
        [{"id": "a", "prompt": "word " * 7000, "max_tokens": 1000, "ignore_eos": True}],
    )
    status, _, err = command(
        "--device", "H100", "--shape", "llama-3-70b", "--kv-cache-memory", "1G"
    )
    assert status == 2
    assert "the longest row takes 8001 tokens of keys and values" in " ".join(err.split())

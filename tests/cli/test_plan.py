"""`batchwright plan` and `run --dry-run`: the whole text and JSON, resumed jobs, what fails early.

The model is opened for real; how fast the machine is and how much memory is free are given.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchwright.cli import main as cli
from batchwright.cli import plan as plan_command
from batchwright.job import plan_job
from batchwright.job.directory import JobDirectory, job_directory_for
from batchwright.job.feed import Feed
from batchwright.job.formats.read_input import read_input
from batchwright.job.journal import Journal, RowState
from batchwright.job.manifest import check_manifest, job_manifest
from batchwright.job.preflight import JobArguments
from batchwright.plan.cost import Hardware, RateCurve
from batchwright.plan.token_store import TokenStore
from tests.job.fakes import ByteTokenizer, chat_row, write_lines

ROOT = Path(__file__).parent.parent.parent
Output = tuple[int, str, str]

FLAT = RateCurve((1, 1000), (1e10, 1e11))
HARDWARE = Hardware(
    name="made-up processor",
    num_threads=2,
    layers=FLAT,
    head=FLAT,
    ceiling_flops_per_s=1e11,
    attention_flops_per_s=1e11,
    kv_bytes_per_s=1e10,
    memory_bytes_per_s=1e10,
    step_s=0.01,
)
PREFIX = "one two three four five six seven eight nine ten " * 8
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": f"{PREFIX}and red", "max_tokens": 40, "temperature": 0},
    {"id": "b", "prompt": f"{PREFIX}and blue", "max_tokens": 40, "temperature": 0},
    {"id": "c", "prompt": f"{PREFIX}and red", "max_tokens": 40, "temperature": 0},
    {"id": "d", "prompt": "Hello", "max_tokens": 100, "n": 2},
    {"id": "e", "prompt": "Hello", "max_tokens": 0},
    {"id": "f", "prompt": ["Hello", "Good bye"], "max_tokens": 10, "ignore_eos": True},
]
PRICES = """
currency = "EUR"
[own]
hour = 3.6
[service]
input = 1000
cached = 100
output = 10000
"""


class Command:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("COLUMNS", "120")
        # what a command that ran before in this process left would write to its closed stream
        monkeypatch.setattr(logging.getLogger("batchwright"), "handlers", [])
        monkeypatch.setattr("batchwright.exec.calibrate.calibrate", lambda *_, **__: HARDWARE)
        monkeypatch.setattr("batchwright.exec.load_time.load_s", lambda *_: 3.0)
        monkeypatch.setattr("batchwright.opened_model.available_memory_bytes", lambda: 10**10)
        monkeypatch.setattr("batchwright.job.disk_space.free_bytes", lambda path: None)

    def __call__(self, *args: object) -> Output:
        self._monkeypatch.setattr(sys, "argv", ["batchwright", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return int(caught.value.code or 0), out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_lines(Path("in.jsonl"), ROWS)


TEXT = """\
Plan of in.jsonl for smollm2

rows      6 read, 1 will fail
          invalid_request: 1
          the longest is line 1: up to 122 tokens
prompts   5 to compute, 1 identical to one of them
          251 tokens: 105 to compute, 64 shared with other rows, 82 in identical rows
outputs   203 tokens likely, 25 to 340
          likely: 50% of what rows allow on average (a guess: none is finished); high: all of it
memory    115.2 MB weights, up to 5.0 GB keys and values (108,480 tokens); 10.0 GB free
          256 rows of the likely length fit at once; 6 run at once
time      6 s likely, 4 s to 10 s; 3 s of it to load the model
          simulated on all rows; made-up processor, 2 threads
money     EUR                 low        likely          high
          own              0.0036        0.0060        0.0098
          service          0.4434        2.2234        3.5934
"""


@pytest.mark.parametrize("how", [["plan"], ["run", "-o", "-", "--dry-run"]], ids=["plan", "run"])
def test_text(command: Command, source: Path, how: list[str]) -> None:
    Path("prices.toml").write_text(PRICES)
    status, out, _ = command(
        *how, source, "--model", "smollm2", "--threads", 2, "--prices", "prices.toml"
    )
    assert status == 1  # a row will fail
    assert out == TEXT
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "prices.toml"]


def test_a_busy_machine(command: Command, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likely time is as long as it takes now, the high one half as long again."""
    seconds = []
    for busy in (1.0, 4.0):
        hardware = replace(HARDWARE, busy=busy)
        monkeypatch.setattr("batchwright.exec.calibrate.calibrate", lambda *_, h=hardware, **__: h)
        out = command("plan", source, "--model", "smollm2")[1]
        line = "others use the machine: work takes 4.0 times as long now"
        assert (line in out) == (busy == 4)
        seconds.append(json.loads(command("plan", source, "--model", "smollm2", "--json")[1]))
    quiet, busy = (one["seconds"]["run"] for one in seconds)
    assert busy["low"] == pytest.approx(quiet["low"])
    assert busy["likely"] == pytest.approx(4 * quiet["likely"])
    assert busy["high"] == pytest.approx(4 * quiet["high"])


@pytest.mark.parametrize("how", [["plan"], ["run", "-o", "-", "--dry-run"]], ids=["plan", "run"])
def test_json(command: Command, source: Path, how: list[str]) -> None:
    Path("prices.toml").write_text(PRICES)
    status, out, _ = command(
        *how, source, "--model", "smollm2", "--threads", 2, "--prices", "prices.toml", "--json"
    )
    assert status == 1
    found = json.loads(out)
    assert found.pop("plan_seconds") > 0
    seconds, money = found.pop("seconds"), found.pop("money")
    assert found == {
        "version": 1,
        "input": "in.jsonl",
        "model": "smollm2",
        "rows": {
            "read": 6,
            "done": 0,
            "bad": 1,
            "bad_codes": {"invalid_request": 1},
            "longest_line": 1,
            "longest_tokens": 122,
        },
        "prompts": {"generate": 6, "score": 0, "embed": 0, "folded": 1},
        "tokens": {
            "prompt": 251,
            "prompt_computed": 105,
            "prompt_shared": 64,  # two blocks of the first row, for the second
            "prompt_shared_in_job": 64,
            "prompt_folded": 82,  # the third row
            "prompt_forked": 1,  # "Hello" for the second sample
            "output": {"low": 25, "likely": 203, "high": 340},
            "computed": {"low": 123, "likely": 300, "high": 399},
        },
        "output_share": 0.5,
        "output_share_is_measured": False,
        "memory": {
            "weight_bytes": 115156224,
            "kv_bytes": 108480 * 46080,  # 30 layers, 2 x 3 heads of 64 elements, 4 bytes
            "kv_tokens": [108480],
            "host_bytes": 115156224 + 108480 * 46080 + plan_job.HOST_BYTES,
            "free_bytes": 10**10,
            "rows_at_once": 256,
        },
        "disk": {
            "written_bytes": {"low": 7450, "likely": 9230, "high": 10600},
            "free_bytes": None,
        },
        "simulated_rows": {"low": 5, "likely": 5, "high": 5},
        "machine": "made-up processor",
        "threads": 2,
        "busy": 1.0,
    }
    assert seconds["load"] == 3
    assert 0 < seconds["run"]["low"] < seconds["run"]["likely"] < seconds["run"]["high"]
    assert money["currency"] == "EUR"
    for end, amount in seconds["total"].items():
        assert amount == pytest.approx(3 + seconds["run"][end])
        assert money["entries"]["own"][end] == pytest.approx(amount / 1000)
    service = money["entries"]["service"]
    assert service["low"] == pytest.approx(187 * 1e-3 + 64 * 1e-4 + 25 * 1e-2)
    assert service["high"] == pytest.approx(187 * 1e-3 + 64 * 1e-4 + 340 * 1e-2)


def counted(command: Command, *args: object) -> dict[str, Any]:
    status, out, err = command("plan", "in.jsonl", "--model", "smollm2", "--json", *args)
    assert status in (0, 1), err
    found: dict[str, Any] = json.loads(out)
    return found


def test_rows_are_chosen_as_in_a_run(command: Command, source: Path) -> None:
    assert counted(command, "--limit", 2)["rows"]["read"] == 2
    assert counted(command, "--sample", 3)["rows"]["read"] == 3
    shards = [counted(command, "--shard", f"{part}/3")["rows"]["read"] for part in (1, 2, 3)]
    assert sum(shards) == len(ROWS)


def test_without_sharing_everything_is_computed(command: Command, source: Path) -> None:
    tokens = counted(command, "--no-prefix-sharing")["tokens"]
    assert tokens["prompt_shared"] == 0
    assert tokens["prompt_computed"] == 251 - 82


def test_rows_that_memory_never_holds_will_fail(command: Command, source: Path) -> None:
    rows = counted(command, "--kv-tokens", 64)["rows"]
    assert rows["bad_codes"] == {"kv_capacity_exceeded": 4, "invalid_request": 1}


def test_tokens_spilled_to_disk_are_counted_the_same(
    command: Command, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = counted(command)
    stores: list[TokenStore] = []

    def small() -> TokenStore:
        stores.append(TokenStore(spill_bytes=64))
        return stores[-1]

    monkeypatch.setattr("batchwright.plan.job_rows.TokenStore", small)
    after = counted(command)
    assert before.pop("plan_seconds")
    assert after.pop("plan_seconds")
    assert after == before
    assert len(stores) == 1
    assert stores[0].num_tokens == 251


def begin_job(*, seed: int = 0) -> None:
    """A job in out.jsonl, interrupted after its first row, which used a quarter of its tokens."""
    model = plan_command.open_model("smollm2", {"seed": seed})
    with JobDirectory(job_directory_for("out.jsonl")) as directory:
        settings = JobArguments(source="in.jsonl", output="out.jsonl").row_settings()
        check_manifest(directory.manifest_path, job_manifest(model.identity(), settings))
        journal = Journal(directory.path)
        feed = Feed(read_input("in.jsonl"), ByteTokenizer())
        chunk = feed.get(wait=True)
        assert chunk is not None
        row = chunk.rows[0].id
        feed.close()
        journal.append(row.key, row.line, RowState.SUCCEEDED, row.digest, b"{}\n")
        journal.commit()
        journal.close()
        lines = [
            b'{"event":"start"}',
            b'{"output_tokens":4,"allowed_tokens_done":16}',
            b'{"event":"start"}',
            b'{"output_tokens":1,"allowed_tokens_done":2}',
            b'{"output_tokens":6,"allowed_tokens_done":24}',
            b'{"output_tok',
        ]
        directory.metrics_path.write_bytes(b"\n".join(lines))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the index that SQLite makes anew for whoever reads a journal."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if not path.match("*.sqlite-*")}


def test_what_is_left_of_a_job(command: Command, source: Path, tmp_path: Path) -> None:
    begin_job()
    before = contents(tmp_path)
    found = counted(command, "-o", "out.jsonl")
    assert found["rows"]["read"] == 6
    assert found["rows"]["done"] == 1
    assert found["prompts"]["generate"] == 5
    assert found["output_share_is_measured"]
    assert found["output_share"] == pytest.approx(10 / 40)
    assert contents(tmp_path) == before
    status, out, _ = command("run", source, "-o", "out.jsonl", "--model", "smollm2", "--dry-run")
    assert status == 1
    assert "6 read, 1 done before, 1 will fail" in out
    assert "likely: 25% of what rows allow on average (as finished rows did)" in out
    assert contents(tmp_path) == before
    status, out, _ = command(
        "run", source, "-o", "out.jsonl", "--model", "smollm2", "--dry-run", "--force"
    )
    assert "6 read, 1 will fail" in out
    assert contents(tmp_path) == before


def test_a_job_that_was_begun_differently(command: Command, source: Path) -> None:
    begin_job(seed=1)
    status, out, err = command("plan", source, "-o", "out.jsonl", "--model", "smollm2")
    assert (status, out) == (2, "")
    assert "begun differently: seed was 1, is 0" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-num-seqs", "0"], "'0' is not a whole number of at least 1"),
        (["--max-num-seqs", "8", "--max-num-batched-tokens", "4"], "below max_num_seqs 8"),
        (["--order", "random"], "order is 'random'"),
        (["--lengths", "best"], "length_predictor is 'best', must be one of buckets, declared"),
        (["--limit", "2", "--sample", "2"], "limit and sample exclude each other"),
        (["--prices", "missing.toml"], "cannot read missing.toml"),
        (["--prices", "bad.toml"], "[own] has hours"),
        (["-o", "missing/out.jsonl"], "there is no directory missing"),
        (["-o", "in.jsonl"], "in.jsonl is the input"),
        (["-o", "other.jsonl"], "other.jsonl exists"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_configuration_fails_before_torch_is_imported(
    source: Path, args: list[str], message: str
) -> None:
    Path("bad.toml").write_text("[own]\nhours = 1")
    Path("other.jsonl").write_text("not ours")
    code = (
        "import atexit, os, sys; from batchwright.cli.main import main\n"
        "atexit.register(lambda: 'torch' in sys.modules and os._exit(99))\n"
        "main()"
    )
    model = [] if "--model" in args else ["--model", "smollm2"]
    command = [sys.executable, "-c", code, "plan", "in.jsonl", *model, *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-model-len", "9k"], "max_model_len is 9000, the model's context is 8192"),
        (["--kv-cache-memory", "11G"], "are free"),
        (["--kv-tokens", "32"], "kv_tokens is 32"),
    ],
)
def test_settings_that_the_model_refuses(
    command: Command, source: Path, args: list[str], message: str
) -> None:
    status, out, err = command("plan", source, "--model", "smollm2", *args)
    assert (status, out) == (2, "")
    assert message in err


def test_an_input_without_rows(command: Command, source: Path) -> None:
    source.write_text("")
    status, out, err = command("plan", source, "--model", "smollm2")
    assert (status, out) == (2, "")
    assert "in.jsonl" in err


def test_prices_and_json_go_with_a_dry_run(command: Command, source: Path) -> None:
    for option in (["--json"], ["--prices", "prices.toml"]):
        status, _, err = command("run", source, "-o", "-", "--model", "smollm2", *option)
        assert status == 2
        assert "go with --dry-run" in err


def test_sound_rows_give_status_0(command: Command, source: Path) -> None:
    write_lines(source, [chat_row("a", max_tokens=5)])
    status, out, err = command("plan", source, "--model", "smollm2")
    assert status == 0
    assert err == "rows name the model 'm'; smollm2 answers them\n"
    assert "rows      1 read\n" in out


def test_rows_that_import_modules_are_counted_as_whole_prompts(
    command: Command, source: Path, tmp_path: Path
) -> None:
    schema, text = tmp_path / "schema.json", "It rains. " * 9
    schema.write_text(json.dumps({"name": "s", "content": [{"module": "m", "content": text}]}))
    row = {"prompt": "Why?", "max_tokens": 4, "temperature": 0}
    write_lines(source, [{**row, "prompt_cache": {"modules": ["m"]}}])
    found = counted(command, "--prompt-schema", schema)
    write_lines(source, [{**row, "prompt": text + "Why?"}])
    plain = counted(command)["tokens"]["prompt"]
    assert abs(found["tokens"]["prompt"] - plain) <= 2  # tokenised apart
    write_lines(source, [{**row, "prompt_cache": {"modules": ["n"]}}])
    bad = counted(command, "--prompt-schema", schema)["rows"]["bad_codes"]
    assert bad == {"unknown_prompt_module": 1}

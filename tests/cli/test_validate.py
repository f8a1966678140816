"""The validate command: every bad row of a file, without a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchwright.cli import main as cli
from tests.job.fakes import chat_row, write_lines

ROOT = Path(__file__).parent.parent.parent
Output = tuple[int, str, str]


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*args: object) -> Output:
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["batchwright", "validate", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(caught.value.code or 0), out, err

    return run


def test_a_sound_file(validate, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"prompt": "y"}, {"id": "b", "prompt": "x"}])
    assert validate(path) == (0, "2 rows, 0 bad\n", "")


def test_every_bad_row_is_told(validate, tmp_path: Path) -> None:
    rows = [chat_row("a"), chat_row("a"), chat_row("b", temperature=-1), {"id": "\x1b[2J"}]
    path = write_lines(tmp_path / "in.jsonl", rows)
    with path.open("a") as file:
        file.write("{\n")
    status, out, _ = validate(path)
    assert status == 1
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "line 2 (a)",
        "line 3 (b)",
        r"line 4 (\x1b[2J)",
        "line 5",
        "5 rows, 4 bad",
        "  duplicate_custom_id",
        "  invalid_request",
        "  missing_required_parameter",
        "  invalid_json_line",
        "Warning",
    ]


def test_grammars_that_no_model_can_use(validate, tmp_path: Path) -> None:
    not_enforced = {"type": "object", "not": {"type": "string"}}
    forms = {
        "schema": {"json": not_enforced},
        "regex": {"regex": "("},
        "lark": {"grammar": 'start: "a" missing'},
        "never": {"json": False},
        "sound": {"json": {"type": "object", "properties": {"é": {"type": "integer"}}}},
        "sound-2": {"regex": r"[a-zäöü]{1,10}\d?"},
        "sound-3": {"choice": ["yes", "日本", "🙂"]},
        "sound-4": {"grammar": 'start: NUM "+" NUM\nNUM: /[0-9]{1,3}/'},
        "special": {"grammar": 'start: "a" <|im_end|>'},
    }
    rows = [{"id": id, "prompt": "x", "structured_outputs": form} for id, form in forms.items()]
    rows += [{**row, "id": f"{row['id']}-again"} for row in rows]
    status, out, _ = validate(write_lines(tmp_path / "in.jsonl", rows), "--json")
    *bad, counts = map(json.loads, out.splitlines())
    expected = ["schema", "regex", "lark", "never"]
    assert status == 1
    assert [row["custom_id"] for row in bad] == [*expected, *(f"{id}-again" for id in expected)]
    assert counts["codes"] == {"unsupported_grammar": 8}
    assert (bad[0]["param"], bad[0]["line"]) == ("structured_outputs", 1)
    assert "the json_schema cannot be used: Unimplemented keys" in bad[0]["message"]


def test_json(validate, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [chat_row("ü", n=0), chat_row("b", model="m")])
    status, out, _ = validate(path, "--json")
    bad, counts = map(json.loads, out.splitlines())
    assert status == 1
    assert (bad["line"], bad["custom_id"], bad["code"], bad["param"]) == (
        1, "ü", "invalid_request", "n"
    )  # fmt: skip
    assert counts == {
        "rows": 2,
        "bad": 1,
        "codes": {"invalid_request": 1},
        "endpoints": {"/v1/chat/completions": 2},
        "model": "m",
    }


def test_one_model_is_a_warning_and_two_are_errors(validate, tmp_path: Path) -> None:
    rows = [chat_row(str(n), model=name) for n, name in enumerate(["x", "x", "y", "x"])]
    path = write_lines(tmp_path / "in.jsonl", rows[:2])
    status, out, _ = validate(path)
    assert status == 0
    assert "Warning: rows name the model x" in out
    status, out, _ = validate(write_lines(path, rows))
    assert status == 1
    assert out.startswith("line 3 (2): model_mismatch")
    assert "4 rows, 1 bad" in out


def test_tables(validate, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("key,text\na,one\nb,\n")
    status, out, _ = validate(path, "--column", "id=key", "--template", "Say {text}")
    assert (status, out.splitlines()[0]) == (
        1, "line 3 (b): missing_required_parameter: column 'text' is empty, and the template has "
        "nothing else to fill",
    )  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [
        ("none.jsonl",),
        ("none.csv", "--template", "no column"),
        ("none.csv", "--column", "x"),
        ("none.csv", "--endpoint", "chat"),
    ],
)
def test_what_cannot_be_read_is_status_2(validate, args: tuple[str, ...]) -> None:
    status, out, err = validate(*args)
    assert (status, out) == (2, "")
    assert err.startswith("batchwright: ")


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("{\n" * 20_000)
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "batchwright.cli.main", "validate", str(path)]
    process = subprocess.Popen(command, stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(write_end)
    os.read(read_end, 100)
    os.close(read_end)
    assert process.communicate()[1] == b""
    assert process.returncode == 1


def test_no_model_code_is_loaded() -> None:
    code = (
        "import sys; import batchwright.cli.validate as v; "
        "import batchwright.job.formats.read_input; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

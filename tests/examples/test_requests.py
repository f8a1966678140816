"""The example job: a realistic mixed file in which exactly one row is wrong, and its check."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from batchwright.errors import RequestError
from batchwright.job.formats.read_input import read_input
from batchwright.job.rows import CHAT, COMPLETIONS, InputRow
from batchwright.job.validate import ParsedRow, parse_row

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def parsed_rows() -> tuple[list[ParsedRow], list[str]]:
    """(sound rows, ids of the others)"""
    sound, bad = [], []
    for row in read_input(str(EXAMPLES / "requests.jsonl")):
        assert isinstance(row, InputRow)
        try:
            sound.append(parse_row(row))
        except RequestError:
            bad.append(row.custom_id)
    return sound, bad


def test_exactly_one_row_is_bad() -> None:
    sound, bad = parsed_rows()
    assert bad == ["bad-row"]
    assert len(sound) >= 60


def test_the_mix_is_as_promised() -> None:
    sound, _ = parsed_rows()
    assert {row.endpoint for row in sound} == {CHAT, COMPLETIONS}
    systems = [r.messages[0]["content"] for r in sound if r.messages and len(r.messages) == 2]
    assert sorted(map(systems.count, set(systems)))[-3:] == [8, 10, 12]  # shared system prompts
    assert sum((row.prompt or "").startswith("Decide whether") for row in sound) == 16  # few-shot
    assert any(row.params.n > 1 for row in sound)
    assert any(row.params.temperature > 0 for row in sound)
    assert any(row.params.stop for row in sound)
    assert any(row.params.logprobs is not None for row in sound)
    assert sum(row.params.n * (row.params.max_tokens or 10**6) for row in sound) < 4000


@pytest.fixture
def check_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_demo", EXAMPLES / "check_demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_check_of_the_demo_accepts_what_is_right_and_nothing_else(
    check_demo: ModuleType, tmp_path: Path
) -> None:
    results, errors = tmp_path / "results.jsonl", tmp_path / "results.errors.jsonl"
    ids = check_demo.custom_ids(EXAMPLES / "requests.jsonl")
    good = [name for name in ids if name != "bad-row"]

    def found(succeeded: list[str], failed: list[str], status: int) -> list[str]:
        for path, names in ((results, succeeded), (errors, failed)):
            path.write_text("".join(json.dumps({"custom_id": name}) + "\n" for name in names))
        return check_demo.problems(results, status)

    assert found(good[::-1], ["bad-row"], 1) == []
    assert found(good, ["bad-row"], 0)
    assert found(good, [], 1)
    assert found(good[1:], ["bad-row"], 1)
    assert found([*good, good[0]], ["bad-row"], 1)
    assert found(good[1:], ["bad-row", good[0]], 1)
    results.unlink()
    assert check_demo.problems(results, 1)

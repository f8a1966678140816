"""Rows that import modules of a schema, through a whole job."""

import json
from pathlib import Path
from typing import Any

import pytest

from batchwright.errors import ConfigError, RequestError
from batchwright.job.file_job import run_file
from batchwright.job.rows import CHAT, COMPLETIONS, InputRow
from batchwright.job.validate import parse_row
from batchwright.request import Request
from tests.job.fakes import BOS, FakeEngine, FakeModel, chat_row, read_lines, write_lines

SCHEMA = {
    "name": "shop",
    "content": [
        "Rules.",
        {"module": "refunds", "content": "Within a month."},
        {
            "module": "order",
            "content": ["Order ", {"parameter": "number", "length": 6}, ", paid."],
        },
        {
            "union": [
                {"module": "en", "content": "English."},
                {"module": "de", "content": "Deutsch."},
            ]
        },
    ],
}


def write_schema(folder: Path, value: Any = SCHEMA, name: str = "shop.json") -> str:
    path = folder / name
    path.write_text(json.dumps(value))
    return str(path)


class KeepingEngine(FakeEngine):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Request] = []

    def add(self, request: Request) -> None:
        self.asked.append(request)
        super().add(request)


def row(id: str, prompt: Any = "Why?", **call: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "prompt_cache": call}
    return {"custom_id": id, "method": "POST", "url": COMPLETIONS, "body": body}


def test_rows_get_their_modules_and_bad_ones_fail_alone(tmp_path: Path) -> None:
    rows = [
        row("good", schema="shop", modules=["order", "de"], parameters={"number": "n7"}),
        row("no name", modules=["refunds"]),
        row("no module", modules=["returns"]),
        row("both", modules=["en", "de"]),
        row("long", modules=["order"], parameters={"number": "1234567"}),
        row("no schema", schema="bank", modules=[]),
        row("two texts", ["a", "b"], modules=["en"]),
        row("no text", "", modules=["en"]),
        {"custom_id": "plain", "body": {"prompt": "Why?"}, "url": COMPLETIONS},
        chat_row("chat"),
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    engine, output = KeepingEngine(), tmp_path / "out.jsonl"
    schema = write_schema(tmp_path)
    summary = run_file(FakeModel(engine), source, output, prompt_schema=[schema])
    assert (summary.num_succeeded, summary.num_failed) == (4, 6)
    by_id = {request.id: request for request in engine.asked}
    good, plain = by_id["good"], by_id["plain"]
    assert good.prompt_token_ids.tolist() == [BOS, *b"Rules.Order , paid.Deutsch.n7Why?"]
    assert good.layout is not None and good.layout.end == 1 + 6 + 15 + 19 + 8 + 4
    assert len(good.layout.segments) == 4  # the begin token, the text outside, two modules
    assert plain.layout is None and plain.prompt_token_ids.tolist() == [BOS, *b"Why?"]
    errors = {
        line["custom_id"]: line["error"]["message"]
        for line in read_lines(tmp_path / "out.errors.jsonl")
    }
    assert "names 'returns'; schema shop has: refunds, order, en, de" in errors["no module"]
    assert "names en and de, members of one union; name one of them" in errors["both"]
    assert "number has 7 tokens, the schema reserves 6; shorten it" in errors["long"]
    assert "is 'bank'; the job has shop; give its file with --prompt-schema" in errors["no schema"]
    assert "prompt is a list of 2; with prompt_cache give one text" in errors["two texts"]
    assert "prompt is empty; a prompt with modules needs a text after them" in errors["no text"]


def test_without_a_schema_the_row_is_told_how_to_give_one(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [row("a", modules=["en"])])
    run_file(FakeModel(FakeEngine()), source, tmp_path / "out.jsonl")
    (line,) = read_lines(tmp_path / "out.errors.jsonl")
    assert line["error"]["code"] == "unknown_prompt_schema"
    assert "--prompt-schema" in line["error"]["message"]


def test_a_bad_schema_ends_the_job_before_anything_is_written(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [row("a", modules=["en"])])
    bad = write_schema(tmp_path, {"name": "x"}, "bad.json")
    for path, words in ((bad, "lacks content"), (str(tmp_path / "none"), "cannot be read")):
        with pytest.raises(ConfigError, match=words):
            run_file(FakeModel(FakeEngine()), source, tmp_path / "out.jsonl", prompt_schema=[path])
    lacking = write_schema(tmp_path, {"name": "x", "content": "\0"}, "lacking.json")
    with pytest.raises(ConfigError, match="prompt schema x: the text has a character"):
        run_file(FakeModel(FakeEngine()), source, tmp_path / "out.jsonl", prompt_schema=[lacking])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_job_goes_on_only_with_the_same_schema(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [row("a", modules=["en"]), row("b", modules=["x"])])
    output, schema = tmp_path / "out.jsonl", write_schema(tmp_path)
    assert run_file(FakeModel(FakeEngine()), source, output, prompt_schema=[schema]).num_failed == 1
    again = run_file(FakeModel(FakeEngine()), source, output, prompt_schema=[schema])
    assert again.num_succeeded == 0
    changed = json.loads(json.dumps(SCHEMA).replace("Rules.", "Laws."))
    other = write_schema(tmp_path, changed, "other.json")
    for given in ([other], None):
        with pytest.raises(ConfigError, match="begun differently: prompt_schemas was"):
            run_file(FakeModel(FakeEngine()), source, output, prompt_schema=given)


@pytest.mark.parametrize(
    ("endpoint", "body", "words"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}, "it is for /v1/completions"),
        (COMPLETIONS, {"prompt": "x", "echo": True}, "excludes echo and prompt_logprobs"),
        (COMPLETIONS, {"prompt": "x", "prompt_logprobs": 0}, "excludes echo and prompt_logprobs"),
        (COMPLETIONS, {"prompt": "x", "add_special_tokens": True}, "has no meaning with"),
    ],
)
def test_what_does_not_go_together_is_told(endpoint: str, body: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse_row(InputRow(1, "a", endpoint, {**body, "prompt_cache": {"modules": []}}))

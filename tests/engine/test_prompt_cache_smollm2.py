"""A schema on the embedded model: its scaffold is the plain run, its modules are another."""

import json
from pathlib import Path

import pytest

from batchwright.job.file_job import run_file
from batchwright.llm import LLM

pytestmark = pytest.mark.cpu

PARTS = {
    "river": "The Danube rises in the Black Forest and flows through ten countries.\n",
    "town": "Ulm, Linz, Vienna and Budapest lie on it.\n",
    "sea": "It ends in the Black Sea.\n",
}
QUESTION = "Question: through which capital does the river flow?\nAnswer:"


def write(folder: Path, *, scaffold: bool) -> str:
    value = {
        "name": "danube",
        "content": [{"module": name, "content": text} for name, text in PARTS.items()],
        "scaffolds": [list(PARTS)] if scaffold else [],
    }
    path = folder / f"{scaffold}.json"
    path.write_text(json.dumps(value))
    return str(path)


def test_the_scaffold_is_the_plain_run_and_modules_are_computed_once(tmp_path):
    llm = LLM("smollm2", max_model_len=512)
    ids = [llm.tokenizer.encode(text) for text in (*PARTS.values(), QUESTION)]
    params = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
    rows = [{"id": "plain", "prompt": [i for part in ids for i in part], **params}]
    rows += [
        {"id": f"q{i}", "prompt": text, "prompt_cache": {"modules": list(PARTS)}, **params}
        for i, text in enumerate((QUESTION, " And what else?", " Why?"))
    ]
    answers, computed = {}, {}
    for scaffold in (True, False):
        before = llm.engine.stats.num_computed_tokens
        output = tmp_path / f"out-{scaffold}.jsonl"
        run_file(llm, rows, output, prompt_schema=[write(tmp_path, scaffold=scaffold)])
        computed[scaffold] = llm.engine.stats.num_computed_tokens - before
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        answers[scaffold] = {line["custom_id"]: line["response"]["body"] for line in lines}
        assert len(lines) == 4
    plain, joined = answers[True]["plain"]["choices"], answers[True]["q0"]["choices"]
    assert joined == plain, "the same text with the same log-probabilities"
    apart = answers[False]["q0"]["choices"][0]["logprobs"]
    assert apart != joined[0]["logprobs"], "without the scaffold it is another computation"
    num_modules = sum(len(part) for part in ids[:-1])
    usage = answers[False]["q1"]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == num_modules
    texts = sum(len(llm.tokenizer.encode(row["prompt"])) for row in rows[1:])
    outputs = 4 * 11
    # the plain row, the modules once for all three rows, their texts; what the first job encoded
    # is of no use to the second
    expected = num_modules * 2 + len(ids[-1]) + texts + outputs
    assert computed == {True: expected, False: expected}

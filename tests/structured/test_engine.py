"""Constrained rows in the engine, on a tiny model: the same tokens in every batch and order."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from batchwright.config import EngineConfig
from batchwright.engine import Engine
from batchwright.errors import RequestError
from batchwright.llm import build_engine
from batchwright.request import FinishReason, Request, Result, SamplingParams
from batchwright.structured import spec as specs
from batchwright.structured.compile import CompiledGrammar, GrammarCompiler
from batchwright.structured.grammar_text import guidance_grammar, open_matcher
from batchwright.structured.spec import GrammarSpec
from batchwright.structured.vocabulary import Vocabulary, guidance_tokenizer
from batchwright.weights.checkpoint import open_checkpoint
from tests.engine.harness import NoTokenizer
from tests.engine.test_parity import bytes_of_a_block
from tests.models.reference import make_checkpoint
from tests.sched.harness import start_what_fits_now

pytestmark = pytest.mark.cpu

END = 2
CHARS = {chr(code): 3 + code - 32 for code in range(32, 126)}  # ids 3 to 96
VOCABULARY = Vocabulary(
    [b"<u>", b"<s>", b"</s>", *(char.encode() for char in CHARS)], [0, 1, END], [END]
)


class CharTokenizer(NoTokenizer):
    """One token per printable character."""

    end_token_ids = (END,)
    special_token_ids = frozenset({0, 1, 2})
    decoder_kind = "window"

    def decode(self, ids, *, skip_special_tokens=True, keep=frozenset()):
        return "".join(VOCABULARY.tokens[i].decode() for i in ids if i > 2)


class PlainCompiler(GrammarCompiler):
    """Compiles for the characters, without a process."""

    def __init__(self) -> None:
        self._guidance = guidance_tokenizer(VOCABULARY)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        start = open_matcher(self._guidance, guidance_grammar(spec))
        return CompiledGrammar(start, self._guidance, VOCABULARY)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", path)
    return path


def new_engine(path, **settings: Any) -> Engine:
    config = EngineConfig(num_threads=1, **settings)
    engine, _ = build_engine(open_checkpoint(path), CharTokenizer(), config)
    engine.grammars = PlainCompiler()
    return engine


def run(engine: Engine, rows: list[Request]) -> dict[str, Result]:
    results = {result.request_id: result for result in engine.run(rows)}
    engine.check_integrity()
    return results


def row(id: str, prompt: list[int], grammar: GrammarSpec | None = None, **params: Any) -> Request:
    params = {"temperature": 1.0, "max_tokens": 24} | params
    return Request(
        id=id,
        prompt_token_ids=np.array(prompt, np.int32),
        params=SamplingParams(grammar=grammar, **params),
    )


PATTERN = r"[a-c]{2,6}(-[0-9]{2}){1,3}!"
FORMS = {
    "regex": specs.regex(PATTERN),
    "choice": specs.choice(["yes", "no", "not at all"]),
    "grammar": specs.grammar('start: "(" start ")" | "x"'),
}


def mixed_rows() -> list[Request]:
    """Constrained and free rows, with shared prefixes, n > 1, penalties and log-probabilities."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 97, 40).tolist()
    rows = []
    for index in range(12):
        prompt = shared[: 40 - index % 3] + rng.integers(3, 97, index * 3).tolist()
        form = [None, *FORMS.values()][index % 4]
        options: dict[str, Any] = {"temperature": float(index % 3), "n": 1 + 2 * (index % 4 == 1)}
        if index % 5 == 0:
            options |= {"logprobs": 2, "presence_penalty": 1.0, "logit_bias": {70: 3.0}, "top_k": 9}
        rows.append(row(f"r{index}", prompt, form, **options))
    return rows


def check_forms(rows: list[Request], results: dict[str, Result]) -> int:
    """Every output that was not cut has its form; returns how many there are."""
    num_whole = 0
    for request in rows:
        result, grammar = results[request.id], request.params.grammar
        assert result.error is None
        if grammar is None:
            continue
        compiled = PlainCompiler().compile(grammar)
        for output in result.outputs:
            is_whole = output.finish_reason is FinishReason.STOP
            assert is_whole or len(output.token_ids) == request.params.max_tokens
            assert compiled.accepts(output.text) == is_whole
            num_whole += is_whole
    return num_whole


def tokens(results: dict[str, Result]) -> dict[str, list[list[int]]]:
    return {id: [o.token_ids for o in result.outputs] for id, result in results.items()}


@pytest.fixture(scope="module")
def alone(path) -> dict[str, Result]:
    engine = new_engine(path, look_ahead=0)
    results = {}
    for request in mixed_rows():
        results |= run(engine, [request])
    assert check_forms(mixed_rows(), results) > 10
    return results


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 3, "max_num_batched_tokens": 16},
        {"prefix_sharing": False},
        {"blocks": 6, "max_num_batched_tokens": 48, "max_num_seqs": 6},
    ],
    ids=["all at once", "small batches", "no sharing", "preemption"],
)
def test_the_same_tokens_alone_and_in_any_mix(path, alone, settings, look_ahead) -> None:
    settings = dict(settings)
    preempts = "blocks" in settings
    if preempts:
        settings["kv_cache_bytes"] = settings.pop("blocks") * bytes_of_a_block(path)
    engine = new_engine(path, look_ahead=look_ahead, **settings)
    if preempts:
        start_what_fits_now(engine._scheduler)
    results = run(engine, mixed_rows())
    assert tokens(results) == tokens(alone)
    for id, result in results.items():
        assert [o.text for o in result.outputs] == [o.text for o in alone[id].outputs]
        assert [o.finish_reason for o in result.outputs] == [
            o.finish_reason for o in alone[id].outputs
        ]
    assert not preempts or engine.stats.num_preemptions > 0


def test_masks_change_only_their_rows(path, alone) -> None:
    free = [
        dataclasses.replace(r, params=dataclasses.replace(r.params, grammar=None))
        for r in mixed_rows()
    ]
    results = run(new_engine(path), free)
    for request in mixed_rows():
        same = tokens(results)[request.id] == tokens(alone)[request.id]
        assert same == (request.params.grammar is None)


def test_log_probabilities_are_those_of_the_raw_logits(path) -> None:
    results = run(new_engine(path), [
        row("a", [5, 6, 7], specs.regex("q+"), temperature=0.0, logprobs=3, max_tokens=1),
        row("b", [5, 6, 7], temperature=0.0, logprobs=3, max_tokens=1),
    ])  # fmt: skip
    (constrained,), (free,) = (results[id].outputs[0].logprobs for id in "ab")
    assert constrained.top == free.top
    assert constrained.rank > 3 and constrained.logprob < free.logprob


def test_a_whole_text_ends_without_an_end_token(path) -> None:
    request = row("a", [5], specs.regex("abc"), max_tokens=3)
    (output,) = run(new_engine(path), [request])["a"].outputs
    assert (output.text, output.finish_reason) == ("abc", FinishReason.STOP)
    assert len(output.token_ids) == 3 and output.stop_reason is None
    request = row("a", [5], specs.regex("abc"), max_tokens=2)
    (output,) = run(new_engine(path), [request])["a"].outputs
    assert (output.text, output.finish_reason) == ("ab", FinishReason.LENGTH)


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_stop_strings_end_only_whole_texts(path, look_ahead) -> None:
    engine = new_engine(path, look_ahead=look_ahead)
    grammar = specs.regex("[ab]{4,30}(;[ab]{3})?")
    rows = [row(f"r{i}", [5, 6, 7 + i], grammar, stop=("b",), max_tokens=40) for i in range(20)]
    num_stopped = num_passed_over = 0
    for result in run(engine, rows).values():
        (output,) = result.outputs
        assert output.finish_reason is FinishReason.STOP
        assert re.fullmatch("[ab]{4,30}(;[ab]{3})?", output.text)
        num_stopped += output.stop_reason == "b"
        num_passed_over += "b" in output.text
    assert num_stopped and num_passed_over


def test_stop_tokens_end_only_whole_texts(path) -> None:
    grammar, b = specs.regex("[ab]{4,30}"), CHARS["b"]
    rows = [row(f"r{i}", [5, 6, 7 + i], grammar, stop_token_ids=(b,)) for i in range(10)]
    for result in run(new_engine(path), rows).values():
        (output,) = result.outputs
        assert re.fullmatch("a{4,30}", output.text)
        assert output.finish_reason is FinishReason.LENGTH or output.stop_reason in (b, None)


def test_dead_ends_fail_alone(path) -> None:
    rows = [
        row("dead", [5], specs.regex("a[bc]d"), stop_token_ids=(CHARS["b"], CHARS["c"])),
        row("fine", [5], specs.regex("abd")),
    ]
    results = run(new_engine(path), rows)
    assert results["fine"].outputs[0].text == "abd"
    error = results["dead"].error
    assert error is not None and error.code == "grammar_dead_end"
    assert "stop_token_ids forbid" in error.message


def test_without_a_compiler(path) -> None:
    engine = new_engine(path)
    engine.grammars = None
    (result,) = engine.run([row("a", [5], specs.regex("a"))])
    assert isinstance(result.error, RequestError) and "not available" in result.error.message


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_matchers_follow_when_everything_starts_over(path, alone, look_ahead) -> None:
    engine = new_engine(path, look_ahead=look_ahead)
    rows, results = mixed_rows(), {}
    for request in rows:
        engine.add(request)
    for num_steps in range(200):
        if num_steps == 5:
            engine._is_torn = True  # as if a round had been interrupted
        results |= {result.request_id: result for result in engine.step()}
        if not engine.num_unfinished:
            break
    assert tokens(results) == tokens(alone)


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_matchers_follow_when_a_step_fails(path, alone, look_ahead) -> None:
    engine = new_engine(path, look_ahead=look_ahead)
    execute, num_steps = engine._executor.execute, 0

    def fails_once(step):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 6:
            raise MemoryError("a test")
        return execute(step)

    engine._executor.execute = fails_once
    results = run(engine, mixed_rows())
    assert num_steps > 6
    assert tokens(results) == tokens(alone)

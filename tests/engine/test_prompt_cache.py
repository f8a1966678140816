"""Prompts that import segments: against transformers with an explicit mask, and bit for bit."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from batchwright.errors import RequestError
from batchwright.prompt_layout import PromptLayout, Segment
from batchwright.request import Request, SamplingParams, Task
from tests.engine.harness import Run, request, run
from tests.engine.test_parity import TIE, bytes_of_a_block
from tests.models.reference import make_checkpoint
from tests.sched.harness import start_what_fits_now

pytestmark = pytest.mark.cpu

RNG = np.random.default_rng(5)


def draw(num: int) -> list[int]:
    return RNG.integers(3, 90, num).tolist()


A, B, C = (Segment.of(draw(n), ((p, n),)) for n, p in [(50, 0), (60, 50), (17, 110)])
GAPPED = Segment.of(draw(21), ((127, 9), (140, 12)))  # four places of a parameter in it
JOINED = Segment.of([*A.token_ids, *B.token_ids], ((0, 110),))
TEXTS = [draw(n) for n in (1, 5, 40, 13, 22, 8, 33, 9, 12)]


def importing(
    id: str,
    segments: tuple[Segment, ...],
    text: list[int],
    text_at: int,
    argument: tuple[int, list[int]] | None = None,
    max_tokens: int = 7,
    **params,
) -> Request:
    """A row that imports segments, fills a parameter perhaps, and ends in a text."""
    runs = [(text_at, len(text))]
    ids = [i for segment in segments for i in segment.token_ids.tolist()]
    if argument is not None:
        runs.insert(0, (argument[0], len(argument[1])))
        ids += argument[1]
    row = request(id, ids + text, max_tokens, **params)
    return dataclasses.replace(row, layout=PromptLayout(segments, tuple(runs)))


def job(**params) -> list[Request]:
    """Subsets, one with an argument, forks, a joined pair, and plain rows with the same tokens."""
    plain = [*A.token_ids.tolist(), *B.token_ids.tolist(), *TEXTS[3]]
    return [
        importing("ab", (A, B), TEXTS[0], 110, **params),
        importing("abc", (A, B, C), TEXTS[1], 127, **params),
        importing("c", (C,), TEXTS[2], 127, **params),
        importing("a", (A,), TEXTS[3], 50, **params),
        importing("joined", (JOINED,), TEXTS[3], 110, **params),
        request("plain", plain, 7, **params),
        importing("ab-again", (A, B), TEXTS[4], 110, **params),
        importing("gapped", (A, GAPPED), TEXTS[5], 152, (136, draw_argument()), **params),
        importing("none", (), TEXTS[6], 30, **params),
        importing("fork", (B, C), TEXTS[7], 127, n=3, **params),
        request("plain-b", [*B.token_ids.tolist(), *TEXTS[8]], 7, **params),
    ]


def draw_argument() -> list[int]:
    return [11, 12, 13]


def twin_logits(model, row: Request, output: list[int]) -> torch.Tensor:
    """[num_output, vocab] by transformers, one forward with a mask and positions written out."""
    ids = row.prompt_token_ids.tolist() + output
    num = len(ids)
    visible = torch.ones(num, num).tril().bool()
    positions = torch.arange(num)
    if row.layout is not None:
        start = 0
        for segment in row.layout.segments:
            visible[start : start + segment.num_tokens, :start] = False
            start += segment.num_tokens
        known = torch.from_numpy(row.layout.positions())
        positions = torch.cat((known, torch.arange(len(output)) + row.layout.end))
    mask = torch.zeros(num, num).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits = model(
            torch.tensor([ids]), attention_mask=mask[None, None], position_ids=positions[None]
        ).logits[0]
    return logits[len(row.prompt_token_ids) - 1 : -1]


def check_against_twin(model, rows: list[Request], outcome: Run) -> int:
    """Every output is the twin's greedy one; returns the number of near-ties."""
    ties = 0
    for row in rows:
        for output in outcome.results[row.id].outputs:
            logits = twin_logits(model, row, output.token_ids)
            best = logits.topk(2).values
            clear = (best[:, 0] - best[:, 1]).numpy() > TIE
            wrong = logits.argmax(-1).numpy() != np.array(output.token_ids)
            assert not (wrong & clear).any(), row.id
            ties += int((~clear).sum())
    return ties


@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3", "gpt2", "opt"])
def test_greedy_tokens_equal_the_twin_with_an_explicit_mask(name, tmp_path):
    model = make_checkpoint(name, tmp_path)
    rows = job()
    outcome = run(tmp_path, rows, max_num_batched_tokens=64, max_num_seqs=6)
    assert all(result.error is None for result in outcome.results.values())
    assert check_against_twin(model, rows, outcome) <= 2


def test_the_twin_sees_a_wrong_mask_and_a_wrong_position(tmp_path):
    """The comparison above can fail: with other positions or a plain mask tokens differ."""
    model = make_checkpoint("llama", tmp_path)
    rows = job()
    outcome = run(tmp_path, rows)
    row = rows[1]
    text_later = dataclasses.replace(row.layout, runs=((130, len(TEXTS[1])),))
    for layout in (None, text_later):
        other = dataclasses.replace(row, layout=layout)
        with pytest.raises(AssertionError):
            check_against_twin(model, [other], outcome)


SETTINGS = {
    "chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    "one step holds all": {"max_num_batched_tokens": 4096},
    "no sharing": {"prefix_sharing": False},
    "look-ahead": {"look_ahead": 1, "max_num_batched_tokens": 50, "max_num_seqs": 5},
    "two at a time": {"max_num_seqs": 2, "max_num_batched_tokens": 33},
    "two threads": {"num_threads": 2},
    "reference order": {"order": "prefix_dfs", "max_num_seqs": 4},
}


def test_bits_do_not_depend_on_the_batch(tmp_path):
    make_checkpoint("llama", tmp_path)
    rows = job()
    outcome = run(tmp_path, rows, max_num_batched_tokens=64, max_num_seqs=6)
    for settings in SETTINGS.values():
        again = run(tmp_path, rows, **settings)
        assert again.logits == outcome.logits, settings
        assert again.tokens() == outcome.tokens()
    assert run(tmp_path, rows[::-1]).logits == outcome.logits
    assert run(tmp_path, rows[2:4]).logits.items() <= outcome.logits.items()


@pytest.mark.parametrize("num_blocks", [16, 13, 11])
def test_short_memory_changes_no_bit(num_blocks, tmp_path):
    """Segments are evicted and encoded again, rows are preempted and import again."""
    make_checkpoint("llama", tmp_path)
    rows = [
        importing("c", (C,), TEXTS[2], 127, max_tokens=80),
        importing("c2", (C,), TEXTS[5], 127, max_tokens=90, n=2),
        importing("ab", (A, B), TEXTS[0], 110, max_tokens=40),
        importing("b", (B,), TEXTS[3], 110, max_tokens=90),
        request("plain", draw(70), 30),
        importing("ab2", (A, B), TEXTS[4], 110, max_tokens=20),
        importing("a", (A,), TEXTS[8], 50, max_tokens=90),
    ]
    outcome = run(tmp_path, rows)

    def prepare(engine):
        if num_blocks == 11:
            start_what_fits_now(engine._scheduler)

    tight = run(
        tmp_path,
        rows,
        prepare=prepare,
        kv_cache_bytes=num_blocks * bytes_of_a_block(tmp_path),
        max_num_batched_tokens=48,
        max_num_seqs=6,
    )
    assert all(result.error is None for result in tight.results.values())
    assert tight.logits == outcome.logits
    assert tight.tokens() == outcome.tokens()
    stats, segments = tight.engine.stats, tight.engine._scheduler.books.segments
    print(num_blocks, stats.num_preemptions, segments.num_encoded)
    if num_blocks == 11:
        assert stats.num_preemptions > 0 and segments.num_encoded > 3


def test_a_row_and_its_segments_must_fit(tmp_path):
    make_checkpoint("llama", tmp_path)
    rows = [importing("ab", (A, B), TEXTS[0], 110, max_tokens=40), request("plain", draw(70), 30)]
    blocks = 5 + 4 - 1  # 151 tokens take 5, the segments 2 + 2
    outcome = run(tmp_path, rows, kv_cache_bytes=blocks * bytes_of_a_block(tmp_path))
    assert outcome.results["ab"].error.code == "kv_capacity_exceeded"
    assert outcome.results["plain"].error is None


def test_one_segment_over_all_is_the_plain_run_bit_for_bit(tmp_path):
    """What a scaffold over all modules gives: the text stands where it stands without a layout."""
    make_checkpoint("llama", tmp_path)
    rows = job()
    joined, plain = rows[4], rows[5]
    assert joined.prompt_token_ids.tolist() == plain.prompt_token_ids.tolist()
    outcome = run(tmp_path, [dataclasses.replace(joined, id="same")])
    other = run(tmp_path, [dataclasses.replace(plain, id="same")])
    assert outcome.logits == other.logits
    assert outcome.tokens() == other.tokens()
    apart = run(tmp_path, [importing("same", (A, B), TEXTS[3], 110)])
    assert apart.logits != other.logits, "without the scaffold it is another computation"


def test_a_segment_is_encoded_once(tmp_path):
    make_checkpoint("llama", tmp_path)
    rows = [
        importing(f"r{i}", (A, B) if i % 2 else (B, C), draw(5), 127, max_tokens=4)
        for i in range(20)
    ]
    outcome = run(tmp_path, rows, max_num_batched_tokens=40, max_num_seqs=20)
    stats = outcome.engine.stats
    assert stats.num_computed_tokens == 50 + 60 + 17 + 20 * 5 + 20 * 3
    assert stats.num_cached_tokens >= 10 * 110 + 10 * 77
    assert outcome.engine._scheduler.books.segments.num_encoded == 3
    assert all(r.num_cached_tokens >= 77 for r in outcome.results.values())


def test_segments_never_serve_plain_prompts(tmp_path):
    """A plain prompt with a segment's tokens is computed as if there were no segment."""
    make_checkpoint("llama", tmp_path)
    plain = request("plain", [*JOINED.token_ids.tolist(), *TEXTS[3]], 7)
    alone = run(tmp_path, [plain])
    joined = importing("joined", (JOINED,), TEXTS[4], 110)
    beside = run(tmp_path, [joined, plain], max_num_seqs=2)
    assert alone.logits.items() <= beside.logits.items()
    assert beside.results["plain"].num_cached_tokens == 0
    assert beside.engine.stats.num_computed_tokens == 110 + (22 + 6) + (110 + 13 + 6)


def test_scores_equal_the_twin(tmp_path):
    model = make_checkpoint("llama", tmp_path)
    row = importing("ab", (A, B), TEXTS[2], 110)
    row = dataclasses.replace(row, task=Task.SCORE, score_start=len(row.prompt_token_ids) - 30)
    score = run(tmp_path, [row]).results["ab"].score
    ids = row.prompt_token_ids.tolist()
    context = dataclasses.replace(
        row,
        prompt_token_ids=row.prompt_token_ids[:-30],
        layout=PromptLayout(row.layout.segments, ((110, 10),)),
    )
    logits = twin_logits(model, context, ids[-30:])
    expected = torch.log_softmax(logits, -1)[torch.arange(30), torch.tensor(ids[-30:])]
    np.testing.assert_allclose(score.token_logprobs, expected.numpy(), atol=2e-3)


def test_what_it_cannot_do_is_told(tmp_path):
    make_checkpoint("llama", tmp_path)
    too_far = importing("far", (A,), TEXTS[1], 253)
    embed = dataclasses.replace(importing("e", (A,), TEXTS[1], 50), task=Task.EMBED)
    scored = importing("p", (A,), TEXTS[1], 50, prompt_logprobs=0)
    foreign = dataclasses.replace(importing("f", (A,), TEXTS[1], 50), namespace="other")
    results = run(tmp_path, [too_far, embed, scored, foreign]).results
    assert "position 257" in results["far"].error.message
    assert results["far"].error.code == "context_length_exceeded"
    for id in ("e", "p", "f"):
        assert isinstance(results[id].error, RequestError)
        assert results[id].error.param == "prompt_cache"
    at_the_end = run(tmp_path, [importing("end", (A,), TEXTS[1], 245, max_tokens=50)]).results
    assert len(at_the_end["end"].outputs[0].token_ids) == 256 - 250


def test_windows_are_refused(tmp_path):
    make_checkpoint("mistral", tmp_path)
    results = run(tmp_path, [importing("a", (A,), TEXTS[1], 50), request("p", draw(9), 4)]).results
    assert results["a"].error.code == "unsupported_parameter"
    assert results["p"].error is None


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_failed_step_encodes_again(look_ahead, tmp_path):
    make_checkpoint("llama", tmp_path)
    rows = job()
    outcome = run(tmp_path, rows)
    for failing in (1, 2, 3, 5, 8):

        def break_one(engine, failing=failing):
            execute, count = engine._executor.execute, [0]

            def fail_once(step):
                count[0] += 1
                if count[0] == failing:
                    raise ValueError("no luck")
                return execute(step)

            engine._executor.execute = fail_once

        settings = {"look_ahead": look_ahead, "max_num_batched_tokens": 64, "max_num_seqs": 6}
        again = run(tmp_path, rows, prepare=break_one, **settings)
        assert all(result.error is None for result in again.results.values())
        assert again.logits == outcome.logits


def test_cancelled_rows_leave_nothing_behind(tmp_path):
    make_checkpoint("llama", tmp_path)
    rows = job()

    def cancel_some(engine):
        step, count = engine.step, [0]

        def step_and_cancel():
            count[0] += 1
            for row in rows[count[0] :: 4] if count[0] < 4 else ():
                if row.id in engine._open:
                    engine.cancel(row.id)
            engine.check_integrity()
            return step()

        engine.step = step_and_cancel

    outcome = run(tmp_path, rows, prepare=cancel_some, max_num_batched_tokens=32, max_num_seqs=4)
    assert len(outcome.results) == len(rows)
    assert not outcome.engine._scheduler.num_unfinished


def test_params_are_those_of_the_row(tmp_path):
    """The encoder draws nothing, whatever the row's parameters."""
    make_checkpoint("llama", tmp_path)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=6, logprobs=2, n=2)
    row = dataclasses.replace(importing("ab", (A, B), TEXTS[4], 110), params=params)
    alone = run(tmp_path, [row])
    beside = run(tmp_path, [*job(), dataclasses.replace(row, id="other"), row][:-1])
    assert beside.tokens()["other"] == alone.tokens()["ab"]


@pytest.mark.parametrize("seed", range(6))
def test_random_jobs_in_little_memory_answer_as_in_much(seed, tmp_path):
    """Random segments, forks, budgets, cancels: the same bits, nothing lost or held twice."""
    make_checkpoint("llama", tmp_path)
    rng = np.random.default_rng(seed)

    def tokens(num: int) -> list[int]:
        return rng.integers(3, 90, num).tolist()

    starts = np.cumsum([0, *rng.integers(1, 45, 5)]).tolist()
    segments = [
        Segment.of(tokens(int(rng.integers(1, end - start + 1))), ((start, 0),))
        for start, end in pairwise(starts)
    ]
    segments = [
        dataclasses.replace(s, runs=((s.runs[0][0], s.num_tokens),)) for s in segments
    ]  # each somewhat shorter than its place
    rows = []
    for index in range(16):
        chosen = tuple(s for s in segments if rng.random() < 0.4)
        text, most = tokens(int(rng.integers(1, 20))), int(rng.integers(1, 30))
        n = int(rng.integers(1, 4)) if rng.random() < 0.3 else 1
        if rng.random() < 0.2:
            ids = [i for s in chosen for i in s.token_ids.tolist()] + text
            rows.append(request(f"r{index}", ids, most, n=n, seed=index))
        else:
            at = max([p + c for s in chosen for p, c in s.runs], default=0)
            rows.append(importing(f"r{index}", chosen, text, at, max_tokens=most, n=n, seed=index))
    expected = run(tmp_path, rows)
    assert all(result.error is None for result in expected.results.values())
    cancelled = {row.id for row in rows if rng.random() < 0.15}

    def cancel_and_check(engine):
        step = engine.step

        if seed >= 3:
            start_what_fits_now(engine._scheduler)

        def checked():
            for id in sorted(cancelled):
                if rng.random() < 0.1 and id in engine._open:
                    engine.cancel(id)
            engine.check_integrity()
            return step()

        engine.step = checked

    need = max(
        -(-(len(r.prompt_token_ids) + r.params.max_tokens) // 32)
        + sum(-(-s.num_tokens // 32) for s in (r.layout.segments if r.layout else ()))
        for r in rows
    )
    tight = run(
        tmp_path,
        rows,
        prepare=cancel_and_check,
        kv_cache_bytes=(need + seed % 3) * bytes_of_a_block(tmp_path),
        max_num_batched_tokens=int(rng.integers(8, 60)),
        max_num_seqs=8,
        look_ahead=seed % 2,
    )
    stats, segments_there = tight.engine.stats, tight.engine._scheduler.books.segments
    print(seed, need, stats.num_preemptions, segments_there.num_encoded, sorted(cancelled))
    assert set(tight.results) == {row.id for row in rows}
    assert tight.logits.items() <= expected.logits.items()
    for id, result in tight.results.items():
        if id not in cancelled:
            assert tight.tokens()[id] == expected.tokens()[id] and result.error is None, id

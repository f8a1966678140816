"""What rows ask for, through the whole engine: randomness, ends, log-probabilities, scores."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from batchwright.errors import ConfigError, RequestError
from batchwright.repetition import RepetitionDetection
from batchwright.request import FinishReason, Request, SamplingParams, Task
from tests.engine.harness import NoTokenizer, mixed_job, run
from tests.models.reference import make_checkpoint
from tests.sched.harness import start_what_fits_now

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", path)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("reference"))


def reference_logprobs(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def row(id: str, prompt: list[int], task: Task = Task.GENERATE, **fields) -> Request:
    request_fields = {k: fields.pop(k) for k in ("score_start", "pooling") if k in fields}
    return Request(
        id=id,
        prompt_token_ids=np.array(prompt, np.int32),
        params=SamplingParams(**{"max_tokens": 8, "temperature": 0.0} | fields),
        task=task,
        **request_fields,
    )


def sampled(job: list[Request], **params) -> list[Request]:
    return [
        dataclasses.replace(r, params=dataclasses.replace(r.params, temperature=1.3, **params))
        for r in job
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7, "max_num_seqs": 2},
        {"prefix_sharing": False, "look_ahead": 1},
        {
            "kv_cache_bytes": 9 * 3 * 2 * 2 * 8 * 32 * 4,
            "max_num_batched_tokens": 40,
            "max_num_seqs": 6,
        },
    ],
    ids=["small batches", "look-ahead", "preemption"],
)
def test_draws_do_not_depend_on_the_batch(path, settings):
    job = sampled(mixed_job(max_tokens=30))
    tokens = run(path, job).tokens()

    def prepare(engine):
        if "kv_cache_bytes" in settings:
            start_what_fits_now(engine._scheduler)

    again = run(path, job[::-1], prepare=prepare, **settings)
    assert again.tokens() == tokens
    if "kv_cache_bytes" in settings:
        assert again.engine.stats.num_preemptions > 0
    first, second, third = tokens["fork"]
    assert first != second != third != first, "samples of one row differ"
    assert tokens["r3"] != tokens["r6"], "rows with the same prompt have their own randomness"


def test_seeds(path):
    prompt = [5, 6, 7]
    job = [row("a", prompt, temperature=2.0, max_tokens=20)]
    assert run(path, job).tokens() == run(path, job).tokens()
    assert run(path, job).tokens() != run(path, job, seed=1).tokens()
    seeded = [row(id, prompt, temperature=2.0, max_tokens=20, seed=4) for id in "ab"]
    tokens = run(path, seeded).tokens()
    assert tokens["a"] == tokens["b"], "a row's own seed is all that counts"
    assert run(path, seeded, seed=1).tokens() == tokens


def test_stop_tokens_min_tokens_and_ignore_eos(path):
    plain = run(path, [row("a", [5, 6, 7], max_tokens=12)]).results["a"].outputs[0].token_ids
    stop = plain[4]
    at = plain.index(stop)
    stopped = run(path, [row("a", [5, 6, 7], max_tokens=12, stop_token_ids=(stop,))])
    output = stopped.results["a"].outputs[0]
    assert output.token_ids == plain[: at + 1]
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, stop)
    later = run(
        path, [row("a", [5, 6, 7], max_tokens=12, stop_token_ids=(stop,), min_tokens=at + 3)]
    )
    output = later.results["a"].outputs[0]
    assert stop not in output.token_ids[: at + 3]
    assert len(output.token_ids) >= at + 3


def test_logprobs_of_output_and_prompt(path, reference):
    prompt = list(range(3, 43))
    params = {"logprobs": 3, "prompt_logprobs": 2, "max_tokens": 6}
    job = [row("a", prompt, **params), row("b", prompt[:35], **params)]
    outcome = run(path, job, max_num_batched_tokens=11, max_num_seqs=2)
    for result in outcome.results.values():
        output = result.outputs[0]
        ids = result.prompt_token_ids + output.token_ids
        expected = reference_logprobs(reference, ids)
        entries = [*result.prompt_logprobs, *output.logprobs]
        assert entries[0] is None
        for position, entry in enumerate(entries[1:], start=1):
            before = expected[position - 1]
            assert entry.token_id == ids[position]
            assert entry.logprob == pytest.approx(before[ids[position]].item(), abs=2e-4)
            assert entry.rank == 1 + int((before > before[ids[position]]).sum())
            num_top = 2 if position < len(result.prompt_token_ids) else 3
            assert [id for id, _ in entry.top] == before.topk(num_top).indices.tolist()
        total = sum(entry.logprob for entry in output.logprobs)
        assert output.cumulative_logprob == pytest.approx(total)
    assert outcome.engine.stats.num_cached_tokens == 0, "logits of all prompt tokens are needed"


def test_scores_share_their_context(path, reference):
    context = list(range(3, 73))
    job = [
        row(str(i), [*context, i, i + 1, i + 2], task=Task.SCORE, score_start=70) for i in range(9)
    ]
    greedy = int(reference_logprobs(reference, context)[-1].argmax())
    job.append(row("greedy", [*context, greedy], task=Task.SCORE, score_start=70))
    outcome = run(path, job, max_num_batched_tokens=33, max_num_seqs=9)
    for request in job:
        ids, found = request.prompt_token_ids.tolist(), outcome.results[request.id].score
        expected = reference_logprobs(reference, ids)[range(69, len(ids) - 1), ids[70:]]
        np.testing.assert_allclose(found.token_logprobs, expected, atol=2e-4)
        assert found.logprob == pytest.approx(float(expected.sum()), abs=1e-3)
        assert found.is_greedy == (request.id == "greedy")
    assert outcome.engine.stats.num_cached_tokens == 9 * 64


def test_rolling_scores_in_chunks_have_the_same_bits(path):
    job = [row("a", list(range(3, 90)), task=Task.SCORE, score_start=1)]
    whole = run(path, job).results["a"].score.token_logprobs
    assert len(whole) == 86
    chunked = run(path, job, max_num_batched_tokens=5, max_num_seqs=1).results["a"].score
    assert (chunked.token_logprobs == whole).all()


def test_embeddings(path, reference):
    job = [
        row(f"{pooling}{length}", list(range(3, 3 + length)), task=Task.EMBED, pooling=pooling)
        for pooling in ("mean", "last")
        for length in (1, 37, 64, 80)
    ]
    outcome = run(path, job, max_num_batched_tokens=23, max_num_seqs=3)
    for request in job:
        ids = torch.tensor(request.prompt_token_ids[None].astype(np.int64))
        with torch.inference_mode():
            hidden = reference.model(ids).last_hidden_state[0]
        expected = hidden.mean(0) if request.pooling == "mean" else hidden[-1]
        found = outcome.results[request.id].embedding
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_request_that_cannot_run_fails_alone(path):
    bad = {
        "empty": row("empty", []),
        "too long": row("too long", [5] * 256),
        "unknown token": row("unknown token", [5, 97]),
        "negative token": row("negative token", [-1]),
        "bias": row("bias", [5], logit_bias={97: 1.0}),
        "nothing to score": row("nothing to score", [5, 6], task=Task.SCORE, score_start=2),
    }
    good = row("good", [5, 6])
    outcome = run(path, [*bad.values(), good])
    assert outcome.results["good"].error is None
    for id in bad:
        assert isinstance(outcome.results[id].error, RequestError), id
    assert "255" in outcome.results["too long"].error.message


def test_the_context_limits_the_output(path):
    outcome = run(path, [row("a", [5] * 250, max_tokens=100)])
    output = outcome.results["a"].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (6, FinishReason.LENGTH)


def test_duplicate_ids_are_refused_and_cancelled_rows_answer(path):
    def cancel_one(engine):
        engine.add(row("gone", [9, 8, 7], max_tokens=50, n=2))
        with pytest.raises(RequestError, match="already running"):
            engine.add(row("gone", [9]))
        engine.step()
        assert engine.waiting_ids() == []
        engine.cancel("gone")

    outcome = run(path, [row("a", [5, 6])], prepare=cancel_one)
    assert {o.finish_reason for o in outcome.results["gone"].outputs} == {FinishReason.CANCELLED}
    assert len(outcome.results["a"].outputs[0].token_ids) == 8


def test_logits_that_are_not_numbers_fail_their_row_only(path):
    def poison(engine):
        embedding = engine._executor._model.model.embed_tokens.weight
        embedding.data[13] = float("nan")

    outcome = run(path, [row("bad", [5, 13]), row("good", [5, 6])], prepare=poison)
    assert outcome.results["bad"].error.code == "invalid_logits"
    assert outcome.results["good"].error is None
    assert outcome.results["good"].outputs[0].token_ids == (
        run(path, [row("good", [5, 6])]).results["good"].outputs[0].token_ids
    )


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_logits_that_are_not_numbers_touch_no_neighbour(path, look_ahead):
    """Neither rows with the same prefix nor those that get the blocks with NaN in them."""
    shared, never = list(range(20, 60)), {"logit_bias": {13: -100.0}}
    job = [
        row("bad", [*shared, 13, 5, 6], max_tokens=5, **never),
        row("shares", [*shared, 5, 6, 7], max_tokens=40, **never),
        row("samples", [*shared, 5, 6], max_tokens=9, n=3, **never),
        row("other", [9, 8, 7], max_tokens=40, **never),
        row("below", [*shared, *range(60, 90), 13, 4], max_tokens=5, **never),
        *(row(f"later{i}", [i, 6, *shared[: 9 * i]], max_tokens=50, **never) for i in range(5)),
    ]
    expected = run(path, [r for r in job if r.id not in ("bad", "below")]).tokens()

    def poison(engine):
        engine._executor._model.model.embed_tokens.weight.data[13] = float("nan")

    settings = {"max_num_seqs": 4, "look_ahead": look_ahead, "max_num_batched_tokens": 50,
                "kv_cache_bytes": 11 * 3 * 2 * 2 * 8 * 32 * 4}  # fmt: skip
    outcome = run(path, job, prepare=poison, **settings)
    codes = {id: result.error.code for id, result in outcome.results.items() if result.error}
    assert codes == {"bad": "invalid_logits", "below": "invalid_logits"}
    assert {id: outcome.tokens()[id] for id in expected} == expected


def test_a_failing_step_changes_no_answer_and_an_interrupted_run_leaves_the_engine_usable(path):
    expected = run(path, mixed_job()).tokens()

    def fail(engine):
        execute = engine._executor.execute
        errors = {3: RuntimeError, 9: KeyboardInterrupt, 15: MemoryError, 21: ValueError}
        calls = iter(range(1000))

        def failing(step):
            result = execute(step)  # KV has been written, tokens were drawn
            if error := errors.get(next(calls)):
                raise error("out of luck")
            return result

        engine._executor.execute = failing
        with pytest.raises(KeyboardInterrupt, match="out of luck"):
            list(engine.run(mixed_job()))
        assert engine.num_unfinished == 0
        engine.check_integrity()

    for look_ahead in (0, 1):
        again = run(path, mixed_job(), prepare=fail, look_ahead=look_ahead,
                    max_num_batched_tokens=40, max_num_seqs=6)  # fmt: skip
        assert again.tokens() == expected


class SpelledTokenizer(NoTokenizer):
    """Token i is the letter of that number, so that stop strings can be looked for."""

    special_token_ids = frozenset()
    decoder_kind = "other"

    def decode(self, ids, **options):
        return "".join(chr(0x4E00 + i) for i in ids)

    def id_to_token(self, id):
        return chr(0x4E00 + id)


@pytest.mark.parametrize(
    "settings", [{}, {"look_ahead": 1, "max_num_batched_tokens": 9, "max_num_seqs": 2}]
)
def test_stop_strings_with_samples_and_logprobs(path, monkeypatch, settings):
    monkeypatch.setattr("tests.engine.harness.NoTokenizer", SpelledTokenizer)
    prompt = [5, 6, 7]
    plain = run(path, [row("a", prompt, max_tokens=9)]).results["a"].outputs[0]
    for at in (0, 3):
        stop = plain.text[at : at + 2]
        first = plain.text.index(stop)
        params = {"stop": (stop,), "n": 2, "logprobs": 1, "prompt_logprobs": 1, "max_tokens": 9}
        result = run(path, [row("a", prompt, **params), row("b", [9])], **settings).results["a"]
        for output in result.outputs:
            assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, stop)
            assert output.text == plain.text[:first]
            assert output.token_ids == plain.token_ids[: first + 2]
            assert len(output.logprobs) == first + 2
        assert len(result.prompt_logprobs) == 3
    single = row("a", prompt, stop=(plain.text[0],), prompt_logprobs=0)
    result = run(path, [single, row("b", prompt, prompt_logprobs=3)], **settings).results["a"]
    assert (result.outputs[0].text, len(result.outputs[0].token_ids)) == ("", 1)
    assert all(entry.top == () for entry in result.prompt_logprobs[1:]), "as many as it asked for"


def test_interleaved_runs_are_refused(path):
    def interleave(engine):
        first = engine.run([row("a", [5]), row("b", [6])])
        next(first)
        with pytest.raises(ConfigError, match="still running"):
            next(engine.run([row("c", [7])]))
        assert {r.request_id for r in first} <= {"a", "b"}

    assert set(run(path, [row("d", [5])], prepare=interleave).results) == {"d"}


def test_a_loop_is_ended_where_the_row_asks_for_it(path):
    loop = RepetitionDetection(max_pattern_size=3, min_count=3)
    free = row("free", [5, 6, 7], max_tokens=40, ignore_eos=True, logit_bias={9: 100.0})
    held = dataclasses.replace(
        free, id="held", params=dataclasses.replace(free.params, repetition_detection=loop)
    )
    late = dataclasses.replace(
        held, id="late", params=dataclasses.replace(held.params, min_tokens=10)
    )
    outcome = run(path, [free, held, late], look_ahead=1)
    output = outcome.results["held"].outputs[0]
    assert output.token_ids == [9, 9, 9]
    assert output.finish_reason is FinishReason.REPETITION
    assert output.stop_reason == "repetition_detected"
    assert len(outcome.results["late"].outputs[0].token_ids) == 10
    assert outcome.results["free"].outputs[0].finish_reason is FinishReason.LENGTH

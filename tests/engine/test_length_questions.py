"""The model is asked about lengths; rows are answered as ever, and nobody sees the questions."""

from __future__ import annotations

import numpy as np
import pytest

from batchwright.plan.length_predictor import Rows
from batchwright.plan.lengths.self_report import MAX_ANSWER_TOKENS, TOKENS_PER_WORD, Predictor
from tests.engine.symbolic_engine import LetterTokenizer, answers, contents, mixed_job, new_engine


@pytest.fixture
def numbers(monkeypatch):
    """Texts are numbers: the first token of each."""
    monkeypatch.setattr(LetterTokenizer, "decode", lambda self, ids, **_: f"about {ids[0]} words")


@pytest.mark.parametrize("num_blocks", [16, 60])
@pytest.mark.parametrize("look_ahead", [0, 1])
def test_rows_are_answered_as_without_questions(num_blocks: int, look_ahead: int) -> None:
    plain, _ = new_engine(num_blocks=num_blocks)
    expected = {key: contents(result) for key, result in answers(plain, mixed_job()).items()}
    engine, _ = new_engine(num_blocks=num_blocks, look_ahead=look_ahead, lengths=Predictor())
    results = {key: contents(result) for key, result in answers(engine, mixed_job()).items()}
    assert results == expected
    assert engine._questions.num_asked == 10  # one for each row that generates
    assert not engine._questions._asked


def test_their_tokens_are_counted() -> None:
    plain, _ = new_engine()
    answers(plain, mixed_job())
    engine, _ = new_engine(lengths=Predictor())
    answers(engine, mixed_job())
    more = engine.stats.num_generated_tokens - plain.stats.num_generated_tokens
    assert 0 < more <= 10 * MAX_ANSWER_TOKENS
    assert engine.stats.num_computed_tokens > plain.stats.num_computed_tokens


def test_what_the_model_says_is_expected(numbers) -> None:
    predictor = Predictor()
    engine, _ = new_engine(lengths=predictor, max_num_seqs=2)
    job = [request for request in mixed_job() if request.id.startswith("r")]
    answers(engine, job)
    assert engine._questions.num_understood == len(predictor._told) == len(job)


def test_questions_do_not_wait_and_are_not_seen() -> None:
    engine, _ = new_engine(lengths=Predictor(), max_num_seqs=1)
    for request in mixed_job():
        engine.add(request)
    assert not any("length" in request_id for request_id in engine.waiting_ids())
    engine.step()
    running = engine._scheduler.books.slots.running
    assert "length" in engine._scheduler.books.occupant(int(running[0])).request.id
    engine.cancel("r7")
    results = {}
    while engine.num_unfinished:
        results |= {result.request_id: result for result in engine.step()}
    assert set(results) == {request.id for request in mixed_job()}
    engine.abandon()


def test_numbers_are_found_in_what_is_said() -> None:
    predictor, prompt = Predictor(), np.arange(3, dtype=np.int32)
    assert not predictor.tell(prompt, "many")
    rows = Rows([prompt], np.array([500]))
    assert predictor.predict(rows, np.zeros(1, np.int64)).mean[0] == 500
    assert predictor.tell(prompt, "about 30 words")
    assert predictor.predict(rows, np.zeros(1, np.int64)).mean[0] == 30 * TOKENS_PER_WORD

"""LengthQuestions: the rows that ask the model how long other rows will be.

Only for the predictor `self_report`. A question runs before the rows that wait, and its result goes
to nobody but the predictor.
"""

from __future__ import annotations

import numpy as np

from batchwright.errors import RequestError
from batchwright.limits import ModelLimits
from batchwright.plan.expected_lengths import ExpectedLengths
from batchwright.plan.lengths.self_report import INSTRUCTION, MAX_ANSWER_TOKENS, Predictor
from batchwright.request import Request, Result, SamplingParams, Task
from batchwright.sequence import Sequence
from batchwright.text.tokenizer import Tokenizer

SUFFIX = "\0length"


class LengthQuestions:
    """Questions that were asked and not answered yet.

    Args:
        predictor: is told the answers.
        expected: where expectations of rows are kept.

    Attributes:
        num_asked, num_understood: questions, and those that were answered with a number.
    """

    def __init__(
        self,
        predictor: Predictor,
        expected: ExpectedLengths,
        tokenizer: Tokenizer,
        limits: ModelLimits,
    ) -> None:
        self._predictor, self._expected, self._limits = predictor, expected, limits
        self._instruction = np.array(
            tokenizer.encode(INSTRUCTION, add_special_tokens=False), np.int32
        )
        self._asked: dict[str, Sequence] = {}
        self.num_asked = self.num_understood = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._asked

    def ask_about(self, first: Sequence) -> Request | None:
        """The question about a row, whose first sequence is given; None if there is none to ask."""
        request = first.request
        most = first.max_len - first.num_prompt_tokens
        if request.task is not Task.GENERATE or request.params.least_output(most) >= most:
            return None
        question = Request(
            id=request.id + SUFFIX,
            prompt_token_ids=np.concatenate((request.prompt_token_ids, self._instruction)),
            params=SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS),
            namespace=request.namespace,
        )
        try:
            self._limits.check(question)
        except RequestError:
            return None
        self._asked[question.id] = first
        self.num_asked += 1
        return question

    def take(self, results: dict[str, Result]) -> dict[str, Result]:
        """Take the answers in; returns the results of rows."""
        rows = {}
        for id, result in results.items():
            first = self._asked.pop(id, None)
            if first is None:
                if not id.endswith(SUFFIX):  # else an interrupt came when it was taken in
                    rows[id] = result
                continue
            text = result.outputs[0].text if result.error is None and result.outputs else ""
            if self._predictor.tell(first.request.prompt_token_ids, text):
                self.num_understood += 1
                if first.num_cached_tokens is None and first.finish_reason is None:  # it waits
                    self._expected.estimate([first])
        return rows

    def clear(self) -> None:
        """Nothing is asked any more."""
        self._asked.clear()

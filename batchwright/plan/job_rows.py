"""JobRows: what planning keeps of the rows of a job: their tokens, and a few numbers of each."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from batchwright.folding import fold_key
from batchwright.plan.token_store import TokenStore
from batchwright.request import Request, Task
from batchwright.sequence import Sequence

Int64Array = npt.NDArray[np.int64]

TASKS = tuple(Task)


@dataclass(slots=True, eq=False)
class RowColumns:
    """Numbers of each row; all arrays are int64 [num_rows].

    Attributes:
        place: where the row stands in the input, counted from 0.
        task: index in TASKS.
        num_prompt: tokens of the prompt.
        num_computable: those of them that are computed if nothing is shared; a score needs none
            after its last token.
        first_needed: first prompt token that is computed whatever is shared.
        num_samples: sequences of the row.
        least_output, most_output: bounds of the output tokens of one sequence.
        fold: equal for rows that ask for the same computation; 0 if a row has noise of its own.
    """

    place: Int64Array
    task: Int64Array
    num_prompt: Int64Array
    num_computable: Int64Array
    first_needed: Int64Array
    num_samples: Int64Array
    least_output: Int64Array
    most_output: Int64Array
    fold: Int64Array

    def __len__(self) -> int:
        return len(self.place)

    def at(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> RowColumns:
        """The columns of some rows."""
        return RowColumns(*(getattr(self, field.name)[rows] for field in fields(self)))


class JobRows:
    """Grows as rows are read.

    Attributes:
        store: the prompts' tokens.
    """

    def __init__(self, store: TokenStore | None = None) -> None:
        self.store = store or TokenStore()
        self._columns = {field.name: array("q") for field in fields(RowColumns)}

    def __len__(self) -> int:
        return len(self.store)

    def add(self, request: Request, max_len: int, place: int) -> None:
        """Take note of a row.

        Args:
            max_len: tokens at which its sequences end, from `limits.ModelLimits`.
            place: where it stands in the input.
        """
        first = Sequence(
            request=request,
            order=0,
            sample_index=0,
            end_token_ids=(),
            noise_key=0,
            max_len=max_len,
            token_ids=request.prompt_token_ids,
        )
        num_prompt, key = first.num_prompt_tokens, fold_key(request)
        most = max_len - num_prompt
        numbers = {
            "place": place,
            "task": TASKS.index(request.task),
            "num_prompt": num_prompt,
            "num_computable": min(first.compute_end, num_prompt),
            "first_needed": first.first_needed_position,
            "num_samples": request.params.n if first.samples else 1,
            "least_output": request.params.least_output(most),
            "most_output": most,
            "fold": 0 if key is None else hash(key) or 1,
        }
        for name, number in numbers.items():
            self._columns[name].append(number)
        self.store.append(request.prompt_token_ids)

    def columns(self) -> RowColumns:
        """What is known of all rows so far, copied."""
        return RowColumns(**{name: np.array(c, np.int64) for name, c in self._columns.items()})

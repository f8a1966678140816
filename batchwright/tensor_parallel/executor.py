"""TensorParallelExecutor: rank 0's executor, which lets the followers compute every Step too."""

from __future__ import annotations

from dataclasses import dataclass

from batchwright.exec.executor import Executor, PendingResult
from batchwright.step import Step, StepResult
from batchwright.tensor_parallel.followers import Followers


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    inner: PendingResult
    followers: Followers

    def wait(self) -> StepResult:
        try:
            result = self.inner.wait()
        except Exception as error:
            raise self.followers.failure(error) from error
        self.followers.check()  # what was computed without one of them is wrong
        return result


class TensorParallelExecutor:
    """See `Executor`. After a failed step the ranks meet again, or the followers have been ended.

    Args:
        own: rank 0's.
        followers: with the same model loaded.
    """

    def __init__(self, own: Executor, followers: Followers) -> None:
        self._own, self._followers = own, followers

    def execute(self, step: Step) -> PendingResult:
        """See `Executor`.

        Raises:
            RankError: nothing can be computed any more, since this step or an earlier one.
            Exception: the step failed on some rank, and all have given it up; go on as with a
                single process.
        """
        self._followers.send(step)
        try:
            pending = self._own.execute(step)
        except Exception as error:
            cause = self._followers.give_up_step(error)
            if cause is error:
                raise
            raise cause from error
        except BaseException:  # an interrupt, somewhere between two collectives
            self._followers.close()
            raise
        return pending if isinstance(pending, StepResult) else _Pending(pending, self._followers)

    def close(self) -> None:
        self._followers.close()
        self._own.close()

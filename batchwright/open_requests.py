"""OpenRequests: requests from their coming in to their result.

It knows which sequences belong to which request, which requests wait for the result of an identical
one, and which results nobody has fetched yet. What a Step produced is made results of here.
"""

from __future__ import annotations

from collections.abc import Hashable

from batchwright.folding import Folding, answer_as
from batchwright.outputs import RunningRequest, cancelled, failed, make_result
from batchwright.recovery import internal_error
from batchwright.request import FinishReason, Request, Result
from batchwright.sched.intake import Update
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import NO_SLOT, Sequence
from batchwright.step import StepResult
from batchwright.text.tokenizer import Tokenizer


class OpenRequests:
    """See the module docstring.

    Args:
        scheduler: ends sequences.
        tokenizer: makes text.

    Attributes:
        running: requests that have sequences of their own, by id.
        done: results that have not been fetched, by request; they leave it last.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self.running: dict[str, RunningRequest] = {}
        self.done: dict[str, Result] = {}
        self._folding = Folding()

    def __len__(self) -> int:
        return len(self.running) + len(self._folding) + len(self.done)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.running or request_id in self._folding or request_id in self.done

    # In ---------------------------------------------------------------------------------------

    def fold(self, key: Hashable, request: Request) -> bool:
        """Let a request have the result of an identical one; False: there is none."""
        if (result := self._folding.recall(key)) is not None:
            self._answer_as(request, result)
            return True
        return self._folding.follow(key, request)

    def open(
        self, running: RunningRequest, key: Hashable | None, *, is_first: bool = False
    ) -> None:
        """A request runs, before all that wait if `is_first`; later ones with the same key (None:
        there are none) may follow it."""
        running.start_over(self._tokenizer)
        self._scheduler.add(running.streams[0].sequence, is_first=is_first)
        self.running[running.request.id] = running
        if key is not None:
            self._folding.lead(key, running.request.id)

    # Out --------------------------------------------------------------------------------------

    def take(self, update: Update, result: StepResult) -> None:
        """Take in what a Step produced."""
        for sequence, position, first, end in update.scored:
            self.running[sequence.request.id].take_scores(position, first, end, result)
        for sequence, slot in update.pooled:
            assert result.embeddings is not None
            self.running[sequence.request.id].embedding = result.embeddings[slot]
        # last: a stop string may complete the request
        for sequence, line in update.watched:
            if sequence.request.id in self.running:
                self._watch(sequence, line, result)
        for sequence in update.finished:
            self._finish(sequence)

    def fail(self, request_id: str, error: Exception) -> None:
        """End a request with an internal error, and those that wait for its result."""
        running = self.running[request_id]
        self._end_sequences(running, FinishReason.ERROR)
        self._answer(running, failed(running.request, internal_error(error)))

    def cancel(self, request_id: str) -> str | None:
        """End a request.

        Returns:
            The identical request that takes over its sequences, if there is one.
        """
        if request_id in self.done:
            return None  # its result is on its way
        if request_id in self._folding:
            self.done[request_id] = cancelled(self._folding.leave(request_id))
            return None
        running = self.running[request_id]
        heir = self._folding.hand_over(request_id)
        if heir is not None:
            self.done[request_id] = cancelled(running.request)
            self._replace(running, heir)
            return heir.id
        for sequence in self._end_sequences(running, FinishReason.CANCELLED):
            self._finish(sequence)
        return None

    # Looked at --------------------------------------------------------------------------------

    def waiting_ids(self) -> list[str]:
        """Requests none of whose sequences has started, and those that wait for their results."""
        waiting = [
            request_id
            for request_id, running in self.running.items()
            if all(stream.sequence.num_cached_tokens is None for stream in running.streams)
        ]
        followers = (f.id for leader in waiting for f in self._folding.followers(leader))
        return [*waiting, *followers]

    def started(self, allowed: frozenset[str] | None) -> list[str]:
        """Requests that have started, of those allowed (None: all); all of these if none has."""
        open_ids = [i for i in self.running if i not in self.done]
        candidates = [i for i in open_ids if allowed is None or i in allowed]
        started = [
            request_id
            for request_id in candidates
            for sequence in (stream.sequence for stream in self.running[request_id].streams)
            if sequence.slot != NO_SLOT or sequence.finish_reason is not None
        ]
        return list(dict.fromkeys(started)) or candidates

    # Anew -------------------------------------------------------------------------------------

    def start_over(self) -> list[Sequence]:
        """All requests run again from their prompts; returns the first sequence of each.

        Draws do not change by that.
        """
        for request_id, result in list(self.done.items()):
            if request_id in self.running:  # interrupted while it was being answered
                self._answer(self.running[request_id], result)
        for running in self.running.values():
            sequences = [stream.sequence for stream in running.streams]
            for sequence in sequences:
                sequence.start_over()
            sequences[0].siblings = sequences[1:]
            running.start_over(self._tokenizer)
        return [running.streams[0].sequence for running in self.running.values()]

    def clear(self) -> None:
        """Forget all requests and results."""
        self.running.clear()
        self.done.clear()
        self._folding = Folding()

    # Within -----------------------------------------------------------------------------------

    def _watch(self, sequence: Sequence, line: int, result: StepResult) -> None:
        """Let a request look at a token of its own; it may end with it."""
        running = self.running[sequence.request.id]
        try:
            end = running.take_token(sequence.sample_index, line, result)
        except Exception as error:  # noqa: BLE001 - text of this row only; the row fails
            self.fail(sequence.request.id, error)
            return
        if end is None:
            return
        if sequence.finish_reason is None:
            self._scheduler.finish(sequence, end.reason, end.stop_reason)
            self._finish(sequence)
        elif end.reason is FinishReason.STOP and sequence.finish_reason is FinishReason.LENGTH:
            sequence.finish_reason = FinishReason.STOP  # with the last token it was allowed

    def _finish(self, sequence: Sequence) -> None:
        running = self.running.get(sequence.request.id)
        if running is None:  # it has failed while its last results were taken in
            return
        running.num_unfinished -= 1
        if running.num_unfinished:
            return
        try:
            result = make_result(running, self._tokenizer)
        except Exception as error:  # noqa: BLE001 - text of this row only; the row fails
            result = failed(running.request, internal_error(error))
        self._answer(running, result)

    def _end_sequences(self, running: RunningRequest, reason: FinishReason) -> list[Sequence]:
        """End the sequences of a request that have not ended; returns them."""
        sequences = [s.sequence for s in running.streams if s.sequence.finish_reason is None]
        for sequence in sequences:
            self._scheduler.finish(sequence, reason)
        return sequences

    def _answer(self, running: RunningRequest, result: Result) -> None:
        """A request has its result, and so have those that follow it.

        That holds for errors too. A leader that failed has failed at least twice, once alone; an
        identical row would do the same and hold everybody up again.
        """
        request_id = running.request.id
        self.done[request_id] = result
        for follower in self._folding.followers(request_id):
            self._answer_as(follower, result)
        self._folding.close(request_id, result)
        del self.running[request_id]

    def _answer_as(self, request: Request, result: Result) -> None:
        self.done[request.id] = answer_as(request, result)
        self._scheduler.stats.num_folded += 1

    def _replace(self, running: RunningRequest, heir: Request) -> None:
        """Let a request go on as an identical one."""
        del self.running[running.request.id]
        running.request = heir
        for stream in running.streams:
            stream.sequence.request = heir
        self.running[heir.id] = running

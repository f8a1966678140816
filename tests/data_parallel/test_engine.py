"""The engine's side of replicas, whose answers are made up: rows, deaths, stops, interrupts."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from batchwright.data_parallel.engine import MOST_AHEAD, ReplicatedEngine
from batchwright.data_parallel.messages import Abandon, Add, Cancel, Failed, Logged, Report
from batchwright.data_parallel.replicas import Inbox
from batchwright.data_parallel.row_queue import RowQueue
from batchwright.errors import ReplicaError, RequestError
from batchwright.job.engine_counts import EngineCounts
from batchwright.limits import ModelLimits
from batchwright.outputs import failed
from batchwright.plan.orders.fcfs import fcfs
from batchwright.request import Completion, FinishReason, Request, Result, SamplingParams, Task


class FakeReplicas:
    """Keeps what it is told; tests say what replicas answer."""

    def __init__(self, num: int) -> None:
        self.num, self.inbox = num, Inbox()
        self.told: list[list[Any]] = [[] for _ in range(num)]
        self.taken: list[list[str]] = [[] for _ in range(num)]  # of this epoch, as reported
        self.steps = [0] * num

    def __len__(self) -> int:
        return self.num

    def send(self, number: int, message: Any) -> None:
        self.told[number].append(message)

    def close(self) -> None:
        pass

    def given(self, number: int) -> list[str]:
        """Rows that it was given in this epoch."""
        ids: list[str] = []
        for message in self.told[number]:
            if isinstance(message, Abandon):
                ids = []
            if isinstance(message, Add):
                ids += [request.id for request in message.requests]
        return ids

    def epoch(self, number: int) -> int:
        return max([m.epoch for m in self.told[number] if isinstance(m, Abandon)], default=0)

    def report(
        self, number: int, *results: Result, waiting: tuple[str, ...] = (), **fields: Any
    ) -> None:
        """It has taken all, and run a step."""
        self.steps[number] += 1
        values = {
            "epoch": self.epoch(number),
            "num_taken": len(self.given(number)),
            "results": results,
            "counts": EngineCounts(steps=self.steps[number], prompt_keys=(5,)),
            "waiting_ids": waiting,
        }
        self.inbox.put(number, Report(**values | fields))


class NoGrammars:
    def close(self) -> None:
        pass


def engine_of(num: int, **options: Any) -> tuple[ReplicatedEngine, FakeReplicas]:
    replicas = FakeReplicas(num)
    engine = ReplicatedEngine(
        replicas,  # type: ignore[arg-type]
        RowQueue(num, block_size=32),
        ModelLimits(1000, 100),
        max_num_batched_tokens=64,
        grammars=NoGrammars(),  # type: ignore[arg-type]
        shape=None,  # type: ignore[arg-type]
        order=fcfs,
        **options,
    )
    return engine, replicas


def request(id: str, num_prompt: int = 8, **fields: Any) -> Request:
    prompt = np.full(num_prompt, sum(map(ord, id)) % 90, np.int32)
    params = SamplingParams(max_tokens=10)
    return Request(id=id, prompt_token_ids=prompt, params=params, **fields)


def answer(id: str) -> Result:
    done = Completion(index=0, text="x", token_ids=[1] * 5, finish_reason=FinishReason.LENGTH)
    return Result(request_id=id, prompt_token_ids=[1], outputs=[done])


def add(engine: ReplicatedEngine, num: int, **fields: Any) -> list[str]:
    ids = [f"r{i}" for i in range(num)]
    for id in ids:
        engine.add(request(id, **fields))
    return ids


def ids_of(results: list[Result]) -> list[str]:
    return sorted(result.request_id for result in results)


def test_rows_are_spread_and_results_come_back_once():
    engine, replicas = engine_of(2)
    ids = add(engine, 6)
    assert engine.step() == [] and engine.num_unfinished == 6
    assert sorted(replicas.given(0) + replicas.given(1)) == ids
    assert len(replicas.given(0)) == len(replicas.given(1)) == 3
    engine.check_integrity()
    replicas.report(0, *map(answer, replicas.given(0)))
    replicas.report(1, answer(replicas.given(1)[0]))
    assert len(engine.step()) == 4 and engine.num_unfinished == 2
    engine.check_integrity()


def test_replicas_get_no_more_than_they_soon_begin():
    engine, replicas = engine_of(2)
    add(engine, 30, num_prompt=30)  # two steps of 64 tokens hold five such prompts, begun
    engine.step()
    assert [len(replicas.given(number)) for number in (0, 1)] == [5, 5]
    replicas.report(0, waiting=tuple(replicas.given(0)[3:]))  # three run
    engine.step()
    assert [len(replicas.given(number)) for number in (0, 1)] == [8, 5]
    assert len(engine.waiting_ids()) == 30 - 3 == engine.load.num_waiting_seqs + 2


def test_rows_with_short_prompts_are_bounded_too():
    engine, replicas = engine_of(1)
    add(engine, 100, num_prompt=1)
    engine.step()
    assert len(replicas.given(0)) == MOST_AHEAD


def test_single_rows_go_to_whoever_has_least():
    engine, replicas = engine_of(3)
    for i in range(6):
        engine.add(request(f"r{i}"))
        engine.step()
    assert [len(replicas.given(number)) for number in range(3)] == [2, 2, 2]


def test_urgent_rows_wait_for_nobody():
    engine, replicas = engine_of(2)
    add(engine, 30, num_prompt=60)
    engine.step()
    engine.add(request("now", urgent=True))
    assert "now" in replicas.given(0) + replicas.given(1)
    assert "now" not in engine.waiting_ids() or engine.num_unfinished == 31


def test_rows_of_a_dead_replica_go_to_the_others(caplog):
    engine, replicas = engine_of(2)
    ids = add(engine, 6)
    engine.step()
    lost = replicas.given(0)
    replicas.report(0, answer(lost[0]))
    replicas.inbox.put(0, Failed(None, "was ended by signal 9"))
    with caplog.at_level(logging.WARNING):
        assert ids_of(engine.step()) == [lost[0]]
    assert caplog.messages == [
        "replica 0 was ended by signal 9; 1 of 2 replicas go on with its 2 unfinished rows"
    ]
    assert sorted(replicas.given(1)) == sorted({*ids} - {lost[0]})
    engine.check_integrity()
    replicas.report(1, *map(answer, replicas.given(1)))
    assert len(engine.step()) == 5 and not engine.num_unfinished


def test_a_row_that_ran_in_two_replicas_when_they_died_fails(caplog):
    engine, replicas = engine_of(3)
    add(engine, 3)
    engine.step()
    (bad,) = replicas.given(0)
    for number in range(3):  # it is where it is: whoever gets it dies
        if bad in replicas.given(number):
            replicas.report(number)
            replicas.inbox.put(number, Failed(None, "was ended by signal 11"))
            engine.step()
            break
    second = next(n for n in range(3) if n != number and bad in replicas.given(n))
    beside = next(id for id in replicas.given(second) if id != bad)
    replicas.report(second, waiting=(beside,))  # it waits, so it is not to blame
    replicas.inbox.put(second, Failed(None, "was ended by signal 11"))
    (result,) = engine.step()
    assert result.request_id == bad and result.error.code == "internal_error"
    assert "two replicas ended while the row ran" in result.error.message
    assert "1 rows that ran in two replicas when they ended fail" in caplog.text
    third = 3 - number - second
    assert beside in replicas.given(third) and bad not in replicas.given(third)
    engine.check_integrity()


def test_a_row_that_only_waited_when_replicas_died_does_not_fail():
    engine, replicas = engine_of(3)
    add(engine, 1)
    for number in range(2):
        engine.step()
        there = next(n for n in range(3) if n in engine._alive and "r0" in replicas.given(n))
        replicas.report(there, waiting=("r0",))
        replicas.inbox.put(there, Failed(None, "was ended by signal 9"))
        assert engine.step() == [], number
    (last,) = engine._alive
    replicas.report(last, answer("r0"))
    assert engine.step()[0].error is None


def test_without_replicas_nothing_runs_and_finished_rows_are_told_first():
    engine, replicas = engine_of(2)
    add(engine, 4)
    engine.step()
    replicas.inbox.put(0, Failed(None, "was ended by signal 9"))
    replicas.report(1, answer(replicas.given(1)[0]))
    replicas.inbox.put(1, Failed(None, "failed: memory does not suffice"))
    assert len(engine.step()) == 1
    for _ in range(2):  # and for ever after
        with pytest.raises(ReplicaError, match=r"replica 1 failed: memory .* none of 2 replicas"):
            engine.step()
    engine.abandon()
    engine.add(request("again"))
    with pytest.raises(ReplicaError):
        engine.step()


def test_a_row_that_waits_here_is_cancelled_here_and_others_there():
    engine, replicas = engine_of(1)
    ids = add(engine, 20, num_prompt=60)
    engine.step()
    there = replicas.given(0)
    here = next(id for id in ids if id not in there)
    engine.cancel(here)
    engine.cancel(there[0])
    (result,) = engine.step()
    assert result.request_id == here
    assert [output.finish_reason for output in result.outputs] == [FinishReason.CANCELLED]
    assert replicas.told[0][-1] == Cancel(there[0])
    engine.check_integrity()


def test_a_cancelled_score_is_an_error():
    engine, _ = engine_of(1)
    add(engine, 5, num_prompt=60)
    engine.add(request("score", task=Task.SCORE))
    engine.step()
    engine.cancel("score")
    (result,) = engine.step()
    assert result.error.code == "cancelled"


def test_what_was_abandoned_is_not_heard_of():
    engine, replicas = engine_of(2)
    add(engine, 4)
    engine.step()
    before = replicas.given(0)
    replicas.report(0, *map(answer, before))
    engine.abandon()
    assert engine.num_unfinished == 0 and replicas.epoch(0) == replicas.epoch(1) == 1
    engine.add(request(before[0]))
    assert engine.step() == []
    replicas.report(0, *[answer(id) for id in replicas.given(0)])
    replicas.report(1, *[answer(id) for id in replicas.given(1)])
    assert ids_of(engine.step()) == [before[0]]
    assert engine.stats.num_steps == 3  # the steps themselves were made


def test_an_interrupted_step_begins_anew(monkeypatch):
    engine, replicas = engine_of(2)
    ids = add(engine, 4)
    engine.step()
    early = replicas.given(0)[0]
    replicas.report(0, answer(early))

    def interrupt(row, result):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.step()  # the report it was broken off in is of an earlier epoch now
    engine.check_integrity()
    assert sorted(replicas.given(0) + replicas.given(1)) == ids
    for number in range(2):
        replicas.report(number, *map(answer, replicas.given(number)))
    assert ids_of(engine.step()) == ids


def test_ids_are_unique_and_limits_are_checked_here():
    engine, _ = engine_of(2)
    add(engine, 1)
    with pytest.raises(RequestError, match="already running"):
        engine.add(request("r0"))
    with pytest.raises(RequestError, match="prompt has 1200 tokens"):
        engine.add(request("long", num_prompt=1200))


def test_what_a_replica_refuses_is_a_result():
    engine, replicas = engine_of(1)
    one = request("r0")
    engine.add(one)
    engine.step()
    replicas.report(0, failed(one, RequestError("it would not fit", code="kv_capacity_exceeded")))
    (result,) = engine.step()
    assert result.error.code == "kv_capacity_exceeded"


def test_counts_are_of_all_replicas():
    engine, replicas = engine_of(2)
    add(engine, 2)
    engine.step()
    for number, steps in ((0, 3), (1, 4), (0, 5)):
        counts = EngineCounts(steps=steps, generated_tokens=10 * steps, prompt_keys=(2 * steps,))
        fields = {"num_running_seqs": steps, "kv_used_fraction": steps / 10, "own_bytes": steps}
        replicas.report(number, counts=counts, **fields)
    engine.step()
    assert engine.stats.num_steps == 9 and engine.stats.num_generated_tokens == 90
    assert engine.stats.work.num_prompt_keys == [18]
    assert engine.load.num_running_seqs == 9 and engine.load.kv_used_fraction == 0.5
    assert engine.load.helper_bytes == 9


def test_warnings_of_replicas_are_told(caplog):
    engine, replicas = engine_of(2)
    replicas.inbox.put(1, Logged(logging.WARNING, "a step hangs"))
    engine.step()
    assert caplog.messages == ["replica 1: a step hangs"]

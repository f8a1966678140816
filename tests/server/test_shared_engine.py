"""SharedEngine by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batchwright.request import Request, SamplingParams
from batchwright.server.shared_engine import (
    ServerStoppingError,
    SharedEngine,
    TooManyCallsError,
)
from tests.job.fakes import FakeEngine


def request(id: str, max_tokens: int = 1, num_prompt: int = 3) -> Request:
    return Request(
        id=id,
        prompt_token_ids=np.zeros(num_prompt, np.int32),
        params=SamplingParams(max_tokens=max_tokens),
    )


def shared(engine: FakeEngine | None = None, **options: Any) -> SharedEngine:
    return SharedEngine(engine or FakeEngine(), **{"max_calls": 2, **options})


def test_results_go_to_whom_they_belong() -> None:
    engine = shared()
    engine.add(request("row"))
    call = engine.submit(request("call-1", num_prompt=5))
    assert engine.num_unfinished == 2 and engine.num_open_calls == 1
    assert [result.request_id for result in engine.step()] == ["row"]
    assert call.result.result(0).outputs[0].text == "5"
    assert engine.num_unfinished == 0 and engine.num_open_calls == 0


def test_a_job_sees_its_own_rows_waiting() -> None:
    engine = shared(FakeEngine(max_running=1))
    engine.add(request("row", 9))
    for id in ("call-1", "call-2"):
        engine.submit(request(id))
    engine.add(request("row 2"))
    engine.step()
    assert engine.waiting_ids() == ["row 2"]


def test_a_list_counts_as_its_entries() -> None:
    engine = shared()
    engine.submit(request("call-1"))
    parts = (request("call-2 a"), request("call-2 b"))
    with pytest.raises(TooManyCallsError):
        engine.submit(replace(request("call-2"), parts=parts))
    engine.submit(request("call-2"))
    engine.step()
    engine.submit(replace(request("call-3"), parts=parts))
    assert engine.num_open_calls == 2
    engine.step()
    assert engine.num_open_calls == 0


def test_what_a_job_leaves_is_ended_and_not_the_next_ones() -> None:
    fake = FakeEngine(max_running=2)
    engine = shared(fake)
    for id in "abc":
        engine.add(request(id, 9))
    call = engine.submit(request("call-1", 3))
    engine.step()
    engine.abandon()
    assert fake.num_unfinished == 1 and not call.result.done()
    engine.add(request("a", 2))  # the same id again
    done = [result.request_id for _ in range(4) for result in engine.step()]
    assert done == ["a"] and call.result.result(0).outputs


def test_a_call_withdrawn_before_it_starts_or_while_it_runs() -> None:
    fake = FakeEngine()
    engine = shared(fake)
    early, late = (engine.submit(request(id, 9)) for id in ("call-1", "call-2"))
    engine.withdraw(early)
    engine.step()
    assert list(fake.running) == ["call-2"]
    engine.withdraw(late)
    engine.step()
    assert not fake.running and engine.num_open_calls == 0
    engine.withdraw(late)  # too late, and harmless
    engine.step()


def test_a_step_that_fails_fails_the_calls_and_raises() -> None:
    def on_step(number: int) -> None:
        if number == 2:
            raise ValueError("a bug")

    fake = FakeEngine(on_step=on_step)
    engine = shared(fake)
    engine.add(request("row", 4))
    call = engine.submit(request("call-1", 4))
    engine.step()
    with pytest.raises(ValueError, match="a bug"):
        engine.step()
    assert isinstance(call.result.exception(0), ValueError)
    done = [result.request_id for _ in range(4) for result in engine.step()]
    assert done == ["row"]  # the call's remains are nobody's


def test_closing_tells_who_waits() -> None:
    engine = shared()
    waiting, running = (engine.submit(request(id, 9)) for id in ("call-1", "call-2"))
    engine.step()
    engine.close()
    for call in (waiting, running):
        assert isinstance(call.result.exception(0), ServerStoppingError)
    with pytest.raises(ServerStoppingError, match="stopping"):
        engine.submit(request("call-3"))
    engine = shared()
    waiting = engine.submit(request("call-1"))
    engine.close("rank 1 is gone")
    assert str(waiting.result.exception(0)) == "rank 1 is gone"
    with pytest.raises(ServerStoppingError, match="rank 1"):
        engine.submit(request("call-2"))


def test_being_stuck_is_told_by_the_time_since_the_last_sign() -> None:
    now_s = 0.0
    engine = shared(now=lambda: now_s)
    now_s = 59.0
    assert not engine.is_stuck
    now_s = 61.0
    assert engine.is_stuck and engine.silent_s == 61.0
    engine.alive()
    assert not engine.is_stuck

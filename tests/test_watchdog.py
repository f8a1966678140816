"""A step that takes far too long is reported once."""

from __future__ import annotations

import gc
import logging
import time
import weakref

import pytest

from batchwright.clock import VirtualClock
from batchwright.watchdog import Watchdog


@pytest.fixture
def clock():
    return VirtualClock()


def test_a_late_step_is_reported_once(clock, caplog):
    watchdog = Watchdog(clock.now, poll_s=None)
    with caplog.at_level(logging.WARNING):
        watchdog.begin(512, 7)
        clock.advance(60)
        watchdog.check()
        assert not caplog.records
        clock.advance(0.5)
        watchdog.check()
        watchdog.check()
        [record] = caplog.records
        assert "512 tokens in 7 rows" in record.getMessage()
        watchdog.end()
        clock.advance(1000)
        watchdog.check()
        assert len(caplog.records) == 1, "nothing runs"


def test_what_is_late_depends_on_other_steps(clock, caplog):
    watchdog = Watchdog(clock.now, poll_s=None)
    for _ in range(9):
        watchdog.begin(1, 1)
        clock.advance(10)
        watchdog.end()
    with caplog.at_level(logging.WARNING):
        for seconds, num_reports in [(200, 0), (201, 1), (202, 2)]:
            watchdog.begin(2, 2)
            clock.advance(seconds)
            watchdog.check()
            assert len(caplog.records) == num_reports
            watchdog.end()


def test_the_thread_looks_and_ends(clock, caplog):
    watchdog = Watchdog(clock.now, poll_s=0.001)
    assert watchdog._thread is None, "it starts with the first step"
    with caplog.at_level(logging.WARNING):
        watchdog.begin(3, 2)
        clock.advance(100)
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.001)
    assert "3 tokens in 2 rows" in caplog.records[0].getMessage()
    thread = watchdog._thread
    watchdog.end()
    watchdog.close()
    assert not thread.is_alive()
    watchdog.begin(1, 1)
    assert watchdog._thread is None, "a closed watchdog stays closed"


def test_the_thread_keeps_nothing_alive(clock):
    watchdog = Watchdog(clock.now, poll_s=0.001)
    watchdog.begin(1, 1)
    thread, gone = watchdog._thread, weakref.ref(watchdog)
    del watchdog
    deadline = time.monotonic() + 10
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
    thread.join(10)
    assert gone() is None and not thread.is_alive()

"""The feed's thread and what it leaves behind."""

import time

from batchwright.job.feed import Feed
from tests.job.fakes import ByteTokenizer


class SlowJournal:
    """Answers of which there are none, which take long to close."""

    is_closed = False

    def among(self, ids: list[str]) -> dict[str, bytes]:
        return {}

    def close(self) -> None:
        time.sleep(0.2)
        self.is_closed = True


def test_at_the_end_of_the_input_closing_waits_for_the_journal() -> None:
    journal = SlowJournal()
    feed = Feed(iter([]), ByteTokenizer(), finished=journal)  # type: ignore[arg-type]
    while not feed.ended:
        assert feed.get(wait=True) is None
    feed.close()
    assert journal.is_closed

"""A server over a faked model, in a process of its own.

`python -m tests.server.driver DATA PACE_S` prints its port. Signals stop it as they stop
`batchwright serve`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from batchwright.job import journal
from batchwright.server.parts import Parts, lock_data
from batchwright.server.run import listen, serve
from batchwright.server.settings import ServerSettings
from tests.job.fakes import FakeModel
from tests.server.running import MODEL, PacedEngine

journal.MAX_PENDING_ROWS = 2  # many commits in a small batch


def main(data: Path, pace_s: float) -> int:
    engine = PacedEngine(max_running=4)
    engine.pace_s = pace_s
    settings = ServerSettings(port=0, data=data, model_name=MODEL)
    listener = listen(settings)
    parts = Parts(FakeModel(engine), settings, lock_data(data))
    print(listener.getsockname()[1], flush=True)
    return serve(parts, listener, say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))

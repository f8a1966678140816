"""`batchwright run` on a tiny model, in a process that can be killed, again and again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tests.models.reference import make_checkpoint

ROOT = Path(__file__).parent.parent
INTERRUPTED = 75
PARAMS = {"max_tokens": 120, "temperature": 0.0, "ignore_eos": True}
PROMPTS = [f"w{i % 80} w{i % 7} w{i}" for i in range(3, 33)]
ROWS = [{"id": str(index), "prompt": prompt, **PARAMS} for index, prompt in enumerate(PROMPTS)]


def make_model(path: Path) -> Path:
    """A tiny checkpoint whose tokenizer knows the words w0, w1, ..."""
    make_checkpoint("qwen3", path, intermediate_size=38)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


class Job:
    """A command that can be started again and again."""

    def __init__(
        self, model: Path, *options: str, rows: Sequence[dict[str, Any]] = ROWS, name: str = "out"
    ) -> None:
        self.output = model.parent / f"{name}.jsonl"
        self.rows = model.parent / f"{name}.in.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._model, self._options = model, options

    def start(self, *options: str) -> subprocess.Popen[str]:
        """The command, by default with the options given to the constructor."""
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "batchwright.cli.main", "run", str(self.rows)),
                *("-o", str(self.output), "--model", str(self._model), "--device", "cpu"),
                *("--threads", "1", "--max-num-seqs", "6", *(options or self._options)),
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def started(self, num_more: int = 3) -> tuple[subprocess.Popen[str], list[int]]:
        """The command, with some rows more than before, and its children."""
        before = self.num_done()
        process = self.start()
        for _ in range(600):
            if self.num_done() >= before + num_more or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        return process, [int(pid) for pid in children.split()]

    def run(self, *options: str) -> str:
        """To its end, which must be a good one; returns what it said."""
        process = self.start(*options)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        return stderr

    def num_done(self) -> int:
        return self.output.read_text().count("\n") if self.output.exists() else 0

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def texts(self) -> dict[str, str]:
        return {
            line["custom_id"]: line["response"]["body"]["choices"][0]["text"]
            for line in self.lines()
        }

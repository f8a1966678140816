"""What runners share: the order in waves, and that answers have the lengths asked for."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from batchwright.bench.fresh_process import write_job
from batchwright.bench.peers.peer_job import Row, in_waves, read_job
from batchwright.bench.workloads import WorkRequest, build_workloads


def waves(prompts: list[list[int]]) -> list[list[int]]:
    rows = [Row(index, prompt, 1) for index, prompt in enumerate(prompts)]
    return [[row.index for row in wave] for wave in in_waves(rows)]


def block(name: int, length: int = 40) -> list[int]:
    return [name * 1000 + place for place in range(length)]


def test_nothing_shared_is_one_wave() -> None:
    assert waves([block(3), block(1), block(2)]) == [[0, 1, 2]]


def test_a_beginning_too_short_is_no_reason_to_wait() -> None:
    assert waves([[*block(1, 31), 5], [*block(1, 31), 6]]) == [[0, 1]]


def test_one_beginning() -> None:
    """The first in sorted order leads."""
    assert waves([[*block(1), 9], [*block(1), 7], [*block(1), 8], block(2)]) == [[1], [0, 2, 3]]


def test_tokens_shared_by_chance_make_no_further_wave() -> None:
    """Two of the rows go on with the same five tokens."""
    ends = [[9], [7, 7, 7, 7, 7, 1], [7, 7, 7, 7, 7, 2]]
    assert waves([block(1) + end for end in ends]) == [[1], [0, 2]]


def test_a_tree() -> None:
    """Root 1 with inner nodes 2 and 3, two leaves each: a leader of each level, then the rest."""
    leaves = [block(1) + block(inner) + [leaf] for inner in (2, 3) for leaf in (1, 2)]
    assert waves(leaves) == [[0], [2], [1, 3]]


def test_who_shares_a_beginning_comes_after_its_leader() -> None:
    """In the tree workload, shuffled: 8 system prompts, then 24 other blocks, then all others."""
    requests = build_workloads(lambda text: [ord(letter) for letter in text])["W3"]
    prompts = [request.prompt_token_ids for request in requests]
    random.Random(0).shuffle(prompts)
    found = waves(prompts)
    assert [len(wave) for wave in found] == [8, 24, 224]
    seen: set[tuple[int, ...]] = set()
    for wave in found:
        new = [tuple(prompts[index]) for index in wave]
        if wave is found[1]:
            assert all(prompt[:512] in seen for prompt in new)
        if wave is found[2]:
            assert all(prompt[:768] in seen for prompt in new)
        seen |= {prompt[:length] for prompt in new for length in (512, 768)}


def test_answers_have_the_lengths_asked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job_values = {"model": "m", "dtype": "float32", "num_threads": 1}
    write_job(tmp_path, [WorkRequest([1, 2], 3), WorkRequest([4], 1)], job_values, [[5, 5, 5], [6]])
    monkeypatch.setattr(sys, "argv", ["run", str(tmp_path)])
    job = read_job()
    assert [row.prompt_token_ids for row in job.rows] == [[1, 2], [4]]
    assert job.longest == 5
    assert job.our_token_ids() == [[5, 5, 5], [6]]
    with pytest.raises(SystemExit, match="row 1 has 2 tokens, asked for 1"):
        job.finished(1.0, [[7, 7, 7], [8, 8]])
    assert not (tmp_path / "result.json").exists()
    job.finished(1.5, [[7, 7, 7], [8]], note="x")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"seconds": 1.5, "token_ids": [[7, 7, 7], [8]], "note": "x"}

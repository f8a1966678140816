"""The workloads are what results in benchmarks/results were measured with; they must not drift."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from batchwright.bench.necessary_work import necessary_work
from batchwright.bench.workloads import WorkRequest, build_workloads, plain_encoder
from batchwright.text.tokenizer import load_tokenizer
from batchwright.weights.locate import locate_model
from tests.bench.tiny import TINY

SHA256 = {
    "W1": "dae714dad78e95d45c6cbf65ea5c7de4d889e9d17d125711d8438b290476a36e",
    "W2": "21c4b7fbbe4e12af29a56c266143bac7d7f4af1672989dc98b4fbc63dbaf840d",
    "W3": "fe77cc53d91a93c81b2850733440d91f6411f8239a5994493873c34dc7977c02",
    "W4": "096c9d3c2db5ebf99fda16927141a38805bfe60478b31a6f2073868ea993d1b5",
}
"""Of the requests at scale 0.125, encoded by transformers' tokenizer of the embedded model."""


def by_character(text: str) -> list[int]:
    """A stand-in for a tokenizer."""
    return [ord(character) for character in text]


def digest(requests: list[WorkRequest]) -> str:
    rows = [(request.prompt_token_ids, request.num_output_tokens) for request in requests]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


@pytest.fixture(scope="module")
def full() -> dict[str, list[WorkRequest]]:
    return build_workloads(by_character)


def lengths(requests: list[WorkRequest]) -> Counter[tuple[int, int]]:
    return Counter((len(r.prompt_token_ids), r.num_output_tokens) for r in requests)


def test_lengths_at_full_scale(full: dict[str, list[WorkRequest]]) -> None:
    assert lengths(full["W1"]) == {(1088, 8): 256}
    assert lengths(full["W3"]) == {(512 + 256 + 48, 32): 256}
    assert lengths(full["W4"]) == {(512, 4): 64, (32, 192): 64}
    assert len(full["W2"]) == 128
    assert all(32 <= n <= 256 and 16 <= out <= 256 for n, out in lengths(full["W2"]))
    assert len({len(request.prompt_token_ids) for request in full["W2"]}) > 64


def test_shared_prefixes(full: dict[str, list[WorkRequest]]) -> None:
    def num_prefixes(name: str, length: int) -> int:
        return len({tuple(r.prompt_token_ids[:length]) for r in full[name]})

    assert num_prefixes("W1", 1024) == 1 and num_prefixes("W1", 1088) == 256
    assert [num_prefixes("W3", length) for length in (512, 768, 816)] == [8, 32, 256]
    assert num_prefixes("W2", 32) == 128
    assert num_prefixes("W4", 32) == 128
    groups = Counter(group for request in full["W3"] for group in request.groups)
    assert sorted(groups.values()) == 32 * [8] + 8 * [32]
    arrival = [request.groups[1] for request in full["W3"]]
    assert arrival != sorted(arrival)


def test_scale_changes_the_number_of_requests_alone() -> None:
    small = build_workloads(by_character, scale=0.25)
    assert lengths(small["W1"]) == {(1088, 8): 64}
    assert len(small["W2"]) == 32
    assert len({r.groups[0] for r in small["W3"]}) == 2
    assert len({r.groups[1] for r in small["W3"]}) == 8
    assert len(small["W3"]) == 64
    assert lengths(small["W4"]) == {(512, 4): 16, (32, 192): 16}
    smallest = build_workloads(by_character, scale=1e-6)
    assert [len(requests) for requests in smallest.values()] == [1, 1, 32, 2]


def test_seed_decides(full: dict[str, list[WorkRequest]]) -> None:
    assert build_workloads(by_character) == full
    other = build_workloads(by_character, seed=1)
    assert all(digest(other[name]) != digest(full[name]) for name in full)


@pytest.mark.cpu
def test_token_ids_of_the_embedded_model() -> None:
    tokenizer = load_tokenizer(locate_model("smollm2"))
    workloads = build_workloads(plain_encoder(tokenizer.encode), scale=0.125)
    assert {name: digest(requests) for name, requests in workloads.items()} == SHA256


def test_necessary_work_of_a_small_tree() -> None:
    """Distinct tokens: 1 2 3, then 4 (twice the same prompt), then 5 6."""
    prompts = [[1, 2, 3, 5, 6], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2]]
    work = necessary_work([WorkRequest(prompt, 2) for prompt in prompts], TINY)
    assert work.num_prompt_tokens == 15
    assert work.num_distinct_prompt_tokens == 6
    assert work.num_sharable_tokens == 9
    assert work.num_generated_tokens == 8
    # The first generated token of each request is computed; the second is never fed back.
    assert work.num_keys == (1 + 2 + 3) + (4 + 5) + 4 + (6 + 5 + 5 + 3)
    assert TINY.layer_flops_per_token == 2 * 2 * 8 * (4 * 3 + 2 * 2 * 3 + 4 * 3 + 3 * 16)
    assert work.layer_flops == (6 + 4) * TINY.layer_flops_per_token
    assert work.attention_flops == work.num_keys * 2 * (2 + 2) * 4 * 3
    assert work.head_flops == 8 * 2 * 8 * 50
    assert work.bound_s(10.0, 5.0, 2.0) == pytest.approx(
        work.layer_flops / 10 + work.head_flops / 5 + work.attention_flops / 2
    )

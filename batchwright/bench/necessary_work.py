"""What a job must spend, whatever the engine: distinct tokens and FLOPs, counted from its requests.

A prompt token whose whole prefix occurs in an earlier request is computed once for both. Every
generated token but a request's last is computed too, and every generated token needs the output
head. Memory traffic is not counted, so a decode-heavy job cannot reach the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchwright.bench.workloads import WorkRequest
from batchwright.plan.shape import ModelShape


@dataclass(frozen=True)
class NecessaryWork:
    """Work of a job under perfect prefix sharing.

    Attributes:
        num_prompt_tokens: all prompt tokens asked for.
        num_distinct_prompt_tokens: those that have to be computed.
        num_generated_tokens: output tokens.
        num_computed_tokens: tokens that go through the layers: distinct ones of prompts, and all
            generated ones but the last of each request.
        longest_output: most tokens that a request generates; no engine that draws them one by one
            has fewer steps.
        num_keys: (query token, key) pairs of causal attention among computed tokens.
        layer_flops, attention_flops, head_flops: see ModelShape.
    """

    num_prompt_tokens: int
    num_distinct_prompt_tokens: int
    num_generated_tokens: int
    num_computed_tokens: int
    longest_output: int
    num_keys: int
    layer_flops: int
    attention_flops: int
    head_flops: int

    @property
    def num_sharable_tokens(self) -> int:
        """Prompt tokens that sharing can save at best."""
        return self.num_prompt_tokens - self.num_distinct_prompt_tokens

    def bound_s(
        self, layer_flops_per_s: float, head_flops_per_s: float, attention_flops_per_s: float
    ) -> float:
        """Seconds at the given rates."""
        return (
            self.layer_flops / layer_flops_per_s
            + self.head_flops / head_flops_per_s
            + self.attention_flops / attention_flops_per_s
        )


def necessary_work(requests: Sequence[WorkRequest], shape: ModelShape) -> NecessaryWork:
    """Count a job's work. Sorted prompts are the leaves of their prefix tree in order."""
    num_distinct = num_keys = 0
    before: list[int] = []
    for prompt in sorted(request.prompt_token_ids for request in requests):
        num_shared = _num_shared(before, prompt)
        num_distinct += len(prompt) - num_shared
        num_keys += _num_keys(num_shared, len(prompt))
        before = prompt
    num_generated = num_decoded = 0
    for request in requests:
        num_prompt, num_output = len(request.prompt_token_ids), request.num_output_tokens
        num_generated += num_output
        num_decoded += num_output - 1
        num_keys += _num_keys(num_prompt, num_prompt + num_output - 1)
    return NecessaryWork(
        num_prompt_tokens=sum(len(request.prompt_token_ids) for request in requests),
        num_distinct_prompt_tokens=num_distinct,
        num_generated_tokens=num_generated,
        num_computed_tokens=num_distinct + num_decoded,
        longest_output=max(request.num_output_tokens for request in requests),
        num_keys=num_keys,
        layer_flops=(num_distinct + num_decoded) * shape.layer_flops_per_token,
        attention_flops=num_keys * shape.attention_flops_per_key,
        head_flops=num_generated * shape.head_flops_per_token,
    )


def _num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))


def _num_keys(start: int, end: int) -> int:
    """Keys read by the tokens at positions [start, end), each of which sees itself."""
    return (end * (end + 1) - start * (start + 1)) // 2

"""Token counts as response bodies have them."""

from __future__ import annotations

from typing import Any

from batchwright.request import Result


def usage(result: Result) -> dict[str, Any]:
    """`cached_tokens` counts prompt tokens that were shared instead of computed."""
    num_prompt = len(result.prompt_token_ids)
    num_output = sum(len(output.token_ids) for output in result.outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": result.num_cached_tokens},
    }

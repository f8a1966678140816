"""Bodies of /v1/chat/completions: `chat.completion`.

Reasoning and tool calls are split out of the answer's text into the message's `reasoning_content`
and `tool_calls`. Log-probabilities stay those of all tokens.
"""

from __future__ import annotations

from typing import Any

from batchwright.job.answer import AnswerForm, TokenBytes, response_id
from batchwright.job.formats.logprobs import chat_logprob, prompt_logprobs
from batchwright.job.formats.reasoning import opens_reasoning, split_reasoning
from batchwright.job.formats.tool_calls import call_id, split_tool_calls
from batchwright.job.formats.usage import usage
from batchwright.request import Completion, FinishReason, Result


def chat_body(
    result: Result, form: AnswerForm, token_bytes: TokenBytes, *, model: str, created: int
) -> dict[str, Any]:
    """See `response_body`."""
    body: dict[str, Any] = {
        "id": f"chatcmpl-{response_id(result.request_id)}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [_choice(result, output, form, token_bytes) for output in result.outputs],
        "usage": usage(result),
    }
    if form.prompt_logprobs:
        body["prompt_logprobs"] = prompt_logprobs(result, token_bytes)
    return body


def _choice(
    result: Result, output: Completion, form: AnswerForm, token_bytes: TokenBytes
) -> dict[str, Any]:
    logprobs = None
    if output.logprobs is not None:
        logprobs = {"content": [chat_logprob(entry, token_bytes) for entry in output.logprobs]}
    message = _message(result, output, form)
    finish_reason = output.finish_reason.value
    if "tool_calls" in message and output.finish_reason is FinishReason.STOP:
        finish_reason = "tool_calls"
    return {
        "index": output.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": output.stop_reason,
    }


def _message(result: Result, output: Completion, form: AnswerForm) -> dict[str, Any]:
    content: str | None = output.text
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if form.markup.reasons:
        reasoning, content = split_reasoning(output.text, opens_reasoning(result.prompt or ""))
        message["content"] = content
        if reasoning:
            message["reasoning_content"] = reasoning
    if content and form.tool_names and form.markup.tool_calls:
        content, calls = split_tool_calls(content, form.markup.tool_calls, form.tool_names)
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {
                    "id": call_id(result.request_id, output.index, place, form.markup.tool_calls),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for place, call in enumerate(calls)
            ]
    return message

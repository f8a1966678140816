"""The real model on both sides: ours, and transformers' with the same weights.

tests/weights shows that the weights are those transformers itself reads from the file.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import transformers

from batchwright.llm import LLM
from batchwright.request import Request, SamplingParams
from batchwright.weights.checkpoint import open_checkpoint
from batchwright.weights.locate import locate_model
from benchmarks.smollm2_prompts import prompt_ids


@functools.cache
def reference_model() -> transformers.PreTrainedModel:
    """transformers' Llama in fp32 with the embedded model's weights."""
    checkpoint = open_checkpoint(locate_model("smollm2"))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config))
    state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    return model.float().eval()


def varied_requests(llm: LLM, max_tokens: int = 64) -> list[Request]:
    """48 chat and completion prompts, greedy; end tokens do not end them."""
    prompts = prompt_ids(llm.tokenizer)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [
        Request(id=str(i), prompt_token_ids=np.array(ids, np.int32), params=params)
        for i, ids in enumerate(prompts)
    ]


def reference_margins(prompt: list[int], output: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Per output token: is it the reference's greedy choice, and the reference's top-2 margin.

    One forward over prompt and output: if every token is the greedy choice given those before it,
    the whole output is what greedy decoding gives.
    """
    with torch.inference_mode():
        logits = reference_model()(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2)
    is_choice = best.indices[:, 0].numpy() == np.array(output)
    return is_choice, (best.values[:, 0] - best.values[:, 1]).numpy()

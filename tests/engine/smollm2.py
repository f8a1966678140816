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

CHATS = [
    "Name three rivers in Europe.",
    "What is the boiling point of water at sea level?",
    "Write a haiku about autumn.",
    "Explain photosynthesis to a child.",
    "Translate 'good morning' into French.",
    "Give me a recipe for pancakes.",
    "What are the primary colours?",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "How do I reverse a list in Python?",
    "List five animals that live in the ocean.",
    "Why is the sky blue?",
    "Write a short email asking for a day off.",
    "What is 17 plus 25?",
    "Suggest a name for a bakery.",
    "Is a tomato a fruit or a vegetable?",
    "Erkläre kurz, was ein Fahrrad ist.",
]
COMPLETIONS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "The quick brown fox",
    "In 1969, humans first",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the largest planet?\nA:",
    "SELECT name, age FROM users WHERE",
    "The three laws of motion are",
    "import numpy as np\n\nx = np.",
    "Roses are red,",
    "To be or not to be,",
    "The stock market fell today because",
    "<html>\n<head>\n<title>",
    "Breaking news:",
    "A",
    "naïve café, über-cool, 日本語 and emoji 🙂 are",
    "Ingredients:\n- 2 eggs\n- 1 cup of",
    "She opened the door and saw",
    "The mitochondria is",
]
REVIEWS = [
    "The food was cold and the waiter was rude.",
    "A wonderful film from start to finish!",
    "It works, but the manual is confusing.",
    "I would not buy this again.",
    "Exactly what I needed, arrived early.",
    "Broke after two days.",
    "My children love it.",
    "Average at best.",
    "Great value for the price.",
    "The sound quality is terrible.",
    "Comfortable, light and well made.",
    "Support never answered my email.",
]
FEW_SHOT = (
    "Classify each review as positive or negative.\n\n"
    "Review: I loved every minute of it.\nLabel: positive\n\n"
    "Review: The screen cracked on the first day.\nLabel: negative\n\n"
    "Review: Best purchase of the year.\nLabel: positive\n\n"
    "Review: {review}\nLabel:"
)


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
    tokenizer = llm.tokenizer
    prompts = [tokenizer.encode_chat([{"role": "user", "content": c}])[1] for c in CHATS]
    prompts += [tokenizer.encode(text) for text in COMPLETIONS]
    prompts += [tokenizer.encode(FEW_SHOT.format(review=review)) for review in REVIEWS]
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

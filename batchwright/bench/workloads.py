"""The four workloads: the same requests, token for token, from the same tokenizer and seed.

At scale 1:

- W1, few-shot: 256 requests share a 1,024-token prefix, 64 tokens of their own, 8 out.
- W2, generation: 128 requests of 32-256 in, 16-256 out, nothing shared.
- W3, tree: 8 system prompts of 512, each with 4 blocks of 256, each with 8 questions of 48; 32 out.
- W4, blend: 64 requests of 512 in, 4 out, and 64 of 32 in, 192 out.

The scale multiplies the number of requests (of system prompts in W3), never their lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

DEFAULT_SEED = 20260

SNIPPETS = (
    "The committee met on Tuesday to discuss the new budget for the public library and the park.",
    "A small river runs through the valley, and in spring the farmers open the gates to "
    "water the fields.",
    "Please classify the following customer review as positive, negative or neutral, and "
    "give one reason.",
    "The order arrived two days late, the box was damaged, but the product itself works as "
    "described.",
    "In the second chapter the author explains how heat moves through metal, water and air.",
    "She opened the old notebook and read the list of names that her grandfather had written "
    "there.",
    "To install the program, download the package, check its signature and run the setup script.",
    "The patient reported mild pain in the left knee after running, with no swelling and no fever.",
    "Our hotel room was clean and quiet, although the breakfast was poor and the lift was broken.",
    "Scientists measured the light of the distant star for ten years before they announced "
    "the result.",
    "If the temperature falls below zero, the pump stops and a warning is sent to the operator.",
    "The museum shows coins, maps and letters from the eighteenth century in four large rooms.",
    "He asked whether the train to the coast was still running after the storm on Friday night.",
    "The contract may be ended by either party with thirty days of written notice to the other.",
    "Mix the flour, butter and sugar, add two eggs, and bake for forty minutes until golden brown.",
    "The server returned an error because the request did not contain a valid access token.",
    "Voters in the northern district chose a new mayor who promised cheaper buses and safer roads.",
    "A triangle with sides of three, four and five has a right angle between the two short sides.",
    "The cat slept on the warm roof of the car while the children looked for it in the garden.",
    "Shares of the company rose four percent after it reported better sales than analysts "
    "expected.",
)

Encode = Callable[[str], list[int]]


class WorkRequest(NamedTuple):
    """One request: its prompt, the exact number of tokens to generate, and what it shares.

    `groups` names the shared prefixes it belongs to (W1, W3) or its kind (W4).
    """

    prompt_token_ids: list[int]
    num_output_tokens: int
    groups: tuple[str, ...] = ()


class _Text:
    """Endless tokens of ordinary sentences in random order, each after a random number."""

    def __init__(self, encode: Encode, seed: int) -> None:
        self._encode = encode
        self._random = random.Random(seed)
        self._snippets = [encode(" " + snippet) for snippet in SNIPPETS]

    def take(self, num_tokens: int) -> list[int]:
        """The next `num_tokens` token ids; a sentence that is cut does not go on later."""
        token_ids: list[int] = []
        while len(token_ids) < num_tokens:
            token_ids += self._encode(f" [{self._random.randrange(10**6)}]")
            token_ids += self._random.choice(self._snippets)
        return token_ids[:num_tokens]


def build_workloads(
    encode: Encode, *, scale: float = 1.0, seed: int = DEFAULT_SEED
) -> dict[str, list[WorkRequest]]:
    """All four workloads by name, in order of arrival.

    Args:
        encode: text to token ids, without special tokens.
        scale: multiplies the number of requests.
        seed: the same seed, scale and tokenizer give the same requests.
    """
    return {
        "W1": _few_shot(encode, scale, seed),
        "W2": _generation(encode, scale, seed),
        "W3": _tree(encode, scale, seed),
        "W4": _blend(encode, scale, seed),
    }


def _scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def _few_shot(encode: Encode, scale: float, seed: int) -> list[WorkRequest]:
    text = _Text(encode, seed + 1)
    prefix = text.take(1024)
    return [WorkRequest(prefix + text.take(64), 8, ("p0",)) for _ in range(_scaled(256, scale))]


def _generation(encode: Encode, scale: float, seed: int) -> list[WorkRequest]:
    text = _Text(encode, seed + 2)
    lengths = random.Random(seed + 22)
    return [
        WorkRequest(text.take(lengths.randint(32, 256)), lengths.randint(16, 256))
        for _ in range(_scaled(128, scale))
    ]


def _tree(encode: Encode, scale: float, seed: int) -> list[WorkRequest]:
    text = _Text(encode, seed + 3)
    requests = []
    for system in range(_scaled(8, scale)):
        system_ids = text.take(512)
        for few_shot in range(4):
            prefix = system_ids + text.take(256)
            groups = (f"s{system}", f"s{system}f{few_shot}")
            requests += [WorkRequest(prefix + text.take(48), 32, groups) for _ in range(8)]
    random.Random(seed + 33).shuffle(requests)  # rows do not arrive in tree order
    return requests


def _blend(encode: Encode, scale: float, seed: int) -> list[WorkRequest]:
    text = _Text(encode, seed + 4)
    count = _scaled(64, scale)
    requests = [WorkRequest(text.take(512), 4, ("prefill",)) for _ in range(count)]
    requests += [WorkRequest(text.take(32), 192, ("decode",)) for _ in range(count)]
    random.Random(seed + 44).shuffle(requests)
    return requests


def plain_encoder(encode: Callable[..., list[int]]) -> Encode:
    """A tokenizer's `encode` without special tokens."""
    return lambda text: encode(text, add_special_tokens=False)


def num_prompt_tokens(requests: list[WorkRequest]) -> int:
    """Prompt tokens of all requests, shared or not."""
    return sum(len(request.prompt_token_ids) for request in requests)


def num_output_tokens(requests: list[WorkRequest]) -> int:
    """Tokens to generate in all requests."""
    return sum(request.num_output_tokens for request in requests)

"""The 48 prompts that compare SmolLM2 with transformers: chats, texts, a shared prefix."""

from __future__ import annotations

from batchwright.text.tokenizer import Tokenizer

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


def prompt_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of all 48; the last 12 share a prefix."""
    prompts = [tokenizer.encode_chat([{"role": "user", "content": c}])[1] for c in CHATS]
    prompts += [tokenizer.encode(text) for text in COMPLETIONS]
    prompts += [tokenizer.encode(FEW_SHOT.format(review=review)) for review in REVIEWS]
    return [list(ids) for ids in prompts]

"""Prompts sorted by their tokens, and their trie: naive.py and numba.py (CPU) are twins."""

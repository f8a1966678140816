"""Prompts in lexicographic order, how much neighbours share, and the trie these numbers describe."""

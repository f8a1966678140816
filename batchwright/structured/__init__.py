"""Structured output: what a grammar is, how it is compiled, what it allows next."""

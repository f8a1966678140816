"""Prompt Cache (arXiv:2311.04934): modules of prompts are computed once. Lossy."""

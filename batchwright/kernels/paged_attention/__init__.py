"""Attention over keys and values kept in blocks: naive.py (torch) and numba.py (CPU) are twins."""

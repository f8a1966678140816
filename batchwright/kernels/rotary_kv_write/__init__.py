"""Rotate queries and keys, write keys and values into blocks: naive.py and numba.py are twins."""

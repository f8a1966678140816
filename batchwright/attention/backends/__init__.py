"""Attention backends: one file each, each defining `Backend`; see `attention/backend.py`."""

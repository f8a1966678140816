"""Feed-forward activations, gated or plain: naive.py (torch) and numba.py (CPU) are twins."""

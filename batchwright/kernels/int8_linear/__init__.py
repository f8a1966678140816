"""Products with int8 weights and activations: naive.py (torch) and numba.py (CPU) are twins."""

"""Root-mean-square normalisation: naive.py (torch) and numba.py (CPU) are twins."""

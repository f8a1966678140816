"""Log-probabilities of given tokens: naive.py (NumPy) and numba.py (CPU) are twins."""

"""Drawing tokens: naive.py (NumPy) and numba.py (CPU) are twins; README.md has the mathematics."""

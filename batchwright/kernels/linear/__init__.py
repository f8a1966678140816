"""Products with weights: naive.py (torch) and numba.py (CPU, packed weights) are twins."""

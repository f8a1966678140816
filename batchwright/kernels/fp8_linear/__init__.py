"""Products with e4m3 weights and activations, for GPUs; lossy."""

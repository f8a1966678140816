"""Tensor parallelism: one model divided over several processes."""

"""A model's sizes, small enough to count by hand."""

from __future__ import annotations

from batchwright.plan.shape import AttentionShape, ModelShape, Product

TINY = ModelShape(
    hidden_size=8,
    vocab_size=50,
    num_layers=2,
    products=(Product(8, 24, 2), Product(12, 8, 2), Product(8, 32, 2), Product(16, 8, 2)),
    head=Product(8, 50),
    attention=(AttentionShape(None, num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=3),),
    num_params=0,
)

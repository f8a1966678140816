"""Attention over prefixes that rows share: naive.py and products.py are twins, plan.py finds them."""

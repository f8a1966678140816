"""Mixture of experts: the products of tokens with the weights of the experts they chose."""

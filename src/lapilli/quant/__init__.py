"""Weights in 4 or 8 bits: a pass over a plain model."""

"""Comparison of the original with the compressed model, on data."""

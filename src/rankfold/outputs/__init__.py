"""Kinds of a model's outputs, and the metrics in which changes of them count."""

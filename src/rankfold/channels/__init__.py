"""Removal of channels: what it costs, how many go, which tensors become narrower."""

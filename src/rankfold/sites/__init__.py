"""Layers that can be compressed, and why the others can not."""

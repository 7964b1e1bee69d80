"""Residual branches that go whole: the one cut that is as fast as it is small."""

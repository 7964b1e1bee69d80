"""Forecast of the time, memory and sizes of a compression, before it is run."""

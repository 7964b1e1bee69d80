"""Calibration data: batches, running a model on them, splits and draws."""

"""A small trained network on real handwritten digits, so that everything can be tried without a download."""

from rankfold.digits.data import calibration, held_out, training
from rankfold.digits.model import DigitNet, make_model, trained

__all__ = ["DigitNet", "calibration", "held_out", "make_model", "trained", "training"]

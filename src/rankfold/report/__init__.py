"""The report of a compression, before and after: data, text and JSON."""

from rankfold.report.data import Candidate, Report, Row

__all__ = ["Candidate", "Report", "Row"]

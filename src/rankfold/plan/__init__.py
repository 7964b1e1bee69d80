"""The plan: the decisions about every layer."""

from rankfold.plan.decisions import ChannelDecision, Decision
from rankfold.plan.plan import Plan

__all__ = ["ChannelDecision", "Decision", "Plan"]

"""The plan: the decisions about every layer."""

from rankfold.plan.decisions import BranchDecision, ChannelDecision, Decision
from rankfold.plan.plan import Plan

__all__ = ["BranchDecision", "ChannelDecision", "Decision", "Plan"]

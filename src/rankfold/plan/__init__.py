"""The plan: what becomes of every layer."""

from rankfold.plan.plan import ChannelDecision, Decision, Plan

__all__ = ["ChannelDecision", "Decision", "Plan"]

"""Plans worth trying under a budget, by kind of family: one file per kind."""

from rankfold.proposals._base import (
    Asked,
    Basis,
    FamilyForecast,
    Outlook,
    Proposal,
    Proposer,
    family_forecasts,
    numbers_of,
    plans_from,
    proposers_of,
    proposes,
)
from rankfold.proposals._measured import FEWEST, Cuts
from rankfold.proposals._ranks import RankProposer  # registered first: its proposals come first

from rankfold.proposals._channels import ChannelProposer  # isort: skip
from rankfold.proposals._branches import BranchProposer  # isort: skip

__all__ = [
    "FEWEST",
    "Asked",
    "Basis",
    "BranchProposer",
    "ChannelProposer",
    "Cuts",
    "FamilyForecast",
    "Outlook",
    "Proposal",
    "Proposer",
    "RankProposer",
    "family_forecasts",
    "numbers_of",
    "plans_from",
    "proposers_of",
    "proposes",
]

"""Plans worth trying under a budget, by kind of family: one file per kind."""

from rankfold.proposals._base import (
    Asked,
    Basis,
    Foretold,
    Outlook,
    Proposal,
    Proposer,
    foretold_of,
    numbers_of,
    plans_from,
    proposers_of,
    proposes,
)
from rankfold.proposals._ranks import RankProposer  # registered first: its proposals come first

from rankfold.proposals._channels import ChannelProposer  # isort: skip

__all__ = [
    "Asked",
    "Basis",
    "ChannelProposer",
    "Foretold",
    "Outlook",
    "Proposal",
    "Proposer",
    "RankProposer",
    "foretold_of",
    "numbers_of",
    "plans_from",
    "proposers_of",
    "proposes",
]

"""Branches that are gone, in a lockstep walk: nothing of them is computed, and what is left is a constant."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from rankfold.branches.finding import Branch, BranchError, find_branches, first_names, without
from rankfold.branches.stands import places_of_stands
from rankfold.errors import PlanError, near_matches
from rankfold.graph.regions import Call
from rankfold.graph.walk import Arrival
from rankfold.plan import Plan
from rankfold.repair.gather import Share
from rankfold.repair.moments import HELD


@dataclass(frozen=True, eq=False)
class Removed:
    """The branches that a plan removes, on the graph of the original.

    Attributes:
        calls: A call for each branch, of a layer that reads the skip branch and returns what is left.
        dead: Nodes that have no value in the compressed network.
        places: Path of the module that becomes a constant, by name of the branch; "" where nothing is left of it.
        branches: Branches by name.
    """

    calls: tuple[Call, ...]
    dead: frozenset[Node]
    places: Mapping[str, str]
    branches: Mapping[str, Branch]

    @classmethod
    def of(cls, program: ExportedProgram, model: nn.Module, plan: Plan) -> Removed:
        """The branches of a plan.

        Raises:
            PlanError: The graph has no such branch; near matches are named.
        """
        if not plan.branches:
            return cls((), frozenset(), {}, {})
        known = {branch.name: branch for branch in find_branches(program, first_names(model))}
        for decision in plan.branches:
            if decision.branch not in known:
                raise PlanError(
                    repr(decision.branch),
                    law="a residual branch, named by the last layer in it",
                    got="no such branch",
                    cure=near_matches(decision.branch, known),
                )
        places = {decision.branch: decision.constant for decision in plan.branches}
        gone = [known[name] for name in places]
        _check_stands(program, model, gone, plan)
        calls, dead = without(program, gone)
        return cls(tuple(calls), frozenset(dead), places, known)

    def constant(self, arrival: Arrival, share: Share, alone: Collection[int] = ()) -> Tensor:
        """What is left of a branch: 0, or for one that becomes a constant `E[y + skip − skip']` of each channel.

        The mean is over all positions of the samples that are fitted on, and takes up the mean of what the skip branch
        lost before.

        Args:
            arrival: State of the walk at the branch's value `y`.
            share: The micro-batches.
            alone: Numbers of rows that the last layer sees of one sample alone; empty where they are not known.
        """
        branch = self.branches[arrival.call.path]
        first: Tensor = arrival.outputs[0]
        shape = [1] * (branch.axes + 1)
        if not self.places[branch.name]:
            return first.new_zeros(shape)
        axis = -1 - branch.axes
        total = torch.zeros(branch.channels + 1, dtype=torch.float64, device=first.device)
        for index, output in enumerate(arrival.outputs):
            target = output.double()
            if arrival.skip is not None and not arrival.skip.same:
                target = target + arrival.skip.original[index].double() - arrival.skip.compressed[index].double()
            fitted = share.labels_of(index, len(target), alone) != HELD
            target = target[fitted.to(target.device)]
            own = target.movedim(axis, -1).reshape(-1, branch.channels)
            total[:-1] += own.sum(0)
            total[-1] += len(own)
        share.world.sum_([total])
        return (total[:-1] / total[-1].clamp_min(1)).to(first.dtype).reshape(-1, *[1] * branch.axes)


def _check_stands(program: ExportedProgram, model: nn.Module, gone: Sequence[Branch], plan: Plan) -> None:
    """Refuse stands that are not those of the branches.

    Raises:
        PlanError: They are others; what differs is named.
    """
    for whole in (True, False):
        try:
            places = places_of_stands(program, gone, first_names(model), whole=whole)
        except BranchError as cause:
            raise PlanError(
                "branches", law="the branches can go", got=str(cause), cure="make the plan again"
            ) from cause
        constants = {name: places.constants.get(name, "") for name in (branch.name for branch in gone)}
        stands = {*places.bypasses, *places.constants.values()}
        if stands == set(plan.stands) and all(plan_at == constants[n] for n, plan_at in _constants(plan).items()):
            return
    raise PlanError(
        "stands",
        law="stands in the place of what goes with the branches, and of nothing else",
        got=f"stands at {', '.join(plan.stands)} where the branches leave {', '.join(sorted(stands))}",
        cure="make the plan again",
    )


def _constants(plan: Plan) -> dict[str, str]:
    return {decision.branch: decision.constant for decision in plan.branches}

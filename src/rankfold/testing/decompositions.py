"""Laws that every decomposition keeps, as cases that a method of your own inherits.

The laws of one canonical weight are here, those of the layers made from it in `rankfold.testing.shells`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise, permutations
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from rankfold.decompositions import Decomposition, Moments
from rankfold.errors import DataError, RankfoldError
from rankfold.factors import Rank
from rankfold.layers import Geometry, forms, stages
from rankfold.linalg.spectrum import weighted_energy
from rankfold.registry import from_json, to_json
from rankfold.testing.devices import generator_states, same_states
from rankfold.testing.matrices import MOMENTS, SHAPES, hard_weight, moments_of_weight, toy_weight


class WeightLaws:
    """Laws of one canonical weight; see `DecompositionConformance` for the attributes."""

    method: ClassVar[Decomposition]
    shapes: ClassVar[Sequence[tuple[int, ...]]] = SHAPES
    variations: ClassVar[Mapping[str, object]] = {}
    idle: ClassVar[frozenset[str]] = frozenset()
    tolerance: ClassVar[float] = 1e-8

    def cases(self) -> list[tuple[int, ...]]:
        """The shapes that the method has a case for."""
        return [shape for shape in self.shapes if self.method.refuses(shape) is None]

    def metric(self, moments: Moments, features: int) -> Tensor:
        """The Gram that the method's `errors` are measured in; override it where yours has another.

        Args:
            moments: Moments of the inputs.
            features: Length n of a flattened patch.

        Returns:
            The Gram, shape (n, n): the identity for a method that does not read "input-gram", else `moments.metric`
            with the method's `damping` (if it has such an option) times its mean eigenvalue added; the identity if it
            is zero.
        """
        identity = torch.eye(features, dtype=torch.float64)
        if "input-gram" not in self.method.needs:
            return identity
        gram = moments.metric(self.method)
        mean = gram.trace() / features
        identity = identity.to(gram)
        return gram + getattr(self.method, "damping", 0.0) * mean * identity if float(mean) > 0 else identity

    def measured(self, weight: Tensor, rank: Rank, moments: Moments) -> float:
        """Relative squared error of `decompose(…).reconstruct()` in the metric; 0 for a weight without energy.

        Where the method has an `output_metric` `G`, the energy of a map `M` is `tr(G M A Mᵀ)`.
        """
        flat = weight.double().flatten(1)
        metric = self.metric(moments, flat.shape[1]).to(flat)
        lost = flat - self.method.decompose(weight, rank, moments).reconstruct().double().flatten(1)
        if (felt := self.method.output_metric(moments)) is not None:
            root = torch.linalg.cholesky(felt.to(flat)).mT
            flat, lost = root @ flat, root @ lost
        total = float(weighted_energy(flat, metric))
        return float(weighted_energy(lost, metric)) / total if total > 0 else 0.0

    def test_it_has_a_case_among_the_shapes(self) -> None:
        """A method that refuses every shape would pass every other law without being looked at."""
        refused = [self.method.refuses(shape) for shape in self.shapes]
        assert any(reason is None for reason in refused)
        assert all(reason is None or reason for reason in refused)

    def test_its_form_is_known_to_the_shells(self) -> None:
        """The form names a way to build layers."""
        assert self.method.form in forms()

    def test_it_survives_json(self) -> None:
        """The method's registered name and its options give an equal method back."""
        again = from_json(to_json(self.method), Decomposition, place="test")
        assert again == self.method
        assert type(again) is type(self.method)

    def test_it_is_frozen(self) -> None:
        """The options of a method cannot be changed after it was made."""
        name = next((field.name for field in dataclasses.fields(self.method)), "anything")  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(self.method, name, None)

    def test_ranks_ascend_without_repetition(self) -> None:
        """Ranks are distinct, positive, and in order."""
        for shape in self.cases():
            ranks = self.method.ranks(shape)
            assert ranks, shape
            assert all(a < b for a, b in pairwise(ranks)), shape  # type: ignore[operator]
            assert all(part >= 1 for rank in ranks for part in (rank if isinstance(rank, tuple) else (rank,))), shape

    def test_full_rank_reconstructs(self, device: str) -> None:
        """The last candidate gives the weight back."""
        for shape in self.cases():
            weight = toy_weight(shape, device=device)
            factors = self.method.decompose(weight, self.method.ranks(shape)[-1], moments_of_weight(weight))
            lost = float((factors.reconstruct() - weight).abs().max())
            assert lost <= self.tolerance * float(weight.abs().max()), shape

    @pytest.mark.parametrize("bias", [False, True], ids=["bias-free", "bias"])
    def test_errors_equal_the_measured_ones(self, moments_kind: str, bias: bool, device: str) -> None:
        """`errors()` equals the loss of `decompose().reconstruct()` in the metric, at every rank looked at."""
        for shape in self.cases():
            weight = toy_weight(shape, device=device)
            moments = moments_of_weight(weight, moments_kind, bias=bias)
            ranks = self.method.ranks(shape)
            errors = self.method.errors(weight, moments)
            assert errors.shape == (len(ranks),), shape
            for index in spread(len(ranks)):
                measured = self.measured(weight, ranks[index], moments)
                assert float(errors[index]) == pytest.approx(measured, rel=1e-6, abs=self.tolerance), (shape, index)

    def test_error_never_grows_with_rank(self, device: str) -> None:
        """Neither the announced nor the measured error grows; each is 1 at most and ends at 0.

        Of two ranks that are tuples, the larger is the one that is larger or equal in every part.
        """
        for shape in self.cases():
            weight = toy_weight(shape, device=device)
            moments = moments_of_weight(weight)
            ranks = self.method.ranks(shape)
            announced = dict(zip(ranks, self.method.errors(weight, moments).tolist(), strict=True))
            looked_at = [ranks[index] for index in spread(len(ranks), most=12)]
            measured = {rank: self.measured(weight, rank, moments) for rank in looked_at}
            for curve in (announced, measured):
                assert grown(curve, self.tolerance) == [], shape
                assert max(curve.values()) <= 1 + self.tolerance, shape
                assert curve[ranks[-1]] == pytest.approx(0, abs=self.tolerance), shape

    def test_refining_never_adds_error(self, device: str) -> None:
        """`refine` keeps form and rank, and the measured error does not grow."""
        for shape in self.cases():
            weight = toy_weight(shape, device=device)
            moments = moments_of_weight(weight)
            flat = weight.flatten(1)
            metric = self.metric(moments, flat.shape[1]).to(flat)
            ranks = self.method.ranks(shape)
            for rank in (ranks[index] for index in spread(len(ranks))):
                plain = self.method.decompose(weight, rank, moments)
                refined = self.method.refine(plain, weight, moments)
                assert (refined.form, refined.ranks) == (plain.form, rank)
                before, after = (
                    weighted_energy(flat - factors.reconstruct().flatten(1), metric) for factors in (plain, refined)
                )
                total = float(weighted_energy(flat, metric))
                assert float(after) <= float(before) + self.tolerance * total, (shape, rank)

    def test_factors_have_the_form_and_rank_asked_for(self, device: str) -> None:
        """The stages of the factors have the shapes of the layers that the shell is built of."""
        for shape in self.cases():
            weight = toy_weight(shape, device=device)
            moments = moments_of_weight(weight)
            out, inputs, *kernel = shape
            ones = (1,) * len(kernel)
            dense = Geometry(inputs, out, tuple(kernel), ones, (0,) * len(kernel), ones)
            for rank in self.method.ranks(shape):
                factors = self.method.decompose(weight, rank, moments)
                parts = stages(dense, self.method.form, rank)
                assert factors.form == self.method.form
                assert factors.ranks == rank
                shapes = [(part.outputs, *part.canonical_shape[1:]) for part in parts]  # a stage may have groups
                assert [tuple(stage.shape) for stage in factors.stages()] == shapes
                assert factors.n_params == sum(part.n_weights for part in parts)

    def test_dtype_and_device_are_kept(self, device: str) -> None:
        """Factors come in the weight's dtype, on its device."""
        for shape in self.cases():
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                weight = toy_weight(shape, device=device).to(dtype)
                factors = self.method.decompose(weight, self.method.ranks(shape)[0], moments_of_weight(weight))
                assert {(stage.dtype, stage.device) for stage in factors.stages()} == {(dtype, weight.device)}

    def test_no_storage_is_shared(self, device: str) -> None:
        """No stage lives in the memory of the inputs or of another stage; the inputs keep their bits."""
        for shape in self.cases():
            weight = toy_weight(shape, device=device)
            moments = moments_of_weight(weight)
            kept = [weight, *(m for m in (moments.gram, moments.mean, moments.output_gram) if m is not None)]
            copies = [tensor.clone() for tensor in kept]
            parts = self.method.decompose(weight, self.method.ranks(shape)[-1], moments).stages()
            owners = [tensor.untyped_storage().data_ptr() for tensor in (*kept, *parts)]
            assert len(set(owners)) == len(owners), shape
            assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts), shape
            assert all(part.is_contiguous() and not part.requires_grad for part in parts), shape
            assert all(torch.equal(tensor, copy) for tensor, copy in zip(kept, copies, strict=True)), shape

    def test_same_input_gives_same_bits(self, device: str) -> None:
        """Two calls give the same bits, and the global generators are not touched."""
        for shape in self.cases():
            weight = toy_weight(shape, device=device)
            moments = moments_of_weight(weight)
            rank = self.method.ranks(shape)[0]
            before = generator_states()
            first, second = (self.method.decompose(weight, rank, moments).stages() for _ in range(2))
            errors = [self.method.errors(weight, moments) for _ in range(2)]
            assert same_states(before, generator_states()), shape
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), shape
            assert torch.equal(*errors), shape

    def test_finite_on_hard_inputs(self, weight_kind: str, device: str) -> None:
        """Zero, rank-deficient, scaled, half, flat and ill-conditioned weights give finite factors on all moments."""
        for shape in self.cases():
            weight = hard_weight(weight_kind, shape, device=device)
            if self.method.refuses(weight.shape) is not None:
                continue
            ranks = self.method.ranks(weight.shape)
            for kind in MOMENTS if self.method.needs else MOMENTS[:1]:
                moments = moments_of_weight(weight, kind, bias=kind != "zero")
                errors = self.method.errors(weight, moments)
                assert bool(((errors >= 0) & (errors <= 1)).all()), (shape, kind)
                assert grown(dict(zip(ranks, errors.tolist(), strict=True)), self.tolerance) == [], (shape, kind)
                for index in {0, len(ranks) - 1}:
                    factors = self.method.decompose(weight, ranks[index], moments)
                    narrow = [stage if stage.dtype == torch.float16 else stage.float() for stage in factors.stages()]
                    assert all(bool(torch.isfinite(stage).all()) for stage in narrow), (shape, kind, index)

    @pytest.mark.parametrize("rank", [0, -1, 10**6, True, 1.5, None], ids=str)
    def test_a_rank_that_is_no_candidate_is_refused(self, rank: Any, device: str) -> None:
        """The method refuses the rank with an error of rankfold's that names the range."""
        shape = self.cases()[0]
        weight = toy_weight(shape, device=device)
        with pytest.raises(RankfoldError):
            self.method.decompose(weight, rank, moments_of_weight(weight))

    def test_missing_moments_are_named(self, device: str) -> None:
        """A method that reads moments raises an error where there are none; one that does not works without."""
        shape = self.cases()[0]
        weight = toy_weight(shape, device=device)
        rank = self.method.ranks(shape)[0]
        if self.method.needs:
            with pytest.raises(DataError):
                self.method.decompose(weight, rank, Moments())
            with pytest.raises(DataError):
                self.method.errors(weight, Moments())
        else:
            assert self.method.decompose(weight, rank, Moments()).ranks == rank
            assert len(self.method.errors(weight, Moments())) == len(self.method.ranks(shape))

    def test_every_option_changes_something(self, option: str) -> None:
        """Another value of the option gives another form, other needs, other ranks or other factors."""
        value = getattr(self.method, option)
        if option in self.variations:
            other = self.variations[option]
        elif isinstance(value, bool):
            other = not value
        elif isinstance(value, int):
            other = value + 1
        elif isinstance(value, float):
            other = 0.5 if value != 0.5 else 0.25
        else:
            raise TypeError(f"name another value of {option!r} in `variations`")
        changed = dataclasses.replace(self.method, **{option: other})  # type: ignore[type-var]
        assert any(_differ(self.method, changed, shape) for shape in self.shapes)


def _differ(first: Decomposition, second: Decomposition, shape: tuple[int, ...]) -> bool:
    if (first.refuses(shape) is None) != (second.refuses(shape) is None):
        return True
    if first.refuses(shape) is not None:
        return False
    if (first.form, first.needs, first.ranks(shape)) != (second.form, second.needs, second.ranks(shape)):
        return True
    weight = toy_weight(shape)
    moments = moments_of_weight(weight)
    rank = first.ranks(shape)[0]
    made = (method.refine(method.decompose(weight, rank, moments), weight, moments) for method in (first, second))
    stages_of_both = (factors.stages() for factors in made)
    return any(not torch.equal(a, b) for a, b in zip(*stages_of_both, strict=True))


def grown(curve: Mapping[Rank, float], tolerance: float) -> list[tuple[Rank, Rank]]:
    """Pairs of ranks, the second nowhere smaller, at which the error is larger at the second."""
    parts = {rank: rank if isinstance(rank, tuple) else (rank,) for rank in curve}
    return [
        (small, large)
        for small, large in permutations(curve, 2)
        if curve[large] > curve[small] + tolerance
        and all(a <= b for a, b in zip(parts[small], parts[large], strict=True))
    ]


def spread(count: int, *, most: int = 6) -> list[int]:
    """At most `most` indices below `count`, evenly spread, the first and last among them."""
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})

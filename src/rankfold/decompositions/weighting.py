"""Output weighting: any method, in the metric in which a site's error changes the network's output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rankfold.decompositions._base import Decomposition, Moments, judged_energy
from rankfold.factors import Factors, Rank
from rankfold.linalg.precision import widen
from rankfold.linalg.whitening import cholesky, damped_gram

OUTPUT_DAMPING = 0.05  # relative damping of the gradient Gram: no output direction is free


def factorise(method: Decomposition, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
    """Decompose and refine in the metric of inputs and outputs: `F⁻¹ · decompose(F W)` with `FᵀF = G + λI`.

    A method that minimises `E‖(W − Ŵ)x‖²` then minimises `E‖F(W − Ŵ)x‖²`, the error in the metric `G + λI`. The output
    axis belongs to the last stage in every form, so undoing the weighting changes neither form nor rank. Methods that
    read no statistics, those that weight outputs themselves, and sites without a gradient Gram, are decomposed as they
    are.

    Args:
        method: The method.
        weight: Canonical weight of one group, shape (out, in, kernel…).
        rank: The rank.
        moments: Moments of the same group.
    """
    if moments.gradient_gram is None or not _is_mixed(method):
        return method.refine(method.decompose(weight, rank, moments), widen(weight), moments)
    root = output_root(moments.gradient_gram.to(widen(weight)))
    mixed = _mix(root, widen(weight))
    factors = method.refine(method.decompose(mixed, rank, moments), mixed, moments)
    eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
    return factors.mixed(torch.linalg.solve_triangular(root, eye, upper=True))


def output_errors(
    method: Decomposition, weight: Tensor, moments: Moments, judge: Moments | None = None
) -> tuple[Tensor, float]:
    """Relative errors of a method at its ranks, and the energy they are relative to.

    Args:
        method: The method.
        weight: Canonical weight of one group.
        moments: Moments that the method reads.
        judge: Moments that the errors are measured in; None is `moments`, whose `G` is also used where it has none.

    Returns:
        Errors of shape (ranks,), and `tr(G W A Wᵀ)`, `A` the metric of the judge; without a gradient Gram `G = I`,
        without an input Gram `A = I`. Whatever moments a method reads, all are measured in that one metric.
    """
    weight = widen(weight)
    fitted = None if moments.gradient_gram is None else moments.gradient_gram.to(weight)
    felt = fitted if judge is None or judge.gradient_gram is None else judge.gradient_gram.to(weight)
    felt = None if felt is None else damped_gradients(felt)
    if fitted is not None and _is_mixed(method):  # as `factorise` decomposes it: the mixed weight
        root = output_root(fitted)
        weight = _mix(root, weight)
        felt = None if judge is None else _mixed_metric(root, felt)
    measured = replace(moments if judge is None else judge, gradient_gram=felt)
    energy = float(judged_energy(weight.flatten(1), measured, method))
    if judge is None and "input-gram" in method.needs and _is_mixed(method):
        return method.errors(weight, moments), energy
    if measured.gram is None and felt is None:
        return method.errors(weight, moments), energy
    return method.judged_errors(weight, moments, measured), energy


def _is_mixed(method: Decomposition) -> bool:
    """Whether a method decomposes the weight in the metric of the outputs."""
    return bool(method.needs) and "gradient-gram" not in method.needs


def output_root(gradient_gram: Tensor) -> Tensor:
    """Upper triangular `F` with `FᵀF = G + λI`.

    Any such `F` is the symmetric root times a rotation of the outputs, which no method that minimises a norm notices;
    this one costs a tenth of the eigenvectors.
    """
    return cholesky(damped_gradients(gradient_gram)).mT


def damped_gradients(gradient_gram: Tensor) -> Tensor:
    """`G + λI`: the metric in which outputs are weighted."""
    return damped_gram(gradient_gram, damping=OUTPUT_DAMPING)


def _mix(matrix: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("po,o...->p...", matrix, weight)


def _mixed_metric(root: Tensor, felt: Tensor | None) -> Tensor | None:
    """`F⁻ᵀ G F⁻¹`: the metric of mixed outputs in which `F y` costs what `y` costs in `G`."""
    if felt is None:
        return None
    eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, eye, upper=True)
    mixed: Tensor = inverse.mT @ felt @ inverse
    return mixed

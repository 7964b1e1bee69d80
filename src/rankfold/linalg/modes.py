"""Tensors seen mode by mode: unfoldings, bases, and the metric of a patch as one of each of its modes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from rankfold.linalg.precision import power_of_two_scale
from rankfold.linalg.projection import LEAST_DAMPING
from rankfold.linalg.svd import svd
from rankfold.linalg.whitening import cholesky, damped_gram, square_root


def unfolded(tensor: Tensor, mode: int) -> Tensor:
    """A tensor as the matrix whose rows are one of its modes: n_mode × the rest."""
    return tensor.movedim(mode, 0).flatten(1)


def times(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Product along a mode, `T ×_mode M`: that mode's entries become `M` (r × n) times themselves."""
    return torch.movedim(torch.tensordot(matrix, tensor, ([1], [mode])), 0, mode)


def basis(tensor: Tensor, mode: int) -> Tensor:
    """Left singular vectors of the unfolding along a mode, most important first, shape (n, min(n, rest))."""
    return svd(unfolded(tensor, mode))[0]


def marginal(gram: Tensor, sizes: Sequence[int], mode: int) -> Tensor:
    """Mean second moment of one mode of a patch: `Ā[i, j] = mean over the other modes m of A[(i, m), (j, m)]`.

    Args:
        gram: Second moment `A` of whole patches, shape (N, N), `N` the product of the sizes.
        sizes: Sizes of the modes of a patch.
        mode: Index of the mode.
    """
    before, n, after = prod(sizes[:mode]), sizes[mode], prod(sizes[mode + 1 :])
    split = gram.reshape(before, n, after, before, n, after)
    return torch.einsum("biabja->ij", split) / (before * after)


def mode_roots(gram: Tensor, sizes: Sequence[int], *, damping: float) -> list[tuple[Tensor, Tensor]]:
    """Square root and inverse root of the marginal moment of every mode of a patch.

    `A ≈ c ⊗_m Ā_m`: the moment of a whole patch couples all its entries, that of each mode can be divided out of a
    tensor without changing its form. Modes of size 1 give ones.

    Args:
        gram: Second moment `A` of whole patches, shape (N, N).
        sizes: Sizes of the modes of a patch.
        damping: Relative damping of each marginal moment; at least 1e-12 is used.
    """
    scaled = gram / power_of_two_scale(gram)
    level = max(damping, LEAST_DAMPING)
    return [square_root(marginal(scaled, sizes, mode), damping=level) for mode in range(len(sizes))]


def whitened(tensor: Tensor, roots: Sequence[tuple[Tensor, Tensor]], first: int = 1) -> Tensor:
    """A tensor multiplied along the modes of a patch by the roots of `mode_roots`.

    Args:
        tensor: The tensor.
        roots: Root and inverse root of each mode of a patch.
        first: Position of the first of these modes.
    """
    for mode, (root, _) in enumerate(roots, first):
        tensor = times(tensor, root, mode)
    return tensor


class PatchMetric:
    """The metric in which a map on patches is judged and its last stage is solved: `A + λI = LLᵀ`.

    Args:
        gram: Second moment `A` of the patches, shape (N, N); None is the identity.
        weight: Map `W` that is approximated, shape (out, N).
        damping: Relative damping; at least 1e-12 is used.
    """

    def __init__(self, gram: Tensor | None, weight: Tensor, *, damping: float) -> None:
        self._scale = power_of_two_scale(weight)
        self._root = None
        if gram is not None:
            self._root = cholesky(damped_gram(gram / power_of_two_scale(gram), damping=max(damping, LEAST_DAMPING)))
        self._target = self._seen(weight / self._scale)
        self.total = self._target.square().sum()

    def _seen(self, rows: Tensor) -> Tensor:
        return rows if self._root is None else rows @ self._root

    def error(self, approximation: Tensor) -> float:
        """Relative squared error of a map of shape (out, N); 0 for a target without energy."""
        if not float(self.total) > 0:
            return 0.0
        return float((self._target - self._seen(approximation / self._scale)).square().sum() / self.total)

    def projected(self, rows: Tensor) -> Tensor:
        """The target in orthonormal coordinates of the rows of a map, which fill up in their order.

        With `M L = R Q`, `Q` with orthonormal rows, `W L Qᵀ`: what its first columns hold is what the first rows of
        the map can explain. Rows that are combinations of earlier ones explain nothing.

        Args:
            rows: Map `M` of a patch to the inputs of the last stage, shape (r, N).

        Returns:
            Shape (out, r), on the scale of `total`.
        """
        return self._solved(rows)[0]

    def refit(self, rows: Tensor) -> Tensor:
        """The best last stage behind a map: `O = W A Mᵀ (M A Mᵀ)⁺`, shape (out, r).

        Args:
            rows: Map `M`, shape (r, N).
        """
        projected, triangle, lengths = self._solved(rows)
        solution: Tensor = torch.linalg.solve_triangular(triangle, projected.mT, upper=True).mT
        return solution / lengths * self._scale

    def _solved(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`W L Qᵀ`, the triangle `R` of `M L = Rᵀ Q`, and the lengths of the rows that `M` is taken without.

        By QR and not by the Gram of the rows, whose condition is the square of theirs. A row that depends on earlier
        ones gets nothing.
        """
        own = self._seen(rows)
        lengths = torch.linalg.vector_norm(own, dim=1)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        q, r = torch.linalg.qr((own / lengths[:, None]).mT)
        alive = r.diagonal().abs() > len(r) * torch.finfo(r.dtype).eps
        triangle = r * alive[:, None]
        triangle.diagonal().add_(~alive)
        return (self._target @ q) * alive, triangle, lengths

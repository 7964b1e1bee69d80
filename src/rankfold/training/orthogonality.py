"""A penalty that keeps the columns of a weight orthonormal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rankfold.checks import check_choice
from rankfold.errors import SiteError
from rankfold.layers import Adapter
from rankfold.training._base import Regularizer, unwrapped
from rankfold.training.forms import Overparameterized

KINDS = ("soft", "double", "spectral")
PARTS = ("outer", "all")
ITERATIONS = 5  # of the power iteration of the spectral kind


class Orthogonality(Regularizer):
    """`R(W) = ‖WᵀW − I‖_F²` on the smaller side of the matrix `out × (in·k…)`.

    Args:
        weight: See `Regularizer`.
        kind: "soft": the above. "double": `‖WᵀW − I‖_F² + ‖WWᵀ − I‖_F²`. "spectral" (SRIP): the largest absolute
            eigenvalue of `WᵀW − I`, by five steps of a power iteration from a fixed start.
        of: "outer": the first and last layer of what `overparameterize` made; "all": every layer.
        share: See `Regularizer`.
        only: See `Regularizer`.
        exclude: See `Regularizer`.

    References:
        He, Jiang, Wu, arXiv 2408.16289, for outer factors; Bansal, Chen, Wang, NeurIPS 2018, for the three kinds. We
        differ in the smaller side, on which alone all columns can be orthonormal.
    """

    def __init__(
        self,
        weight: float | None = None,
        *,
        kind: str = "soft",
        of: str = "outer",
        share: float | None = None,
        only: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(weight, share=share, only=only, exclude=exclude)
        check_choice("Orthogonality.kind", kind, KINDS)
        check_choice("Orthogonality.of", of, PARTS)
        self.kind, self.of = kind, of

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
        """See `Regularizer.layers`.

        Raises:
            SiteError: Outer factors are asked for, and the model has none.
        """
        if self.of == "all":
            yield from super().layers(model)
            return
        outer = {
            id(layer)
            for module in unwrapped(model).modules()
            if isinstance(module, Overparameterized)
            for layer in module.outer()
        }
        if not outer:
            raise SiteError(
                "Orthogonality",
                law='of="outer" acts on the outer layers of what overparameterize made',
                got="a model without any",
                cure='call rankfold.training.overparameterize first, or use of="all"',
            )
        yield from (each for each in super().layers(model) if id(each[1]) in outer)

    def penalty(self, weight: Tensor) -> Tensor | None:
        """See `Regularizer.penalty`."""
        matrix = weight.flatten(2)
        tall = matrix if matrix.shape[1] >= matrix.shape[2] else matrix.mT  # (groups, rows, columns)
        rest = _from_identity(tall.mT @ tall)
        if self.kind == "spectral":
            return _spectral_norm(rest).sum()
        energy = rest.square().sum()
        return energy + _from_identity(tall @ tall.mT).square().sum() if self.kind == "double" else energy


def _from_identity(gram: Tensor) -> Tensor:
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _spectral_norm(symmetric: Tensor) -> Tensor:
    """Largest absolute eigenvalue of each symmetric matrix of a batch, from below."""
    generator = torch.Generator().manual_seed(symmetric.shape[-1])
    vector = torch.randn(symmetric.shape[-1], 1, generator=generator, dtype=torch.float64).to(symmetric)
    for _ in range(ITERATIONS - 1):
        vector = symmetric.detach() @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(1e-30))
    unit = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(1e-30)
    norms: Tensor = torch.linalg.vector_norm(symmetric @ unit, dim=(-2, -1))
    return norms

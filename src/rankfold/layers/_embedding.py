"""Embeddings: a table of vectors, each looked up as often as it occurs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankfold.factors import Factors, MatrixFactors, PivotedFactors
from rankfold.layers._base import Operator, adapts
from rankfold.layers._linear import LinearAdapter
from rankfold.layers.forms import ends_of
from rankfold.layers.geometry import Geometry, Table, tensor
from rankfold.linalg.precision import widen


@adapts(nn.Embedding)
class EmbeddingAdapter(LinearAdapter):
    """`nn.Embedding`: `y = I e`, `e` the vector of a token, with `I` (d × d) as canonical weight.

    Its inputs are the vectors as often as their tokens occur, so what is often read is kept best, and a token that the
    calibration data does not hold is projected like the others. Factors `L R` of `I` become a table `E Rᵀ` (V × r) and
    a linear layer `L` (d × r); by pivots, r entries of each vector are kept (V × r), and a table (d − r) × r tells the
    others.
    """

    kind = "embedding"
    weight_axes = (1, 0)
    operators = (Operator("embedding", data=1, weight=0),)

    def geometry(self, layer: nn.Module) -> Geometry:
        """The identity behind a table."""
        own = _embedding(layer)
        rows, width = own.weight.shape
        table = Table(rows, own.padding_idx, own.scale_grad_by_freq, own.sparse)
        return Geometry(width, width, table=table)

    def canonical(self, layer: nn.Module) -> Tensor:
        """(1, d, d), the identity."""
        weight = tensor(layer, "weight")
        return torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)[None]

    def read(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """The vectors of the tokens."""
        return nn.functional.embedding(inputs, tensor(layer, "weight"))

    def rewrite(self, layer: nn.Module, groups: Tensor) -> None:
        """Multiply a map into the table: `E ← E Wᵀ`."""
        weight = tensor(layer, "weight")
        weight.copy_(widen(weight) @ widen(groups).reshape(weight.shape[1], -1).mT)

    def stored(self, layer: nn.Module, groups: Sequence[Factors]) -> Sequence[Factors]:
        """`L R` of the identity as `L (R Eᵀ)`."""
        table, geometry = widen(tensor(layer, "weight")), self.geometry(layer)
        return [_through(factors, table, geometry) for factors in groups]

    def bias(self, layer: nn.Module) -> Tensor | None:
        """None."""
        return None

    def resize(self, layer: nn.Module) -> None:
        """Update `embedding_dim`."""
        own = _embedding(layer)
        own.embedding_dim = own.weight.shape[1]


def _through(factors: Factors, table: Tensor, geometry: Geometry) -> Factors:
    """Factors whose first stage is multiplied with a table (V × d)."""
    if isinstance(factors, PivotedFactors):
        return PivotedFactors(_through(factors.base, table, geometry), ends_of(geometry, factors.base.form))
    if not isinstance(factors, MatrixFactors):
        raise TypeError(f"factors of a table are no {type(factors).__name__}")
    return replace(factors, left=widen(factors.left), right=widen(factors.right) @ table.mT)


def _embedding(layer: nn.Module) -> nn.Embedding:
    if not isinstance(layer, nn.Embedding):
        raise TypeError(f"{type(layer).__name__} is no embedding")
    return layer

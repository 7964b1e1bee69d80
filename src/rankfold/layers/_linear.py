"""Linear layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from rankfold.layers._base import Adapter, Operator, adapts
from rankfold.layers.geometry import Geometry, tensor


@adapts(nn.Linear)
class LinearAdapter(Adapter):
    """`nn.Linear`, and transformers' `Conv1D`, whose weight is stored in × out."""

    kind = "linear"
    operators: ClassVar[tuple[Operator, ...]] = (Operator("linear"), Operator("addmm", data=1, weight=2, bias=0))

    def geometry(self, layer: nn.Module) -> Geometry:
        """A geometry without kernel, of one group."""
        _, out, inputs = self.canonical(layer).shape
        return Geometry(inputs, out, bias=self.bias(layer) is not None)

    def canonical(self, layer: nn.Module) -> Tensor:
        """(1, out, in)."""
        return tensor(layer, "weight").unsqueeze(0)

    def sample_size(self, layer: nn.Module, inputs: Tensor) -> tuple[tuple[int, ...], int]:
        """A linear layer has no spatial axes; its positions are all axes but the last."""
        return (), inputs.shape[:-1].numel()

    def patches(self, layer: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rows of the input."""
        if inputs.ndim < 3:  # one row, or one row per sample
            inputs = inputs.reshape(-1, 1, inputs.shape[-1])
        return _select(inputs.flatten(1, -2), positions).flatten(0, 1)[None]

    def outputs(self, layer: nn.Module, outputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rows of the output."""
        return self.patches(layer, outputs, positions)

    def resize(self, layer: nn.Module) -> None:
        """Update `in_features` and `out_features`."""
        _, layer.out_features, layer.in_features = self.canonical(layer).shape  # type: ignore[assignment]


@adapts("transformers.pytorch_utils.Conv1D")
class TransposedLinearAdapter(LinearAdapter):
    """transformers' `Conv1D`: `y = x W + b` with `W` stored in × out."""

    weight_axes = (1, 0)

    def canonical(self, layer: nn.Module) -> Tensor:
        """(1, out, in), a transposed view."""
        return tensor(layer, "weight").mT.unsqueeze(0)

    def resize(self, layer: nn.Module) -> None:
        """Update `nx` and `nf`."""
        _, layer.nf, layer.nx = self.canonical(layer).shape  # type: ignore[assignment]


def _select(rows: Tensor, positions: Tensor | None) -> Tensor:
    return rows if positions is None else rows[:, positions.to(rows.device)]

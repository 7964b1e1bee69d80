"""The only place that knows torch layer kinds."""

from rankfold.layers.adapters import Adapter, adapter_for, why_no_adapter
from rankfold.layers.calls import input_of
from rankfold.layers.geometry import Geometry, tensor
from rankfold.layers.resizing import resize
from rankfold.layers.shells import build_shell, dense_geometry, fill_shell, forms, stages

__all__ = [
    "Adapter",
    "Geometry",
    "adapter_for",
    "build_shell",
    "dense_geometry",
    "fill_shell",
    "forms",
    "input_of",
    "resize",
    "stages",
    "tensor",
    "why_no_adapter",
]

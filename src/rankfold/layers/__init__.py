"""The only package that depends on torch layer kinds."""

from rankfold.layers._base import Adapter, Operator, adapter_for, adapts, layer_operators, why_no_adapter
from rankfold.layers.calls import input_of
from rankfold.layers.carriers import places_of, resize
from rankfold.layers.forms import Form, form, form_of, forms, serves, stages
from rankfold.layers.geometry import Geometry, stage_weight, tensor
from rankfold.layers.pivoted import PivotedLayer
from rankfold.layers.shells import build_shell, chain_of, dense_geometry, fill_shell
from rankfold.layers.swapping import swap
from rankfold.loading import load_registering

__all__ = [
    "Adapter",
    "Form",
    "Geometry",
    "Operator",
    "PivotedLayer",
    "adapter_for",
    "adapts",
    "build_shell",
    "chain_of",
    "dense_geometry",
    "fill_shell",
    "form",
    "form_of",
    "forms",
    "input_of",
    "layer_operators",
    "places_of",
    "resize",
    "serves",
    "stage_weight",
    "stages",
    "swap",
    "tensor",
    "why_no_adapter",
]

load_registering(__name__, __path__)

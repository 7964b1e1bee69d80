"""Every reason to leave a layer alone, on the smallest model that gives it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rankfold as rf
from rankfold.errors import ModelError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def _reasons(model: nn.Module, example: Any = X) -> dict[str, str]:
    found = rf.find_sites(model.eval(), example)
    assert not {site.path for site in found} & {skip.path for skip in found.skips}
    return {skip.path: skip.reason for skip in found.skips}


def _pair(first: nn.Module, second: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, nn.ReLU(), second)


def _model(forward: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    """A module of parts with a forward."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)  # type: ignore[no-any-return]

    return Model()


def test_a_plain_layer_is_a_site_and_no_skip() -> None:
    found = rf.find_sites(nn.Sequential(nn.Linear(8, 8)), X)
    assert [site.path for site in found] == ["0"]
    assert found.skips == ()


def test_tied_weights_name_each_other() -> None:
    model = _pair(nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    assert _reasons(model) == {"0": "tied: the weight is also 2.weight", "2": "tied: the weight is also 0.weight"}


def test_an_embedding_tied_to_the_head_is_one_site_and_no_skip() -> None:
    model = _model(lambda self, x: self.head(self.table(x)), table=nn.Embedding(16, 8), head=nn.Linear(8, 16))
    model.head.weight = model.table.weight
    found = rf.find_sites(model, torch.arange(6).reshape(2, 3))
    assert [site.paths for site in found] == [("table", "head")]
    assert found.skips == ()


def test_an_embedding_tied_to_a_head_that_must_stay_rules_both_out() -> None:
    model = _model(
        lambda self, x: self.head(self.table(x)) + self.head.weight.mean(),
        table=nn.Embedding(16, 8),
        head=nn.Linear(8, 16),
    )
    model.head.weight = model.table.weight
    reasons = _reasons(model, torch.arange(6).reshape(2, 3))
    assert reasons["head"] == "tied: the weight is also table.weight"
    assert reasons["table"] == "tied: the weight is also head.weight"


def test_a_view_of_another_weight_is_tied() -> None:
    model = _pair(nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = nn.Parameter(model[0].weight.data)
    assert _reasons(model)["2"] == "tied: the weight is also 0.weight"


def test_a_shared_bias_is_tied() -> None:
    model = _pair(nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].bias = model[0].bias
    assert _reasons(model)["0"] == "tied: the weight is also 2.bias"


def test_parametrised_new_style() -> None:
    assert _reasons(_pair(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))) == {
        "0": "parametrised: the weight is computed from other tensors (remove the parametrisation first)"
    }


def test_a_removed_parametrisation_leaves_a_site() -> None:
    layer = parametrizations.orthogonal(nn.Linear(8, 8))
    parametrize.remove_parametrizations(layer, "weight")
    assert _reasons(nn.Sequential(layer)) == {}


def test_parametrised_old_style() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight, spectral = nn.utils.weight_norm(nn.Linear(8, 8)), nn.utils.spectral_norm(nn.Linear(8, 8))
    reasons = _reasons(_pair(weight, spectral))
    assert reasons["0"] == "parametrised: the weight is computed from bias, weight_g, weight_v"
    assert reasons["2"] == "parametrised: the weight is computed from bias, weight_orig"


def test_pruned_by_a_mask_is_parametrised() -> None:
    layer = nn.Linear(8, 8)
    prune.l1_unstructured(layer, "weight", 0.5)
    assert _reasons(nn.Sequential(layer))["0"] == "parametrised: the weight is computed from bias, weight_orig"


def test_a_lazy_layer_that_is_not_reached_is_skipped() -> None:
    model = _model(lambda self, x: self.body(x), body=nn.Linear(8, 8), spare=nn.LazyLinear(4))
    assert _reasons(model) == {"spare": "lazy: the weight has no shape yet, and the forward does not reach it"}
    assert isinstance(model.spare, nn.LazyLinear)


def test_a_lazy_layer_that_is_reached_is_refused_and_stays_lazy() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    hooks = list(model[1]._forward_pre_hooks.items())  # torch's own, which gives the weights their shape
    with pytest.raises(ModelError, match=r"'1' · every layer that the forward reaches has its weights · got a LazyLin"):
        rf.find_sites(model, X)
    assert isinstance(model[1], nn.LazyLinear)
    assert list(model[1]._forward_pre_hooks.items()) == hooks


def test_a_weight_that_is_a_method_is_packed() -> None:
    class Packed(nn.Module):
        def weight(self) -> Tensor:
            return torch.eye(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight())

    assert _reasons(_pair(Packed(), nn.Linear(8, 8))) == {"0": "quantised: the weight is packed"}


def test_a_weight_kept_as_an_integer_buffer_is_quantised() -> None:
    class Int8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.ones(8, 8, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.qweight.to(x.dtype))

    assert _reasons(nn.Sequential(Int8())) == {"0": "quantised: the weight is the buffer qweight of torch.int8"}


def test_a_weight_of_integers_is_quantised() -> None:
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    model = _model(lambda self, x: x @ self.fc.weight.float(), fc=layer)
    assert _reasons(model) == {"fc": "quantised: the weight is of torch.int8"}


def test_a_weight_of_a_tensor_subclass_is_left_alone() -> None:
    class Wrapped(Tensor):
        pass

    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Wrapped))
    assert _reasons(nn.Sequential(layer))["0"].startswith("quantised or sharded: the weight is a Wrapped")


def test_a_sparse_weight_is_left_alone() -> None:
    layer = nn.Linear(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        layer.weight = nn.Parameter(layer.weight.data.to_sparse_csr())
    assert _reasons(nn.Sequential(layer))["0"] == "unsupported: the weight is of torch.sparse_csr"


def test_weight_standardisation_in_a_subclass_is_unsupported() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    model = nn.Sequential(Standardised(3, 8, 3), nn.Conv2d(8, 8, 3))
    reasons = _reasons(model, torch.randn(2, 3, 8, 8))
    assert reasons == {"0": "unsupported: Standardised overrides the forward of nn.Conv2d"}


def test_weight_standardisation_by_the_parent_is_read_elsewhere() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.conv.weight
        return F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True)) + self.conv(x)

    model = _model(forward, conv=nn.Conv2d(3, 8, 3))
    reasons = _reasons(model, torch.randn(2, 3, 8, 8))
    assert reasons == {"conv": "read elsewhere: its weight is also read by the model's own code"}


@pytest.mark.parametrize("read", ["weight.dtype", "in_features", "bias is None"])
def test_a_parent_that_looks_inside_rules_the_layer_out(read: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        assert eval(f"self.fc.{read}") is not None
        return self.fc(x)  # type: ignore[no-any-return]

    name = read.split()[0].partition(".")[0]
    model = nn.Sequential(_model(forward, fc=nn.Linear(8, 8)))
    assert _reasons(model) == {"0.fc": f"read elsewhere: its {name} is also read by the code of '0'"}


def test_a_layer_called_with_another_keyword_is_left_alone() -> None:
    class Named(nn.Linear):
        pass

    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.pytorch_utils import Conv1D

    model = _model(lambda self, x: self.fc(x=x), fc=Conv1D(8, 8))
    assert _reasons(model)["fc"] == "read elsewhere: it is called with (x) where a replacement takes one plain tensor"


def test_code_that_refuses_a_replacement_is_found_layer_by_layer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not isinstance(self.picky, nn.Linear):
            raise TypeError("a linear layer is needed here")
        return self.easy(self.picky(x))  # type: ignore[no-any-return]

    found = rf.find_sites(_model(forward, picky=nn.Linear(8, 8), easy=nn.Linear(8, 8)), X)
    assert [site.path for site in found] == ["easy"]
    assert found.skips[0].reason == (
        "read elsewhere: the model fails with the layer replaced (TypeError: a linear layer is needed here)"
    )


def test_uncalled_layers_are_skipped() -> None:
    model = _model(lambda self, x: self.body(x), body=nn.Linear(8, 8), spare=nn.Linear(8, 8))
    assert _reasons(model) == {"spare": "not called: the forward on the example does not reach it"}


def test_a_layer_reached_through_a_list_is_skipped_since_a_replacement_would_not_be() -> None:
    model = _model(lambda self, x: self.held[0](x), body=nn.Linear(8, 8))
    model.held = [model.body]  # type: ignore[assignment]
    assert _reasons(model) == {"body": "not called: the forward on the example does not reach it"}


def test_attention_of_torch_that_cannot_be_split_is_skipped_whole() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_zero_attn=True)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0])  # type: ignore[no-any-return]

    found = rf.find_sites(Attends().eval(), torch.randn(2, 5, 8))
    assert [site.path for site in found] == ["out"]
    assert {skip.path: skip.kind for skip in found.skips} == {
        "attention": "unsupported",
        "attention.out_proj": "read elsewhere",
    }


def test_a_fused_encoder_layer_with_a_forward_of_its_own_is_left_alone_and_still_runs_after_compression() -> None:
    class Own(nn.TransformerEncoderLayer):
        def forward(self, *args: Any, **options: Any) -> Tensor:
            return super().forward(*args, **options)

    encoder = nn.TransformerEncoder(Own(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(8, 8), encoder, nn.Linear(8, 8)).eval()
    x = torch.randn(2, 5, 8)
    found = rf.find_sites(model, x)
    assert [site.path for site in found] == ["0", "2"]
    assert {skip.kind for skip in found.skips} == {"read elsewhere"}
    assert found.cost.macs == 5 * (2 * 8 * 8 + 4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    out = rf.compress(model, [x], budget=rf.Budget(params=0.95), repair=None)
    with torch.no_grad():
        assert out.model(x).shape == x.shape


def test_experts_as_three_dimensional_parameters_are_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eoi,bi->bo", self.up, x)

    assert _reasons(nn.Sequential(Experts())) == {"0": "unsupported: no adapter for layers of kind Experts"}


def test_hooks_on_a_layer_would_be_lost() -> None:
    model = _pair(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].register_forward_hook(lambda layer, args, output: None)
    model[2].register_full_backward_hook(lambda layer, gradients, outputs: None)
    assert {path: reason.partition(":")[0] for path, reason in _reasons(model).items()} == {
        "0": "hooked",
        "2": "hooked",
    }


def test_a_forward_given_to_one_layer_is_overridden() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = lambda x: F.relu(F.linear(x, model[0].weight))  # type: ignore[method-assign]
    assert _reasons(model) == {"0": "overridden: the layer has been given a forward of its own"}


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(8, 8, (3, 1), groups=8), nn.Conv2d(8, 8, 2, groups=8), nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1)],
    ids=["depthwise column", "depthwise", "to one", "from one"],
)
def test_no_room(layer: nn.Conv2d) -> None:
    reasons = _reasons(nn.Sequential(layer), torch.randn(2, layer.in_channels, 6, 6))
    assert reasons == {"0": "no room: no factorisation of rank 1 is smaller than the layer"}


def test_a_depthwise_square_has_room_in_the_spatial_form() -> None:
    assert _reasons(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), torch.randn(2, 8, 6, 6)) == {}


def test_layers_of_other_kinds_are_named_and_vectors_are_not() -> None:
    model = nn.Sequential(nn.EmbeddingBag(5, 8), nn.BatchNorm1d(8), nn.PReLU(8))
    assert _reasons(model, torch.ones(2, 3, dtype=torch.int64)) == {
        "0": "unsupported: no adapter for layers of kind EmbeddingBag"
    }


def test_a_parameter_of_the_root_itself_is_named() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(4, 8))
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.positions)  # type: ignore[no-any-return]

    assert _reasons(Positions()) == {"": "unsupported: no adapter for layers of kind Positions"}

"""`nn.TransformerEncoder` and `nn.TransformerDecoder` around layers whose attention is split."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SplitEncoder(nn.TransformerEncoder):
    """An `nn.TransformerEncoder` that calls its layers one after another, and never packs its inputs.

    In eval mode the original drops padded positions (a nested tensor) where its layers have a fused kernel, and fills
    them with zeros after the last layer. Those zeros are kept here, in each sample whose padding is at the end: what a
    pooling or a head computes of them is the same. (With gradients on, the original does not fill them.)

    Args:
        original: The module to replace; layers, norm, hooks and attributes are taken over.
    """

    def __init__(self, original: nn.TransformerEncoder) -> None:
        take_over(self, original)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Same as `nn.TransformerEncoder.forward`, without a look at the values of a mask to see if it is causal."""
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=bool(is_causal), src_key_padding_mask=src_key_padding_mask)
        if mask is None and src_key_padding_mask is not None and src.ndim == 3 and self._packs():
            output = _without_padding(output, src_key_padding_mask.bool())
        return output if self.norm is None else self.norm(output)

    def _packs(self) -> bool:
        """Whether the original would have packed its inputs."""
        fused = torch.backends.mha.get_fastpath_enabled() and not torch.is_autocast_enabled()
        return bool(getattr(self, "use_nested_tensor", False)) and fused and not self.layers[0].training


class SplitDecoder(nn.TransformerDecoder):
    """An `nn.TransformerDecoder` that does not look at the values of a mask, which no traced graph could follow.

    Args:
        original: The module to replace; layers, norm, hooks and attributes are taken over.
    """

    def __init__(self, original: nn.TransformerDecoder) -> None:
        take_over(self, original)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Same as `nn.TransformerDecoder.forward`; `tgt_is_causal=None` does not ask for a look at `tgt_mask`."""
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            bool(tgt_is_causal),
            memory_is_causal,
        )


def take_over(new: nn.Module, original: nn.Module) -> nn.Module:
    """Give a module the layers, hooks and attributes of another; neither sees what the other is given later."""
    nn.Module.__init__(new)
    for name, value in vars(original).items():
        vars(new)[name] = value.copy() if isinstance(value, (dict, set)) else value
    return new


def _without_padding(output: Tensor, hidden: Tensor) -> Tensor:
    """Zeros at the hidden positions (samples × positions) of each sample in which they are the last ones."""
    inside = (hidden[:, :-1] & ~hidden[:, 1:]).any(1, keepdim=True)
    return output.masked_fill((hidden & ~inside)[..., None], 0.0)

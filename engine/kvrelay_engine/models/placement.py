"""Where a model's weights lie: the same values on another device, projection by projection."""

from collections.abc import Callable
from dataclasses import replace

import torch

from kvrelay_engine.models.decoder import DecoderWeights, LayerWeights
from kvrelay_kernels.linear import LinearWeights

Copy = Callable[[torch.Tensor], torch.Tensor]


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked host memory, which a device reads at the full rate of its link."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def copied_weights(weights: DecoderWeights, copy: Copy) -> DecoderWeights:
    """Every tensor through `copy`: packed, quantised, scales, biases, norms."""
    return replace(
        weights,
        embedding=copy(weights.embedding),
        layers=tuple(_layer(layer, copy) for layer in weights.layers),
        final_norm=copy(weights.final_norm),
        head=_linear(weights.head, copy),
    )


def _layer(layer: LayerWeights, copy: Copy) -> LayerWeights:
    return replace(
        layer,
        input_norm=copy(layer.input_norm),
        qkv=_linear(layer.qkv, copy),
        query_norm=_optional(layer.query_norm, copy),
        key_norm=_optional(layer.key_norm, copy),
        output=_linear(layer.output, copy),
        post_attention_norm=copy(layer.post_attention_norm),
        gate_up=_linear(layer.gate_up, copy),
        down=_linear(layer.down, copy),
    )


def _linear(weights: LinearWeights, copy: Copy) -> LinearWeights:
    return replace(
        weights,
        data=copy(weights.data),
        scale=_optional(weights.scale, copy),
        bias=_optional(weights.bias, copy),
    )


def _optional(tensor: torch.Tensor | None, copy: Copy) -> torch.Tensor | None:
    return None if tensor is None else copy(tensor)

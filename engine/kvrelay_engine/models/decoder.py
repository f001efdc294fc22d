"""The fused decoder of the Llama-shaped families: embedding, layers, final norm, head.

    h = embed(tokens)
    for each layer:  h += attention(norm(h));  h += mlp(norm(h))
    logits = head(norm(h))

Query, key and value come from one projection, gate and up from another.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvrelay_engine.models.config import ModelConfig
from kvrelay_engine.models.rope import inverse_frequencies, rotary_angles
from kvrelay_kernels.kv_write import kv_write
from kvrelay_kernels.paged_attention import AttentionLayout, paged_attention
from kvrelay_kernels.rms_norm import add_rms_norm, rms_norm
from kvrelay_kernels.rotary import apply_rotary
from kvrelay_kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; `rows` are outputs, as in `torch.nn.functional.linear`."""

    input_norm: torch.Tensor
    """`[hidden]`."""
    qkv: torch.Tensor
    """`[(heads + 2 * kv_heads) * head_dim, hidden]`: query rows, key rows, value rows."""
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    """`[head_dim]`, of models that normalise each head."""
    key_norm: torch.Tensor | None
    output: torch.Tensor
    """`[hidden, heads * head_dim]`."""
    output_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    """`[2 * intermediate, hidden]`: gate rows, up rows."""
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    """`[hidden, intermediate]`."""
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All tensors of a model, on one device in one dtype."""

    embedding: torch.Tensor
    """`[vocabulary, hidden]`."""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: torch.Tensor
    """`[vocabulary, hidden]`; the embedding itself when tied."""


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Device inputs of one forward pass, packed without padding."""

    ids: torch.Tensor
    """`[tokens]` int64."""
    positions: torch.Tensor
    """`[tokens]` int64."""
    slots: torch.Tensor
    """`[tokens]` int64, where each token's KV goes."""
    layout: AttentionLayout


KVWritten = Callable[[int], None]
"""Called with the index of each layer once its KV is written, in order."""


class Decoder:
    """Stateless forward pass over a paged pool; the weights are never changed."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self._weights = weights
        self._frequencies = inverse_frequencies(config.rope).to(weights.embedding.device)
        self._scale = config.head_dim**-0.5

    def forward(
        self, packed: PackedTokens, kv: torch.Tensor, kv_written: KVWritten
    ) -> torch.Tensor:
        """Compute the hidden states of all tokens and write their KV.

        Args:
            packed: the step's inputs.
            kv: the pool, `[layers, 2, num_blocks, block_size, kv_heads, head_dim]`.
            kv_written: told about each layer before its attention runs.

        Returns:
            `[tokens, hidden]` before the final norm.
        """
        config, eps = self.config, self.config.rms_norm_eps
        cos, sin = rotary_angles(packed.positions, self._frequencies, config.rope.attention_factor)
        residual = functional.embedding(packed.ids, self._weights.embedding)
        pending: torch.Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            normed = (
                rms_norm(residual, layer.input_norm, eps)
                if pending is None
                else add_rms_norm(pending, residual, layer.input_norm, eps)
            )
            query, key, value = self._project(layer, normed)
            apply_rotary(query, key, cos, sin)
            kv_write(key, value, kv[index, 0], kv[index, 1], packed.slots)
            kv_written(index)
            attended = paged_attention(
                query,
                kv[index, 0],
                kv[index, 1],
                packed.layout,
                scale=self._scale,
                sliding_window=config.sliding_windows[index],
            )
            attended = functional.linear(attended.flatten(1), layer.output, layer.output_bias)
            normed = add_rms_norm(attended, residual, layer.post_attention_norm, eps)
            gated = silu_mul(functional.linear(normed, layer.gate_up, layer.gate_up_bias))
            pending = functional.linear(gated, layer.down, layer.down_bias)
        return residual if pending is None else residual.add_(pending)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token: `[rows, hidden]` to `[rows, vocabulary]`."""
        normed = rms_norm(hidden, self._weights.final_norm, self.config.rms_norm_eps)
        return functional.linear(normed, self._weights.head)

    def _project(
        self, layer: LayerWeights, normed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        fused = functional.linear(normed, layer.qkv, layer.qkv_bias)
        fused = fused.view(-1, heads + 2 * kv_heads, config.head_dim)
        query = fused[:, :heads]
        key, value = fused[:, heads : heads + kv_heads], fused[:, heads + kv_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            query = rms_norm(query, layer.query_norm, config.rms_norm_eps)
            key = rms_norm(key, layer.key_norm, config.rms_norm_eps)
        return query, key, value

"""The fused decoder of the Llama-shaped families: embedding, layers, final norm, head.

    h = embed(tokens)
    for each layer:  h += attention(norm(h));  h += mlp(norm(h))
    logits = head(norm(h))

Query, key and value come from one projection, gate and up from another. `Decoder.layers` is the one
description of a layer: it runs op by op, is recorded on a tape (CPU) or captured in a graph (CUDA).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvrelay_engine.models.config import ModelConfig
from kvrelay_engine.models.rope import inverse_frequencies, rotary_angles
from kvrelay_engine.models.workspace import Workspace
from kvrelay_kernels.linear import LinearWeights, linear
from kvrelay_kernels.paged_attention import AttentionLayout, paged_attention
from kvrelay_kernels.rms_norm import add_rms_norm, rms_norm
from kvrelay_kernels.rotary_kv_write import rotary_kv_write
from kvrelay_kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; norms are in the dtype of the activations."""

    input_norm: torch.Tensor
    """`[hidden]`."""
    qkv: LinearWeights
    """hidden to `(heads + 2 * kv_heads) * head_dim`: query rows, key rows, value rows."""
    query_norm: torch.Tensor | None
    """`[head_dim]`, of models that normalise each head."""
    key_norm: torch.Tensor | None
    output: LinearWeights
    """`heads * head_dim` to hidden."""
    post_attention_norm: torch.Tensor
    gate_up: LinearWeights
    """hidden to `2 * intermediate`: gate rows, up rows."""
    down: LinearWeights
    """intermediate to hidden."""

    @property
    def projections(self) -> tuple[LinearWeights, ...]:
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All tensors of a model, on one device."""

    embedding: torch.Tensor
    """`[vocabulary, hidden]`, any float dtype."""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: LinearWeights
    """hidden to vocabulary."""

    @property
    def activation_dtype(self) -> torch.dtype:
        return self.final_norm.dtype

    @property
    def step_bytes(self) -> int:
        """What one step reads of the weights, however few tokens it computes."""
        return self.head.nbytes + sum(
            weights.nbytes for layer in self.layers for weights in layer.projections
        )


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
    """The layers as ops over a workspace and a paged pool. Owns no state: the weights never change."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self._frequencies = inverse_frequencies(config.rope).to(weights.embedding.device)
        self._scale = config.head_dim**-0.5

    def begin(self, packed: PackedTokens, work: Workspace) -> None:
        """Fill in what the first layer reads: embedded tokens, rotary angles, slots."""
        embedded = functional.embedding(packed.ids, self.weights.embedding)
        work.residual.copy_(embedded)
        cos, sin = rotary_angles(
            packed.positions, self._frequencies, self.config.rope.attention_factor
        )
        work.cos.copy_(cos)
        work.sin.copy_(sin)
        work.slots.copy_(packed.slots)

    def layers(
        self, work: Workspace, layout: AttentionLayout, kv: torch.Tensor, kv_written: KVWritten
    ) -> None:
        """Compute all layers and write the KV of every row.

        Leaves `residual` and `projected`, whose sum is the hidden state before the final norm.

        Args:
            work: as `begin` left it; exactly the rows of the step.
            layout: which rows belong to which sequence.
            kv: the pool, `[layers, 2, num_blocks, block_size, kv_heads, head_dim]`.
            kv_written: told about each layer before its attention runs.
        """
        config, eps = self.config, self.config.rms_norm_eps
        for index, layer in enumerate(self.weights.layers):
            if index == 0:
                rms_norm(work.residual, layer.input_norm, eps, out=work.normed)
            else:
                add_rms_norm(work.projected, work.residual, layer.input_norm, eps, out=work.normed)
            linear(work.normed, layer.qkv, out=work.qkv.flatten(1))
            keys, values = kv[index, 0], kv[index, 1]
            rotary_kv_write(
                work.qkv,
                keys,
                values,
                work.slots,
                work.cos,
                work.sin,
                query_norm=layer.query_norm,
                key_norm=layer.key_norm,
                eps=eps,
            )
            kv_written(index)
            paged_attention(
                work.qkv[:, : config.num_heads],
                keys,
                values,
                layout,
                scale=self._scale,
                sliding_window=config.sliding_windows[index],
                out=work.attended,
            )
            linear(work.attended.flatten(1), layer.output, out=work.projected)
            add_rms_norm(
                work.projected, work.residual, layer.post_attention_norm, eps, out=work.normed
            )
            linear(work.normed, layer.gate_up, out=work.gate_up)
            silu_mul(work.gate_up, out=work.gated)
            linear(work.gated, layer.down, out=work.projected)

    def logits(self, work: Workspace, rows: torch.Tensor) -> torch.Tensor:
        """Scores of the next token of some rows, after `layers`.

        Args:
            work: the step's rows.
            rows: `[sampled]` int64.

        Returns:
            `[sampled, vocabulary]`.
        """
        projected = work.projected.index_select(0, rows)
        residual = work.residual.index_select(0, rows)
        normed = add_rms_norm(
            projected, residual, self.weights.final_norm, self.config.rms_norm_eps
        )
        return linear(normed, self.weights.head)

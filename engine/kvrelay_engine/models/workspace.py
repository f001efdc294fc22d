"""The activations of a step, in memory that every step uses again."""

from dataclasses import dataclass, fields
from typing import Self

import torch

from kvrelay_engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers for up to `capacity` tokens; a step uses the first rows of each.

    All are in the dtype of the activations unless noted.
    """

    residual: torch.Tensor
    """`[capacity, hidden]`."""
    normed: torch.Tensor
    """`[capacity, hidden]`: what the next projection reads."""
    qkv: torch.Tensor
    """`[capacity, heads + 2 * kv_heads, head_dim]`."""
    attended: torch.Tensor
    """`[capacity, heads, head_dim]`."""
    projected: torch.Tensor
    """`[capacity, hidden]`: what the next norm adds to the residual."""
    gate_up: torch.Tensor
    """`[capacity, 2 * intermediate]`."""
    gated: torch.Tensor
    """`[capacity, intermediate]`."""
    cos: torch.Tensor
    """`[capacity, angles]` float32, as is `sin`."""
    sin: torch.Tensor
    slots: torch.Tensor
    """`[capacity]` int64: where each token's KV goes."""

    @classmethod
    def allocate(
        cls, config: ModelConfig, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> Self:
        """Zeroed buffers: what has not been computed yet must not look like a number by chance."""

        def buffer(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros((capacity, *shape), dtype=kind, device=device)

        angles = config.rope.rotary_dim // 2
        return cls(
            residual=buffer(config.hidden_size),
            normed=buffer(config.hidden_size),
            qkv=buffer(config.num_heads + 2 * config.num_kv_heads, config.head_dim),
            attended=buffer(config.num_heads, config.head_dim),
            projected=buffer(config.hidden_size),
            gate_up=buffer(2 * config.intermediate_size),
            gated=buffer(config.intermediate_size),
            cos=buffer(angles, kind=torch.float32),
            sin=buffer(angles, kind=torch.float32),
            slots=buffer(kind=torch.int64),
        )

    @property
    def capacity(self) -> int:
        return self.residual.shape[0]

    def first(self, tokens: int) -> Self:
        """Views of the rows of one step."""
        return type(self)(*(getattr(self, field.name)[:tokens] for field in fields(self)))

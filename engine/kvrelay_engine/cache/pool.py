"""The tensors of the paged KV cache, and their wire layout. Indices belong to the allocator."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from kvrelay_engine.cache.sizing import kv_bytes_per_block
from kvrelay_engine.models.config import ModelConfig
from kvrelay_kernels.kv_gather import (
    digests_while_copying,
    kv_gather,
    kv_gather_digest,
    kv_scatter,
    kv_scatter_digest,
)


class KVPool:
    """One tensor for all layers; owns the memory for as long as it lives.

    The wire layout of a group of layers is `[layers, 2, blocks, block_size, kv_heads, head_dim]`,
    row-major, little endian, in the dtype of the pool: the pool's own order, restricted to the blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.num_layers = config.num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self.bytes_per_block = kv_bytes_per_block(config, block_size, dtype.itemsize)
        # Zeros, so that whole blocks put on the wire never carry what the memory held before.
        self.tensor = _zeros(
            (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim),
            dtype,
            device,
        )
        """`[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]`; keys first."""

    def wire_bytes(self, first_layer: int, end_layer: int, num_blocks: int) -> int:
        """Size of the wire layout of `num_blocks` blocks of the layers `[first_layer, end_layer)`."""
        return self.bytes_per_block // self.num_layers * (end_layer - first_layer) * num_blocks

    def gather(
        self,
        first_layer: int,
        end_layer: int,
        blocks: Sequence[int],
        out: memoryview | torch.Tensor,
        valid_tokens_in_last_block: int,
    ) -> bytes | None:
        """Write blocks of the layers `[first_layer, end_layer)` into `out` in the wire layout.

        The rows of the last block past `valid_tokens_in_last_block` are written as zeros, so equal
        tokens give equal bytes whatever the block held before. Returns when `out` is complete.

        Args:
            first_layer: first layer of the group.
            end_layer: one past its last layer.
            blocks: physical blocks, in the order of the sequence.
            out: writable host buffer of `wire_bytes(...)` bytes; a uint8 tensor or a memoryview.
                Pinned memory saves a copy on CUDA.
            valid_tokens_in_last_block: 1 to `block_size`.

        Returns:
            The digest of `out`, of `kvrelay_kernels.kv_gather`; None where it would take a second pass.

        Raises:
            ValueError: an index, a size or the buffer does not fit.
        """
        if not 1 <= valid_tokens_in_last_block <= self.block_size:
            raise ValueError(
                f"{valid_tokens_in_last_block} valid tokens in a block of {self.block_size}"
            )
        layers = self._layers(first_layer, end_layer)
        indices = self._indices(blocks)
        target = self._wire_view(out, layers, len(blocks))
        on_host = self.device.type == "cpu"
        staged = target if on_host else torch.empty_like(target, device=self.device)
        digest: bytes | None = None
        if digests_while_copying(layers):
            digest = kv_gather_digest(
                layers, indices, staged, valid_tokens=valid_tokens_in_last_block
            )
        else:
            kv_gather(layers, indices, staged, valid_tokens=valid_tokens_in_last_block)
        if on_host:
            return digest
        if target.is_pinned():
            target.copy_(staged)
            return digest
        # A device writes to pageable memory through small bounce buffers; one pinned buffer from
        # torch's cache and a plain copy is faster.
        pinned = torch.empty(target.shape, dtype=self.dtype, pin_memory=True)
        pinned.copy_(staged)
        target.copy_(pinned)
        return digest

    def scatter(
        self,
        first_layer: int,
        end_layer: int,
        blocks: Sequence[int],
        payload: memoryview | torch.Tensor,
        *,
        digest: bool = False,
    ) -> bytes | None:
        """Write a payload in the wire layout into distinct blocks; the inverse of `gather`.

        Returns when `payload` may be reused: the digest of what was written, or None without `digest`.
        The blocks are written before it is known: nobody may read them until it is compared.

        Raises:
            ValueError: an index, a size or the payload does not fit, or a block is named twice.
        """
        if len(set(blocks)) != len(blocks):
            raise ValueError("a block is named twice")
        layers = self._layers(first_layer, end_layer)
        indices = self._indices(blocks)
        source = self._wire_view(_writable(payload), layers, len(blocks))
        # A blocking copy: the caller may hand the payload's memory to the next message.
        moved = source.to(self.device)
        if digest:
            return kv_scatter_digest(layers, indices, moved)
        kv_scatter(layers, indices, moved)
        return None

    def _layers(self, first_layer: int, end_layer: int) -> torch.Tensor:
        if not 0 <= first_layer < end_layer <= self.num_layers:
            raise ValueError(f"layers [{first_layer}, {end_layer}) of {self.num_layers}")
        return self.tensor[first_layer:end_layer]

    def _indices(self, blocks: Sequence[int]) -> torch.Tensor:
        if not blocks or min(blocks) < 0 or max(blocks) >= self.num_blocks:
            raise ValueError(f"blocks {list(blocks)} are empty or outside 0..{self.num_blocks - 1}")
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)

    def _wire_view(
        self, buffer: memoryview | torch.Tensor, layers: torch.Tensor, num_blocks: int
    ) -> torch.Tensor:
        flat = (
            buffer
            if isinstance(buffer, torch.Tensor)
            else torch.frombuffer(buffer, dtype=torch.uint8)
        )
        shape = (*layers.shape[:2], num_blocks, *layers.shape[3:])
        expected = self.wire_bytes(0, layers.shape[0], num_blocks)
        if flat.dtype != torch.uint8 or flat.nbytes != expected:
            raise ValueError(f"the buffer is {flat.nbytes} bytes of {flat.dtype}, not {expected}")
        return flat.view(-1).view(self.dtype).view(shape)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU memory that the system zeroes when a block is first used: a pool costs nothing to make."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
        .view(dtype)
        .view(shape)
    )


def _writable(payload: memoryview | torch.Tensor) -> memoryview | torch.Tensor:
    """Torch warns about views of read-only memory even when it only reads: copy those."""
    if isinstance(payload, memoryview) and payload.readonly:
        return memoryview(bytearray(payload))
    return payload
